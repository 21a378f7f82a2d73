#!/usr/bin/env python3
"""Turn JSON Lines text into Megatron-Core's .bin/.idx token files; flags and meanings are Megatron-LM's.

    python tools/preprocess_data.py --input train.jsonl --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model DIR --append-eod --workers 2 --output-prefix data/train

writes data/train_text_document.bin and .idx, and a sidecar .json with the tokenizer's fingerprint, counts and hashes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from dsv3_megatron.data.encoder import HuggingFaceEncoder
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.preprocess import Progress, expand_inputs, preprocess_files


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn JSON Lines text into Megatron-Core's .bin/.idx token files.",
        epilog="Flags and meanings are Megatron-LM's; --overwrite is added: without it an existing output is an error.",
    )
    add = parser.add_argument_group("input data").add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines files or globs (.gz too), in order")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to extract, one dataset each (text)")
    add = parser.add_argument_group("tokenization").add_argument
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer", help="(%(default)s)")
    add("--tokenizer-model", required=True, metavar="DIR", help="folder with a tokenizer.json")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add = parser.add_argument_group("output data").add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin, .idx and .json")
    add("--overwrite", action="store_true", help="replace an existing output")
    add = parser.add_argument_group("runtime").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="encoding threads (%(default)s)")
    add("--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines (%(default)s)")
    options = parser.parse_args(arguments)
    if options.log_interval < 1:
        parser.error(f"--log-interval {options.log_interval} must be at least 1; try 1000")
    return options


def _report(progress: Progress) -> None:
    print(f"processed {progress}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    options = _parse_arguments(arguments)
    try:
        paths = expand_inputs(options.input)
        encoder = HuggingFaceEncoder(options.tokenizer_model, num_threads=options.workers)
        for key in options.json_keys:
            totals = preprocess_files(
                paths,
                output_prefix=options.output_prefix,
                json_key=key,
                encoder=encoder,
                is_eod_appended=options.append_eod,
                is_overwrite_allowed=options.overwrite,
                log_interval=options.log_interval,
                report=_report,
            )
            output = dataset_paths(f"{options.output_prefix}_{key}_document")[0]
            print(f"{totals} in {totals.seconds:.1f} s -> {output}")
            if totals.num_empty_documents or totals.num_blank_lines:
                print(
                    f"note: {totals.num_empty_documents} documents without tokens (kept, empty), "
                    f"{totals.num_blank_lines} blank lines (skipped)"
                )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the dataset under way was dropped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
