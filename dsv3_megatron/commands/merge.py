"""Join .bin/.idx datasets end to end: shards of a preprocessing job, or any that one tokenizer made.

    dsv3 merge --input 'data/train_text_document.shard-*-of-3' \
        --output-prefix data/train_text_document

Shards may be given in any order; all of them must be there, and the result is what one machine would have made.
"""

from __future__ import annotations

import argparse

from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.merge import find_datasets, merge_datasets
from dsv3_megatron.data.reading.inputs import shown


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for what the user can correct)."""
    parser = argparse.ArgumentParser(prog="dsv3 merge", description="Join .bin/.idx datasets end to end.")
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="prefixes, globs, or a folder (Megatron-LM's --input)",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="of the result")
    add("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    try:
        prefixes = find_datasets(options.input)
        with slow_work("merge", total=len(prefixes), unit="dataset") as work:

            def report(prefix: str) -> None:
                work.add()
                work.say(f"appended {prefix}")

            sidecar = merge_datasets(
                prefixes, options.output_prefix, is_overwrite_allowed=options.overwrite, report=report
            )
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    print(
        f"{len(prefixes)} datasets, {sidecar.num_documents} documents, {sidecar.num_tokens} tokens "
        f"-> {shown(dataset_paths(options.output_prefix)[0])}"
    )
    return 0
