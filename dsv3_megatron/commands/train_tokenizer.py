"""Train a byte-level BPE tokenizer like DeepSeek-V3's: its pre-tokenizer, its special tokens, any vocabulary size.

    dsv3 train-tokenizer --input train.jsonl 'more/*.jsonl.gz' folder/ --vocab-size 32768 --output tokenizer/

writes tokenizer/tokenizer.json and tokenizer_config.json, which `tokenizers` and `transformers.AutoTokenizer` load. It
learns from a sample of --max-train-bytes spread over all of the input, and measures on documents held out from it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.config.streams import print_error
from dsv3_megatron.data.reading.documents import read_documents
from dsv3_megatron.data.reading.inputs import expand_inputs, shown
from dsv3_megatron.data.text_sample import TextSample, hold_out
from dsv3_megatron.data.tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    check_training,
    count_ids,
    fingerprint,
    save_tokenizer,
    train_tokenizer,
)
from dsv3_megatron.process.stop import default_stops

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HELD_OUT_SHARE = 0.01
_HELD_OUT_BYTES = 2_000_000
_REPORT_SECONDS = 2.0
_ENCODE_BATCH = 256


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 train-tokenizer",
        description="Train a byte-level BPE tokenizer with DeepSeek-V3's pre-tokenizer and special tokens.",
        epilog=f"{_HELD_OUT_SHARE:.0%} of the documents (up to {_HELD_OUT_BYTES // 1_000_000} MB) are held out from "
        "training; bytes per token is measured on them.",
    )
    add = parser.add_argument_group("input data").add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, globs or folders, as for dsv3 preprocess")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    add = parser.add_argument_group("training").add_argument
    size = f"ids in total, special tokens included: {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}; DeepSeek-V3 has 129280"
    add("--vocab-size", type=int, required=True, metavar="N", help=size)
    sample = "text to learn from, a sample spread over all of the input; 0 for all of it (%(default)s)"
    add("--max-train-bytes", type=int, default=100_000_000, metavar="N", help=sample)
    add("--min-frequency", type=int, default=2, metavar="N", help="occurrences a merge needs (%(default)s)")
    add("--seed", type=int, default=1234, help="chooses the sample and what is held out (%(default)s)")
    add = parser.add_argument_group("output data").add_argument
    add("--output", required=True, metavar="DIR", help="folder for tokenizer.json and tokenizer_config.json")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    options = parser.parse_args(arguments)
    if options.max_train_bytes < 0:
        parser.error(f"--max-train-bytes {options.max_train_bytes} must be 0 (all of the input) or more")
    return options


def _read_texts(inputs: Sequence[str], json_keys: Sequence[str]) -> Iterator[str]:
    """Every text of the input, in one pass: a pipe gives its bytes only once."""
    yield from read_documents(expand_inputs(inputs), *json_keys)


class _Reading:
    """Counts what passes, and says so every few seconds."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._texts = texts

    def __str__(self) -> str:
        return f"{self.num_documents} documents, {self.num_bytes / 1e6:.1f} MB"

    def __iter__(self) -> Iterator[str]:
        last_report = time.monotonic()
        for text in self._texts:
            self.num_documents += 1
            self.num_bytes += len(text.encode("utf-8"))
            yield text
            if time.monotonic() - last_report > _REPORT_SECONDS:
                last_report = time.monotonic()
                _say(f"read {self}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_output(folder: Path, *, is_overwrite_allowed: bool) -> None:
    """Refuse, before any work, a folder that cannot be written or whose tokenizer is to stay."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "cannot be written to" if existing.is_dir() else "is a file"
        raise ValueError(f"--output {folder}: {existing} {what}; give another folder")
    if (folder / "tokenizer.json").exists() and not is_overwrite_allowed:
        identity = fingerprint(folder)[:12]
        raise ValueError(
            f"{folder} already holds a tokenizer, {identity}: give --overwrite to replace it, or another --output"
        )


def _learn(options: argparse.Namespace, held_out: TextSample) -> Tokenizer:
    reading = _Reading(_read_texts(options.input, options.json_keys))
    texts: Iterable[str] = hold_out(reading, held_out, share=_HELD_OUT_SHARE, seed=options.seed)
    if options.max_train_bytes:
        sample = TextSample(options.max_train_bytes, seed=options.seed, purpose="tokenizer training")
        for text in texts:
            sample.add(text)
        texts = sample
        _say(f"learning from {len(sample)} documents, {sample.num_bytes / 1e6:.1f} MB, of {reading} read")
    else:
        _say("learning from all of the input")
    with default_stops():  # nothing is written yet
        tokenizer = train_tokenizer(
            texts,
            vocab_size=options.vocab_size,
            min_frequency=options.min_frequency,
            show_progress=sys.stderr.isatty(),
        )
    if not reading.num_bytes:
        raise ValueError(f"no text in {', '.join(options.input)}: the input is empty; give JSON Lines with a text each")
    size = count_ids(tokenizer)
    if size < options.vocab_size:
        raise ValueError(
            f"the text gives {size} ids, fewer than --vocab-size {options.vocab_size} (nothing was written): "
            f"give more text than {reading}, --vocab-size {size}, or a --min-frequency below {options.min_frequency}"
        )
    return tokenizer


def _measure(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Bytes per token on texts that the tokenizer has not seen."""
    if not texts:
        return "bytes/token not measured (no document was held out: the input has too few)"
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    batches = (texts[start : start + _ENCODE_BATCH] for start in range(0, len(texts), _ENCODE_BATCH))
    encodings = (encoding for batch in batches for encoding in tokenizer.encode_batch_fast(batch))
    num_tokens = sum(len(encoding) for encoding in encodings)
    ratio = num_bytes / max(num_tokens, 1)
    return f"{ratio:.2f} bytes/token on {len(texts)} documents, {num_bytes / 1e6:.1f} MB, held out"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    options = _parse_arguments(arguments)
    start = time.perf_counter()
    try:
        check_training(options.vocab_size, options.min_frequency)
        _check_output(Path(options.output), is_overwrite_allowed=options.overwrite)
        held_out = TextSample(_HELD_OUT_BYTES, seed=options.seed, purpose="held out")
        tokenizer = _learn(options, held_out)
        measured = _measure(tokenizer, list(held_out))
        identity = save_tokenizer(tokenizer, options.output)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(
        f"tokenizer: {count_ids(tokenizer)} ids in {time.perf_counter() - start:.1f} s, {measured}, "
        f"fingerprint {identity[:12]} -> {shown(options.output)}"
    )
    return 0
