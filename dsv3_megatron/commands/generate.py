"""Text from a checkpoint, of a run or in Hugging Face's format, printed as it is generated.

    dsv3 generate --load checkpoints --prompt "def main(" --max-new-tokens 100
    dsv3 generate --load DeepSeek-V3/ --prompts prompts.jsonl --batch-size 8 --json > texts.jsonl
    dsv3 generate --load checkpoints --prompt "Once" --temperature 0.8 --top-p 0.95 --speculative mtp

What can be wrong with a request is found before anything is allocated. Texts are printed to stdout in the order of
their prompts, each as it grows once those before it are done; what it took goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, add_precision, add_verify_files
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.runs.rank import check_and_run, prepare_rank, refuse

if TYPE_CHECKING:
    from dsv3_megatron.generation.generator import GenerationStatistics, NewTokens, Options
    from dsv3_megatron.generation.text import TextCodec, TextStream


@dataclass(frozen=True)
class GenerationRequest:
    """What to continue, with which model, and how.

    Attributes:
        load: Folder of a run's checkpoints, saved under any layout, or of a Hugging Face checkpoint.
        prompt: A text to continue; or else
        prompts: JSON-lines file of such, {"prompt": "..."} in each line; "-" is standard input.
        max_new_tokens: Tokens of each text, at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Probability that the likeliest tokens, as few as can be, must have together to be kept; 1 keeps all.
        seed: Seed of the draws.
        speculative: "mtp", or None.
        kv_cache: "latent", "full" or "training".
        batch_size: Prompts that are decoded together.
        tokenizer_model: Folder of the tokenizer; None: the checkpoint's.
        precision: "auto", "bf16", "fp32"; None: as the checkpoint was trained, "auto" if it does not say.
        as_json: Print one JSON object for each text.
        verify_files: How far the checkpoint is compared with its checksums: "read", "all" or "none".
    """

    load: str
    prompt: str | None = None
    prompts: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234
    speculative: str | None = None
    kv_cache: str = "latent"
    batch_size: int = 1
    tokenizer_model: str | None = None
    precision: str | None = None
    as_json: bool = False
    verify_files: str = "read"


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be met."""

    run: RunConfig
    load: Callable[[list[Any], Any], None] | None
    codec: TextCodec
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    options: Options


def carry_out(request: GenerationRequest) -> int:
    """Generate, and print as it comes.

    Returns:
        Exit code, as `runs.rank.check_and_run` gives it.
    """
    def check(processes: Processes) -> CheckedRequest:
        prepare_rank()
        return check_request(request, processes.world_size)

    return check_and_run(check, lambda _rank, checked: _generate(checked, as_json=request.as_json),
                         left="the text is as far as it is printed")


def check_request(request: GenerationRequest, world_size: int = 1) -> CheckedRequest:
    """Check a request against its checkpoint and tokenizer; `prepare()` has been called.

    Raises:
        ValueError: the first thing that is wrong, in one message with the way out.
    """
    if world_size != 1:
        raise ConfigError(f"generation runs in one process, not {world_size}; start it without torchrun: checkpoints "
                          "of any layout load into it")
    if (request.prompt is None) == (request.prompts is None):
        raise ConfigError("give what to continue: either --prompt TEXT or --prompts FILE.jsonl")
    from dsv3_megatron.checkpoint.open import open_checkpoint
    from dsv3_megatron.generation.text import check_text, open_codec, read_prompts

    checkpoint = open_checkpoint(request.load, verify_files=request.verify_files)
    model = checkpoint.model
    model.validate()
    options = _options(request, max_length=model.max_position_embeddings)
    options.validate(model.mtp_num_layers)
    codec = open_codec(request.load, request.tokenizer_model, vocab_size=model.vocab_size)
    options = _options(request, max_length=model.max_position_embeddings, stop_ids=codec.stop_ids)
    if request.prompt is not None:
        check_text(request.prompt, "--prompt")
    texts = [request.prompt] if request.prompt is not None else read_prompts(request.prompts or "")
    ids = [codec.encode(text) for text in texts]
    for number, prompt in enumerate(ids, start=1):
        where = "the prompt" if request.prompt is not None else f"prompt {number} of {request.prompts}"
        options.check_prompt(prompt, model.vocab_size, where)
    training = TrainingConfig(
        seq_length=model.max_position_embeddings, micro_batch_size=1, global_batch_size=1, train_iters=1,
        precision=request.precision or checkpoint.precision, transformer_impl="local", eval_interval=0)
    run = checkpoint.run(request.load, training, verify_files=request.verify_files)
    run.validate(1)
    return CheckedRequest(run, checkpoint.load, codec, tuple(texts), tuple(map(tuple, ids)), options)


def _options(request: GenerationRequest, *, max_length: int, stop_ids: tuple[int, ...] = ()) -> Options:
    from dsv3_megatron.generation.generator import Options
    from dsv3_megatron.generation.sampling import Sampling

    return Options(
        request.max_new_tokens, max_length, Sampling(request.temperature, request.top_p, request.seed),
        kv_cache=request.kv_cache, speculative=request.speculative, batch_size=request.batch_size, stop_ids=stop_ids)


def _generate(checked: CheckedRequest, *, as_json: bool) -> int:
    from dsv3_megatron.generation.forward import CachedModel
    from dsv3_megatron.generation.generator import Generator
    from dsv3_megatron.parallel.groups import destroy_groups
    from dsv3_megatron.runs.built_model import build_model

    with slow_work("load"):
        built = build_model(checked.run)
        built.load(checked.load)
    generator = Generator(CachedModel(built.stages[0].eval()), checked.options)
    printer = Printer(checked.codec, checked.texts, checked.ids, sys.stdout, as_json=as_json)
    for event in generator.generate(checked.ids):
        printer.add(event)
    print(summary(generator.statistics, checked.options), file=sys.stderr)
    destroy_groups()
    return 0


@dataclass
class _Text:
    """A text that is growing: its stream, what of it waits for its turn, its ids, and why it ended."""

    stream: TextStream
    waiting: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    ended: str | None = None


class Printer:
    """Prints texts in the order of their prompts: the first that has not ended as it grows, later ones afterwards.

    Args:
        codec: Makes text of ids.
        prompts: Texts of the prompts.
        ids: Ids of the prompts.
        out: Stream to print to.
        as_json: One JSON object a line for each text, when it has ended.
    """

    def __init__(self, codec: TextCodec, prompts: Sequence[str], ids: Sequence[Sequence[int]], out: IO[str], *,
                 as_json: bool = False) -> None:
        self.prompts, self.out, self.as_json = prompts, out, as_json
        from dsv3_megatron.generation.text import TextStream

        self._texts = [_Text(TextStream(codec, prompt)) for prompt in ids]
        self._turn = 0
        self._begin()

    def add(self, event: NewTokens) -> None:
        """Print what an event adds, if it is its text's turn, and those that had to wait for it."""
        entry = self._texts[event.prompt]
        piece = entry.stream.add(event.ids, is_last=event.ended is not None)
        entry.waiting += piece
        entry.text += piece
        entry.ids += event.ids
        entry.ended = event.ended
        while self._turn < len(self._texts):
            entry = self._texts[self._turn]
            self._write(entry)
            if entry.ended is None:
                break
            self._turn += 1
            self._begin()

    def _begin(self) -> None:
        if self._turn < len(self._texts) and not self.as_json:
            head = f"[{self._turn + 1}/{len(self._texts)}] " if len(self._texts) > 1 else ""
            self.out.write(head + self.prompts[self._turn])
            self.out.flush()

    def _write(self, entry: _Text) -> None:
        if self.as_json:
            if entry.ended is not None:
                record = {"prompt": self.prompts[self._turn], "text": entry.text, "tokens": entry.ids,
                          "ended": entry.ended}
                self.out.write(json_text(record, ensure_ascii=False) + "\n")
        else:
            self.out.write(entry.waiting + ("\n" if entry.ended is not None else ""))
        entry.waiting = ""
        self.out.flush()


def summary(statistics: GenerationStatistics, options: Options) -> str:
    """What a generation took, in a line each."""
    lines = [
        f"prompts: {statistics.num_prompt_tokens} tokens in {statistics.prefill_s:.2f} s",
        f"new: {statistics.num_tokens} tokens; after each first one {statistics.decoded_tokens_per_s:.1f} tokens/s "
        f"({statistics.num_decoded_tokens} in {statistics.decode_s:.2f} s, {statistics.num_steps} steps)",
        f"cache: {options.kv_cache}, {statistics.cache_bytes_per_token:,} bytes a token"]
    rate = statistics.acceptance_rate
    if rate is not None:
        lines.append(f"speculative: {statistics.num_accepted} of {statistics.num_drafts} drafts accepted ({rate:.1%})")
    return "\n".join(lines)


def _parse_arguments(arguments: list[str] | None) -> GenerationRequest:
    parser = Parser(
        prog="dsv3 generate", allow_abbrev=False, description="Text from a checkpoint, printed as it is generated.",
        epilog="One process; checkpoints saved under any layout load. Texts go to stdout, speed to stderr.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    add = parser.add_argument_group("model and prompts").add_argument
    add("--load", required=True, metavar="DIR", help="folder of checkpoints that a run saved (the newest is used), or "
        "of a Hugging Face checkpoint")
    add("--prompt", metavar="TEXT", help="text to continue")
    add("--prompts", metavar="FILE", help='JSON lines, {"prompt": "..."} in each; - reads standard input')
    add("--tokenizer-model", metavar="DIR", help="tokenizer (default: the one the checkpoint was trained with)")
    add = parser.add_argument_group("tokens").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each text, at most (%(default)s); it also "
        "ends with its end token, and where the model's context ends")
    add("--temperature", type=float, default=0.0, metavar="T", help="divides the logits; 0 takes the likeliest token "
        "(%(default)s)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this "
        "probability together (%(default)s)")
    add("--seed", type=int, default=1234, metavar="N", help="of the draws (%(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--kv-cache", default="latent", metavar="KIND", help="latent: MLA's, with absorbed decoding; full: every "
        "head's keys and values, to compare with; training: these, attended as in training, to agree with it to the "
        "bit, slowly (%(default)s)")
    add("--speculative", metavar="KIND", help="mtp: the MTP module drafts, the model verifies two tokens at once")
    add("--batch-size", type=int, default=1, metavar="B", help="prompts decoded together (%(default)s)")
    add_precision(add)
    add_verify_files(add, "the checkpoint")
    add("--json", dest="as_json", action="store_true", help="print one JSON object for each text")
    return GenerationRequest(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    try:
        request = _parse_arguments(arguments)
    except ConfigError as error:
        return refuse(str(error))
    return carry_out(request)
