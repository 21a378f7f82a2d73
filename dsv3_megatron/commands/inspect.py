"""Look into a .bin/.idx dataset: statistics, a histogram, decoded documents; --verify looks for damage.

    dsv3 inspect data/train_text_document --histogram lengths.png --documents 0 17 --verify

Exit status: 0 sound, 1 damaged, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import message, print_error, quoted
from dsv3_megatron.data.indexed import dataset_paths, read_sidecar
from dsv3_megatron.data.inspection import DatasetStatistics, measure, plot_lengths, read_document, verify

_SHOWN_CHARACTERS = 2000


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 inspect", description="Look into a .bin/.idx dataset.")
    add = parser.add_argument
    add("prefix", help="path of the dataset without .bin or .idx")
    add("--tokenizer-model", metavar="DIR", help="folder with a tokenizer.json, to decode documents")
    add("--documents", nargs="+", type=int, default=[], metavar="N", help="documents to show, counted from 0")
    add("--whole", action="store_true", help=f"show them whole, not their first {_SHOWN_CHARACTERS} characters")
    add("--histogram", metavar="PNG", help="write a histogram of document lengths")
    add("--verify", action="store_true", help="read everything and look for damage")
    add("--json", action="store_true", help="print statistics and findings as JSON")
    options = parser.parse_args(arguments)
    options.prefix = options.prefix[:-4] if options.prefix.endswith((".bin", ".idx")) else options.prefix
    return options


def _print_statistics(prefix: str, statistics: DatasetStatistics) -> None:
    sidecar = read_sidecar(prefix)
    lengths = ", ".join(f"{share}%: {length}" for share, length in statistics.percentiles.items())
    rows = [
        ("documents", f"{statistics.num_documents} ({statistics.num_empty_documents} empty)"),
        ("sequences", statistics.num_sequences),
        ("tokens", f"{statistics.num_tokens} of {statistics.dtype}, {statistics.bytes_on_disk / 1e6:.1f} MB"),
        ("tokens per document", f"mean {statistics.mean_length:.1f}; {lengths}; longest {statistics.longest}"),
    ]
    if sidecar is None:
        rows.append(("sidecar", "none: made by another tool"))
    else:
        options = ", ".join(f"{key}={value}" for key, value in sidecar.options.items())
        rows += [
            (
                "tokenizer",
                f"{sidecar.tokenizer_fingerprint[:12]}, {sidecar.vocab_size} ids, largest used {sidecar.max_token_id}",
            ),
            ("made with", options),
            ("input", ", ".join(f"{key}: {value}" for key, value in sidecar.counts.items()) or "not noted"),
        ]
    for name, value in rows:
        print(f"{name:20} {quoted(value)}")


def _read_documents(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Number, tokens and text of each document that is to be shown; whether the text is cut."""
    tokenizer = None
    if options.tokenizer_model:
        from dsv3_megatron.data.tokenizer import fingerprint, load_tokenizer

        tokenizer = load_tokenizer(options.tokenizer_model)
        sidecar = read_sidecar(options.prefix)
        if sidecar is not None and sidecar.tokenizer_fingerprint not in ("", fingerprint(options.tokenizer_model)):
            raise ValueError(
                f"{options.prefix} was made by tokenizer {sidecar.tokenizer_fingerprint[:12]}, not by the one in "
                f"{options.tokenizer_model} ({fingerprint(options.tokenizer_model)[:12]})"
            )
    for number in options.documents:
        ids = read_document(options.prefix, number).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))
        is_cut = len(text) > _SHOWN_CHARACTERS and not options.whole
        yield {
            "number": number,
            "num_tokens": len(ids),
            "text": text[:_SHOWN_CHARACTERS] if is_cut else text,
            "is_cut": is_cut,
        }


def _show_documents(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        cut = f", first {_SHOWN_CHARACTERS} characters" if document["is_cut"] else ""
        print(f"--- document {document['number']}, {document['num_tokens']} tokens{cut}")
        print(document["text"])


def _verify(prefix: str) -> list[str]:
    total = sum(Path(path).stat().st_size for path in dataset_paths(prefix)[:2] if Path(path).exists())
    if not sys.stderr.isatty():
        return verify(prefix)
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        return verify(prefix, report=bar.update)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    problems: list[str] = []
    try:
        require_output_file("--histogram", options.histogram)
        if options.verify:
            problems = _verify(options.prefix)
            for problem in problems:
                print(f"damaged: {message(problem)}", file=sys.stderr)
        if not problems:
            with slow_work("measure"):
                statistics = measure(options.prefix)
            if options.histogram:
                plot_lengths(options.prefix, options.histogram)
            documents = list(_read_documents(options))
            if options.json:
                shown = {"documents": documents} if documents else {}
                print(json_text(asdict(statistics) | {"problems": []} | shown))
            else:
                _print_statistics(options.prefix, statistics)
                _show_documents(documents)
        elif options.json:
            print(json_text({"problems": problems}))
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    if options.verify and not problems and not options.json:
        seen = (
            "structure and checksums" if read_sidecar(options.prefix) else "structure only: no sidecar with checksums"
        )
        print(f"verified: sound ({seen})")
    return 1 if problems else 0
