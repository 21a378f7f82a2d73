"""DeepSeek-V3's report figure by figure: what the papers say, what this library gives, equal or how far apart.

    dsv3 report                                       what takes seconds
    dsv3 report --slow --output docs/report.md        all of it, as the page of the documents

Prints Markdown, or JSON. Exit status: 0, or 2 for a command that cannot be carried out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.papers.claim_page import as_json, page
from dsv3_megatron.papers.claim_table import SECTIONS, judge_all


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 report", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="compute the rows too that take longer: up to two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there, and print nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        require_output_file("--output", options.output)
        with slow_work("report", total=sum(map(len, SECTIONS.values())), unit="row") as work:
            sections = judge_all(with_slow=options.slow, report=work.add)
        text = json_text(as_json(sections), indent=1) + "\n" if options.json else page(sections)
        if options.output is None:
            print(text, end="")
        else:
            options.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return 0
