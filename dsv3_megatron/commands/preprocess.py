"""Turn text into Megatron-Core's .bin/.idx token files; flags and meanings are Megatron-LM's, and so are the bytes.

    dsv3 preprocess --input A.jsonl B.jsonl.zst 'dir/*.parquet' --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model DIR --append-eod --workers 2 --output-prefix data/train

writes data/train_text_document.bin and .idx, and a sidecar .json with the tokenizer's fingerprint, counts and hashes.
Inputs are JSON lines (.jsonl, .json, .ndjson; .gz, .zst, .xz and .bz2 too; from pipes as well, - is standard input),
Parquet, and folders of either or of plain text, a document a file. Where a name says nothing, the content does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.slow_work import bar_width
from dsv3_megatron.config.streams import print_error

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads cost memory here and do nothing

from dsv3_megatron.data.block_encoder import Transforms
from dsv3_megatron.data.encoder import BACKENDS, choose_encoder
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.job import FOLDER_SUFFIX
from dsv3_megatron.data.preprocess import PreprocessOptions, Totals, WorkerDied, preprocess
from dsv3_megatron.data.reading.documents import DEFAULT_MAX_DOCUMENT_BYTES, sample_documents
from dsv3_megatron.data.reading.inputs import FORMATS, InputFile, JobShard, expand_inputs, shown, take_shard
from dsv3_megatron.process.cores import usable_cores

if TYPE_CHECKING:
    from dsv3_megatron.data.chat.template import ChatTemplate

_PUNKT_SAMPLE_BYTES = 4_000_000


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 preprocess",
        description="Turn text into Megatron-Core's .bin/.idx token files.",
        epilog="Flags that Megatron-LM's tool has keep its meaning.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )
    _add_input_flags(parser)
    _add_tokenization_flags(parser)
    _add_chat_flags(parser)
    _add_transform_flags(parser)
    _add_output_flags(parser)
    _add_runtime_flags(parser)
    options = parser.parse_args(arguments)
    if options.log_interval < 1:
        parser.error(f"--log-interval {options.log_interval} must be at least 1; try 1000")
    if options.split_sentences and (options.fim_rate or options.split_combined_rate):
        parser.error(
            "--split-sentences cannot be combined with --fim-rate or --split-combined-rate: those are for documents"
        )
    if options.sft:
        _refuse_with_sft(parser, options)
    elif options.chat_template:
        parser.error("--chat-template is for --sft")
    if options.keep_newlines and not options.split_sentences:
        parser.error("--keep-newlines is for --split-sentences")
    return options


def _refuse_with_sft(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what only texts have; a conversation's text is its template's."""
    given = {"--json-keys": options.json_keys != parser.get_default("json_keys"), "--append-eod": options.append_eod,
             "--fim-rate": options.fim_rate, "--split-combined-rate": options.split_combined_rate,
             "--split-sentences": options.split_sentences,
             "--tokenizer-backend gigatoken": options.tokenizer_backend == "gigatoken"}
    wrong = [flag for flag, is_given in given.items() if is_given]
    if wrong:
        parser.error(f"{wrong[0]} cannot be combined with --sft: what surrounds a conversation is its chat template's "
                     "matter")


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input data").add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, globs, folders or pipes, in order; - is standard input",
    )
    add("--input-format", choices=FORMATS, default="auto", help="of all inputs (%(default)s: by names and contents)")
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (columns) to extract, one dataset each (text)",
    )
    add("--split-sentences", action="store_true", help="make a sequence of each sentence, with NLTK's Punkt")
    add("--keep-newlines", action="store_true", help="with --split-sentences: keep the white space between sentences")
    add("--lang", default="english", help="with --split-sentences: language of NLTK's data (%(default)s)")
    add(
        "--max-document-bytes",
        type=int,
        default=DEFAULT_MAX_DOCUMENT_BYTES,
        metavar="N",
        help="longest text (%(default)s)",
    )
    add(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a document that cannot be taken: stop, or leave "
        "it out and list it in PREFIX.rejects.jsonl (%(default)s)",
    )


def _add_tokenization_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenization").add_argument
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer", help="(%(default)s)")
    add("--tokenizer-model", required=True, metavar="DIR", help="folder with a tokenizer.json")
    add(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="auto: gigatoken for texts where it gives the same ids (%(default)s)",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add(
        "--add-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put around every text what the tokenizer itself puts there, such as a begin token, as Megatron-LM's tool "
        "does; most tokenizers put nothing",
    )


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("conversations, for fine-tuning").add_argument
    add(
        "--sft",
        action="store_true",
        help="the lines are conversations (messages, prompt and completion, or ShareGPT's conversations): writes "
        "PREFIX_conversations, and PREFIX_conversations_mask, which says what counts in the loss",
    )
    add("--chat-template", metavar="FILE", help="with --sft: Jinja2 template to use instead of the tokenizer's own")


def _add_transform_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("DeepSeek-V3's data").add_argument
    add(
        "--fim-rate",
        type=float,
        default=0.0,
        metavar="X",
        help="share of documents cut for fill-in-the-middle; V3's is 0.1",
    )
    add("--fim-spm-rate", type=float, default=0.0, metavar="X", help="share of those in suffix-prefix-middle order (0)")
    add("--fim-sentinels", nargs=3, metavar="TOKEN", help="tokens for begin, hole and end (V3's)")
    add(
        "--split-combined-rate",
        type=float,
        default=0.0,
        metavar="X",
        help="share of tokens joining punctuation and line breaks that are split (0)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="of the two above; they depend on it and on the text alone")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output data").add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin, .idx and .json")
    add("--overwrite", action="store_true", help="replace an existing output, drop unfinished work")
    add("--resume", action="store_true", help="go on with the unfinished work of the same command")
    add(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="make part I of N (from 1); dsv3 merge joins the parts",
    )


def _add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("runtime").add_argument
    add(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="encoding processes (%(default)s)",
    )
    add(
        "--log-interval",
        type=int,
        default=100_000,
        metavar="N",
        help="documents between progress lines where standard error is no terminal (%(default)s)",
    )
    add(
        "--partitions", type=int, default=1, help=argparse.SUPPRESS
    )  # Megatron-LM's; the workers share the input anyway
    add("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)  # the order is always kept


class _Progress:
    """A bar on a terminal, now and then a line elsewhere."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._log_interval, self._num_lines = log_interval, 0
        self._start = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes or None, unit="B", unit_scale=True, **bar_width(sys.stderr))

    def __call__(self, totals: Totals) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{totals.documents:,} documents, {totals.tokens / 1e6:.1f}M tokens", refresh=False
            )
            self._bar.update(totals.input_bytes - self._bar.n)
        elif totals.documents // self._log_interval > self._num_lines:
            self._num_lines = totals.documents // self._log_interval
            rate = totals.text_bytes / 1e6 / (time.perf_counter() - self._start)
            print(
                f"processed {totals.documents} documents, {totals.text_bytes / 1e6:.1f} MB, {totals.tokens} tokens, "
                f"{rate:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _make_transforms(
    options: argparse.Namespace, files: list[InputFile], shard: JobShard
) -> tuple[Transforms, dict[str, Any]]:
    """The transforms that were asked for, and what the sidecar says of them."""
    fim = combined = sentences = None
    described: dict[str, Any] = {}
    if options.fim_rate:
        from dsv3_megatron.data.transforms.fim import FimOptions, FimTransform, find_fim_sentinels

        sentinels = find_fim_sentinels(options.tokenizer_model, options.fim_sentinels)
        fim = FimTransform(FimOptions(options.fim_rate, options.fim_spm_rate, options.seed), sentinels)
        described |= {
            "fim_rate": options.fim_rate,
            "fim_spm_rate": options.fim_spm_rate,
            "fim_sentinels": list(sentinels.names),
        }
    if options.split_combined_rate:
        from dsv3_megatron.data.tokenizer import load_tokenizer
        from dsv3_megatron.data.transforms.combined_tokens import CombinedTokenSplitter, find_combined_tokens

        table = find_combined_tokens(load_tokenizer(options.tokenizer_model))
        combined = CombinedTokenSplitter(table, rate=options.split_combined_rate, seed=options.seed)
        described |= {"split_combined_rate": options.split_combined_rate}
    if described:
        described["seed"] = options.seed
    if options.split_sentences:
        from dsv3_megatron.data.transforms.sentences import make_splitter

        # The whole job's input, not the shard's: every shard must learn the same model.
        portions = take_shard(files, JobShard())
        sample = sample_documents(files, portions, options.json_keys, max_bytes=_PUNKT_SAMPLE_BYTES)
        try:
            sentences = make_splitter(
                (text for _, text in sample), language=options.lang, keep_newlines=options.keep_newlines
            )
        except ValueError as error:
            if not all(file.is_stream for file in files):
                raise
            raise ValueError(f"{error}; a pipe cannot be sampled: give a file, or install NLTK's data") from None
        print(f"sentences: {sentences.description}", file=sys.stderr)
        described |= {
            "split_sentences": True,
            "keep_newlines": options.keep_newlines,
            "sentence_model": sentences.description,
        }
    return Transforms(fim, combined, sentences), described


def _find_template(options: argparse.Namespace) -> tuple[ChatTemplate | None, dict[str, Any]]:
    """The chat template of a job on conversations, and what the sidecar says of it; None for one on texts."""
    if not options.sft:
        return None, {}
    from dsv3_megatron.data.chat.template import find_chat_template

    template = find_chat_template(options.tokenizer_model, options.chat_template)
    found = "marks" if template.has_marks else "turns"
    how = {"marks": "by its marks ({% generation %})", "turns": "by the borders of its turns"}[found]
    print(f"chat template: {template.place}, the assistant's parts {how}", file=sys.stderr)
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    return template, {"chat_template_sha256": digest, "assistant_found_by": found}


def _run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    shard = JobShard.parse(options.shard)
    files = expand_inputs(options.input, format=options.input_format)
    portions = take_shard(files, shard)
    # Only Hugging Face's says where a token lies in its text.
    backend = "huggingface" if options.sft else options.tokenizer_backend
    encoder, why = choose_encoder(options.tokenizer_model, backend=backend)
    print(f"tokenizer: {encoder.name}{'' if options.sft else f' ({why})'}", file=sys.stderr)
    template, described = _find_template(options)
    transforms: Transforms | None = None
    if template is None:
        transforms, described = _make_transforms(options, files, shard)
    job = PreprocessOptions(
        files=files,
        keys=tuple(options.json_keys),
        output_prefix=options.output_prefix,
        is_eod_appended=options.append_eod,
        is_wrapped=options.add_special_tokens and not options.sft,
        shard=shard,
        is_skipping=options.on_error == "skip",
        max_document_bytes=options.max_document_bytes,
        is_overwrite_allowed=options.overwrite,
        is_resumed=options.resume,
        num_workers=options.workers,
        transform_options=described,
        is_chat=options.sft,
    )
    progress = _Progress(sum(portion.stop - portion.start for portion in portions), options.log_interval)
    try:
        totals = preprocess(job, encoder, transforms=transforms, template=template, report=progress)
    finally:
        progress.close()
    _summarize(job, totals, time.perf_counter() - start)


def _summarize(job: PreprocessOptions, totals: Totals, seconds: float) -> None:
    print(
        f"{totals.records} documents in, {totals.documents} written, {totals.empty} of them empty, "
        f"{totals.num_rejected} left out; {totals.text_bytes / 1e6:.1f} MB of text, {totals.tokens} tokens, "
        f"{totals.text_bytes / max(totals.tokens, 1):.2f} bytes/token; {seconds:.1f} s, "
        f"{totals.text_bytes / 1e6 / seconds:.1f} MB/s"
    )
    for kind, counts in (("left out", totals.rejected), ("note", totals.notes)):
        for what, count in sorted(counts.items()):
            print(f"{kind}: {count} {what}")
    if totals.rejected:
        print(f"left out documents are listed in {shown(job.rejects_path)}")
    for key in job.keys:
        print(f"-> {shown(dataset_paths(job.dataset_prefix(key))[0])}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for what the user can correct)."""
    options = _parse_arguments(arguments)
    status = 2
    try:
        _run(options)
        return 0
    except WorkerDied as error:
        print_error(error)
        status = 1
    except (ValueError, OSError) as error:
        print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    _say_what_is_kept(options)
    return status


def _say_what_is_kept(options: argparse.Namespace) -> None:
    try:
        unfinished = f"{options.output_prefix}{JobShard.parse(options.shard).suffix}{FOLDER_SUFFIX}"
    except ValueError:
        return  # no such shard, so no work of it
    if os.path.exists(os.path.join(unfinished, "state.json")):
        print(f"finished work is kept in {unfinished}: --resume goes on from there", file=sys.stderr)
