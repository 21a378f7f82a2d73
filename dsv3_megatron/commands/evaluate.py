"""Loss and perplexity of a checkpoint, of a run or in Hugging Face's format, on a dataset or on given token ids.

    dsv3 evaluate --load checkpoints --data-path data/valid_text_document
    dsv3 evaluate --load checkpoints --data-path code=data/code_text_document web=data/web_text_document
    dsv3 evaluate --load DeepSeek-V3/ --tokens ids.npy --logprobs logprobs.npy --json
    torchrun --nproc-per-node 4 -m dsv3_megatron evaluate --load checkpoints --pipeline-model-parallel-size 2 \
        --expert-model-parallel-size 2 --data-path data/valid_text_document

Everything that can be wrong with what was asked for is found before anything is allocated or a process group starts,
and is printed once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.data import DOCUMENT_SWITCHES, DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, add_precision, add_section, add_verify_files, given_fields
from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import nearest_microbatches
from dsv3_megatron.config.run import RunConfig, require_context_parallel, require_document_attention
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.training import TRANSFORMER_IMPLS, TrainingConfig
from dsv3_megatron.data.blend import parse_validation_sets, without_suffix
from dsv3_megatron.data.document_ends import named_eod_id, resolve_eod_id
from dsv3_megatron.data.rows import Rows, open_token_array, open_windows
from dsv3_megatron.data.text_form import form_of_dataset
from dsv3_megatron.data.tokenizer import fingerprint
from dsv3_megatron.process.logs import configure_logging
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.runs.rank import check_and_run, prepare_rank, refuse

if TYPE_CHECKING:
    from dsv3_megatron.checkpoint.open import OpenedCheckpoint
    from dsv3_megatron.runs.evaluator import Evaluation

# Micro-batches of a step for each pipeline stage: the pipeline fills and empties once a step.
_MICROBATCHES_PER_STAGE = 4


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate on what, how, and where the answer goes.

    Attributes:
        load: Folder of a run's checkpoints, or of a Hugging Face checkpoint.
        data_path: Prefix of a dataset; or else
        tokens: .npy file of ids [batch, seq].
        logprobs: File for the log-probability of each next token; with `tokens` only.
        seq_length: Tokens that a row of a dataset predicts; None: as the checkpoint was trained, at most 4096 if it
            does not say.
        micro_batch_size: Rows of one forward pass.
        precision: "auto", "bf16", "fp32"; None: as the checkpoint was trained, "auto" if it does not say.
        transformer_impl: Kind of modules, as a run's field says it: "auto", "local" or "transformer_engine".
        parallel: The layout: fields of ParallelConfig.
        switches: Document switches (fields of DataConfig) by name; those left out are as in training, and off for a
            checkpoint that does not say.
        tokenizer_model: Folder of the tokenizer that made the data; None: the run's or the Hugging Face folder's, if it
            is there.
        as_json: Print one JSON object.
        ema: Evaluate the moving average of the weights that a run kept.
        verify_files: How far checkpoint and data are compared with their checksums: "read", "all" or "none".
    """

    load: str
    data_path: str | None = None
    tokens: str | None = None
    logprobs: str | None = None
    seq_length: int | None = None
    micro_batch_size: int = 1
    precision: str | None = None
    transformer_impl: str = "auto"
    parallel: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    tokenizer_model: str | None = None
    as_json: bool = False
    ema: bool = False
    verify_files: str = "read"


@dataclass(frozen=True)
class _CheckedRequest:
    """A request that can be met: the run to build, how to load it, what to score.

    `eod_id` is the token that ends a document, if the run's data settings need it; `documents` says in a line which of
    them are in force.
    """

    run: RunConfig
    load: Callable[[list[Any], Any], None] | None
    rows: Rows
    logprobs: str | None
    eod_id: int | None
    documents: str


def carry_out(request: EvaluationRequest, datasets: Mapping[str, str] | None = None) -> int:
    """Run one process of an evaluation; the first one prints the result to stdout.

    Args:
        request: What is asked for.
        datasets: Prefixes of several datasets by name, in place of the request's own; None: it has one.

    Returns:
        Exit code, as `runs.rank.check_and_run` gives it.
    """
    requests = ({"": request} if datasets is None else
                {name: dataclasses.replace(request, data_path=prefix) for name, prefix in datasets.items()})

    def check(processes: Processes) -> dict[str, _CheckedRequest]:
        processes.require_rank()
        return {name: check_request(one, processes.world_size) for name, one in requests.items()}

    def work(rank: int, checked: dict[str, _CheckedRequest]) -> int:
        configure_logging(rank)
        if rank == 0:
            for line in dict.fromkeys(one.documents for one in checked.values()):
                print(line, file=sys.stderr)
        results = _evaluate(checked, rank)
        if rank == 0:
            print(_printed(results, is_json=request.as_json))
        return 0

    return check_and_run(check, work, left="nothing was written")


def _printed(results: Mapping[str, Evaluation], *, is_json: bool) -> str:
    """The result of the one dataset that has no name, or those of several by their names."""
    if is_json:
        return as_json(results[""]) if "" in results else json_text(
            {name: _plain(result) for name, result in results.items()})
    return as_text(results[""]) if "" in results else "\n\n".join(
        f"{name}\n{as_text(result)}" for name, result in results.items())


def _evaluate(checked: Mapping[str, _CheckedRequest], rank: int) -> dict[str, Evaluation]:
    prepare_rank()
    from dsv3_megatron.parallel.groups import destroy_groups
    from dsv3_megatron.runs.built_model import build_model
    from dsv3_megatron.runs.evaluator import Evaluator

    first = next(iter(checked.values()))
    with slow_work("load", shown=rank == 0):
        built = build_model(first.run)
        built.load(first.load)
    results = {name: Evaluator(built, one.run, eod_id=one.eod_id).evaluate(one.rows, logprobs=one.logprobs)
               for name, one in checked.items()}
    destroy_groups()
    return results


def check_request(request: EvaluationRequest, world_size: int) -> _CheckedRequest:
    """Check a request against its checkpoint, its data and the number of processes.

    Raises:
        ValueError: the first thing that is wrong, in one message with the way out.
    """
    if (request.data_path is None) == (request.tokens is None):
        raise ConfigError("give what to evaluate on: either --data-path PREFIX or --tokens FILE.npy")
    if request.micro_batch_size < 1:
        raise ConfigError(f"micro_batch_size={request.micro_batch_size} must be at least 1")
    from dsv3_megatron.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(request.load, verify_files=request.verify_files)
    checkpoint.model.validate()
    rows, length = _open_rows(request, checkpoint)
    data, eod_id, documents = _open_documents(request, checkpoint)
    documents += _other_form(request, checkpoint)
    require_document_attention(data, request.transformer_impl)
    require_context_parallel(ParallelConfig(**request.parallel), request.transformer_impl)
    if request.logprobs is not None:
        require_output_file("logprobs", request.logprobs)
        if Path(request.logprobs).exists():
            raise ConfigError(f"logprobs={request.logprobs} exists; remove it, or give another name")
    parallel = ParallelConfig(**request.parallel)
    # Ranks have equal parts of a sequence; what is added at its end changes nothing before it.
    unit = parallel.sequence_multiple
    padded_length = math.ceil(length / unit) * unit
    parallel.validate(checkpoint.model, padded_length)
    parallel.validate_world_size(world_size)
    # No more rows in a pass than a replica has: what is beyond the last row would be padding.
    micro_batch_size = min(request.micro_batch_size, math.ceil(len(rows) / parallel.data_parallel_size(world_size)))
    training = TrainingConfig(
        seq_length=padded_length, micro_batch_size=micro_batch_size,
        global_batch_size=_rows_per_step(parallel, world_size, micro_batch_size, len(rows)),
        precision=request.precision or checkpoint.precision, transformer_impl=request.transformer_impl, train_iters=1,
        eval_interval=0)
    training.validate(parallel, world_size)
    run = checkpoint.run(request.load, training, parallel, data, verify_files=request.verify_files)
    from dsv3_megatron.parallel.layout import stage_layouts

    stage_layouts(run.model, run.parallel)
    return _CheckedRequest(run, _average_loader(run, checkpoint) if request.ema else checkpoint.load, rows,
                           request.logprobs, eod_id, documents)


def _average_loader(run: RunConfig, checkpoint: OpenedCheckpoint) -> Callable[[list[Any], Any], None]:
    if checkpoint.load is not None:
        raise ConfigError(f"load={run.checkpoint.load} is in Hugging Face's format, which has no average of the "
                          "weights; leave out --ema")

    def load_into(stages: list[Any], groups: Any) -> None:
        from dsv3_megatron.checkpoint.store import load_weights

        assert run.checkpoint.load is not None
        load_weights(run.checkpoint.load, run, stages, groups, is_average=True)

    return load_into


def _rows_per_step(parallel: ParallelConfig, world_size: int, micro_batch_size: int, num_rows: int) -> int:
    """Enough micro-batches to fill the pipeline, and no more than there are rows for."""
    stages = parallel.pipeline_model_parallel_size
    rows_per_microbatch = micro_batch_size * parallel.data_parallel_size(world_size)
    wanted = 1 if stages == 1 else _MICROBATCHES_PER_STAGE * stages
    microbatches = min(wanted, math.ceil(num_rows / rows_per_microbatch))
    if stages > 1:
        microbatches = nearest_microbatches(parallel.schedule, stages, microbatches)[-1]
    return microbatches * rows_per_microbatch


def _open_rows(request: EvaluationRequest, checkpoint: OpenedCheckpoint) -> tuple[Rows, int]:
    """The rows, and how many tokens the longest of them predicts."""
    model = checkpoint.model
    identity = fingerprint(request.tokenizer_model) if request.tokenizer_model is not None else None
    if request.tokens is not None:
        if request.seq_length is not None:
            raise ConfigError(f"seq_length={request.seq_length} cuts a dataset into rows; an array has its own: leave "
                              "out --seq-length or --tokens")
        ids_BS = open_token_array(request.tokens, vocab_size=model.vocab_size,
                                  max_length=model.max_position_embeddings)
        return ids_BS, ids_BS.shape[1] - 1
    assert request.data_path is not None
    if request.logprobs is not None:
        raise ConfigError("--logprobs goes with --tokens FILE.npy, whose shape it has; leave out --logprobs or "
                          "--data-path")
    length = min(checkpoint.seq_length, model.max_position_embeddings)
    if request.seq_length is not None:
        length = request.seq_length
    if not 1 <= length <= model.max_position_embeddings:
        raise ConfigError(f"seq_length={length} must lie in 1..{model.max_position_embeddings}, the model's "
                          "max_position_embeddings")
    return open_windows(request.data_path, length=length, vocab_size=model.vocab_size,
                        tokenizer_fingerprint=identity, verify=request.verify_files), length


def _open_documents(request: EvaluationRequest, checkpoint: OpenedCheckpoint) -> tuple[DataConfig, int | None, str]:
    """The document switches in force, the EOD if one is on, and a line that says so.

    Those of training hold unless the request says otherwise. Only in an array, whose tokens may come from anywhere,
    they fall away where nothing says which token ends a document.
    """
    trained = checkpoint.switches or ()
    switches: dict[str, Any] = {**dict.fromkeys(trained, True), **request.switches}
    data = DataConfig(**switches)
    tokenizer = request.tokenizer_model or checkpoint.tokenizer_model
    if not data.document_flags:
        return data, None, _documents_line(data, None, checkpoint)
    if request.data_path is not None:
        eod_id = _eod_id_of_dataset(request.data_path, tokenizer, data.document_flags, request)
        return data, eod_id, _documents_line(data, eod_id, checkpoint)
    # What was given goes before what training says.
    named = named_eod_id(checkpoint.prefixes if request.tokenizer_model is None else (), tokenizer)
    if named is None:
        reason = "nothing says which token ends a document (EOD): give the tokenizer, --tokenizer-model DIR"
        asked = [name for name, is_on in request.switches.items() if is_on]
        if asked:
            raise ConfigError(f"{' and '.join(f'{name}=True' for name in asked)}, but {reason}, or leave it off")
        return DataConfig(), None, f"{_documents_line(DataConfig(), None, checkpoint)}; {reason}"
    if named >= checkpoint.model.vocab_size:
        raise ConfigError(f"the token that ends a document (EOD) has id {named}; it must lie in 0.."
                          f"{checkpoint.model.vocab_size - 1} (the model's vocab_size={checkpoint.model.vocab_size}); "
                          "use the tokenizer that the model was trained with")
    return data, named, _documents_line(data, named, checkpoint)


def _eod_id_of_dataset(data_path: str, tokenizer: str | None, switches: tuple[str, ...], request: EvaluationRequest
                       ) -> int:
    """The end-of-document id, as of a run's data; an error says which switches nobody gave, with the way out."""
    try:
        return resolve_eod_id([without_suffix(data_path)], tokenizer_model=tokenizer, flags=switches)
    except ValueError as error:
        flags = " ".join(f"--no-{name.replace('_', '-')}" for name in switches if name not in request.switches)
        raise ConfigError(f"{error} (as in training; here {flags})" if flags else str(error)) from error


def _documents_line(data: DataConfig, eod_id: int | None, checkpoint: OpenedCheckpoint) -> str:
    on, trained = data.document_flags, checkpoint.switches
    line = f"documents: {' and '.join(on)} at EOD {eod_id}" if on else "documents: packed, nothing keeps them apart"
    if trained is None:
        return line
    if on == trained:
        return f"{line}, as in training"
    return f"{line}; trained with {' and '.join(trained)}" if trained else f"{line}; trained packed"


def _other_form(request: EvaluationRequest, checkpoint: OpenedCheckpoint) -> str:
    """What to add to the line on documents where the dataset's begin or end otherwise than those of training."""
    here = form_of_dataset(without_suffix(request.data_path)) if request.data_path is not None else None
    if here is None or checkpoint.form is None or here == checkpoint.form:
        return ""
    return f"; texts here {here}, those of training {checkpoint.form}"


def as_text(result: Evaluation) -> str:
    """A line for each number."""
    lines = [f"loss        {result.loss:.6f} nats/token", f"perplexity  {result.perplexity:.4f}",
             f"tokens      {result.tokens} in {result.rows} rows"]
    lines += [f"mtp_{depth} loss  {loss:.6f} nats/token" for depth, loss in enumerate(result.mtp_losses, start=1)]
    if result.mtp_losses:
        lines.append(f"            MTP losses are sums divided by all {result.tokens} tokens, as in training: a row's "
                     "last positions, without a target, add nothing")
    return "\n".join(lines)


def as_json(result: Evaluation) -> str:
    """One JSON object; null for what is infinite or not a number, which JSON cannot say."""
    return json_text(_plain(result))


def _plain(result: Evaluation) -> dict[str, Any]:
    return {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens, "rows": result.rows,
            "mtp_losses": list(result.mtp_losses)}


_ABOUT_DOCUMENTS = """\
Each switch is as the run was trained, and off for Hugging Face, unless it is given here; a line on stderr says what is
in force. The token that ends a document (EOD) is the one that the dataset's sidecar names, or else the tokenizer. In
--tokens documents end where the EOD is, as named by --tokenizer-model, the data the run was trained on, its tokenizer,
or the one in Hugging Face's folder; if none of them is there, the switches of training fall away."""


def _add_document_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("documents", _ABOUT_DOCUMENTS).add_argument
    helps = {item.name: item.metadata["help"] for item in dataclasses.fields(DataConfig)}
    for name in DOCUMENT_SWITCHES:
        add(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=helps[name])
    add("--tokenizer-model", metavar="DIR", help="tokenizer that made the data (default: the run's, or the one in "
        "Hugging Face's folder, if it is there)")


def _datasets(words: list[str] | None) -> tuple[str | None, dict[str, str] | None]:
    """The prefix of --data-path; or the prefixes of several datasets, by name.

    Raises:
        ValueError: several without names, or more than a prefix for one.
    """
    if words is None:
        return None, None
    sets = parse_validation_sets(words, "data_path")
    for name, blend in sets.items():
        if len(blend.prefixes) > 1 or blend.weights is not None:
            of_name = f" to {name}" if name else ""
            raise ConfigError(f"data_path={' '.join(words)} gives {len(blend.prefixes)} datasets{of_name}, and every "
                              "token of a dataset is predicted once: give each a name, NAME=PREFIX NAME=PREFIX, and no "
                              "weights")
    prefixes = {name: blend.prefixes[0] for name, blend in sets.items()}
    return (prefixes[""], None) if "" in prefixes else (None, prefixes)


def _parse_arguments(arguments: list[str] | None) -> tuple[EvaluationRequest, dict[str, str] | None]:
    parser = Parser(
        prog="dsv3 evaluate", allow_abbrev=False,
        description="Loss and perplexity of a checkpoint on a dataset or on given token ids.",
        epilog="Started by torchrun for several processes, under any layout; alone without.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    add = parser.add_argument_group("model and data").add_argument
    add("--load", required=True, metavar="DIR", help="folder of checkpoints that a run saved (the newest is used), or "
        "of a Hugging Face checkpoint")
    add("--data-path", nargs="+", metavar="PREFIX", help="dataset PREFIX.bin and PREFIX.idx; each token but the first "
        "is predicted once, in file order. Several with a name each, NAME=PREFIX NAME=PREFIX ..., are evaluated apart")
    add("--tokens", metavar="FILE", help="integer array [batch, seq] of token ids in .npy format")
    add("--seq-length", type=int, metavar="N", help="with --data-path: tokens predicted in a row (default: as trained)")
    add = parser.add_argument_group("how").add_argument
    add("--micro-batch-size", type=int, default=1, metavar="N", help="rows in one forward pass (%(default)s)")
    add_precision(add)
    add("--ema", action="store_true", help="evaluate the moving average of the weights that the run kept (--ema-decay)")
    add_verify_files(add, "checkpoint and data")
    add("--transformer-impl", choices=TRANSFORMER_IMPLS, default="auto", help="modules to build from (%(default)s)")
    _add_document_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--logprobs", metavar="FILE", help="with --tokens: write the log-probability of each next token, counted "
        "or not, float32 [batch, seq - 1], in .npy format")
    add("--json", action="store_true", help="print one JSON object; as in training, mtp_losses are sums over the "
        "positions that have a target, divided by all tokens")
    add_section(parser, "parallel")
    options = vars(parser.parse_args(arguments))
    data_path, datasets = _datasets(options["data_path"])
    request = EvaluationRequest(
        load=options["load"], data_path=data_path, tokens=options["tokens"], logprobs=options["logprobs"],
        seq_length=options["seq_length"], micro_batch_size=options["micro_batch_size"], precision=options["precision"],
        transformer_impl=options["transformer_impl"], parallel=given_fields(options, ["parallel"]),
        switches={name: options[name] for name in DOCUMENT_SWITCHES if options[name] is not None},
        tokenizer_model=options["tokenizer_model"], as_json=options["json"], ema=options["ema"],
        verify_files=options["verify_files"])
    return request, datasets


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    try:
        request, datasets = _parse_arguments(arguments)
    except ValueError as error:
        return refuse(str(error))
    return carry_out(request) if datasets is None else carry_out(request, datasets)
