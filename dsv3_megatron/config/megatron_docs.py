"""The page docs/megatron_lm_flags.md, made from the table of flags.

Usage: python -m dsv3_megatron.config.megatron_docs > docs/megatron_lm_flags.md
"""

from __future__ import annotations

import dataclasses

from dsv3_megatron.config.megatron_flags import (
    ALWAYS,
    BRIDGE,
    DIFFERENCES,
    FLAGS,
    NO_EFFECT,
    REFUSED,
    SAME_NAME,
    TRANSLATED,
    MegatronFlag,
)
from dsv3_megatron.config.run import SECTIONS
from dsv3_megatron.config.streams import run_command

_HEAD = """# Megatron-LM's flags

What becomes of the flags of Megatron-LM's and Megatron-Bridge's DeepSeek-V3 recipes. Bridge's settings (`model.NAME`,
`optimizer.NAME`, ...) are the flags of the same names with dashes, except those
of the last table. A flag in none of these tables is an error that
names the nearest ones. What no flag says is the preset's (`--preset`, tiny if none is given), not Megatron-LM's
default. Made by `python -m dsv3_megatron.config.megatron_docs > docs/megatron_lm_flags.md`.
"""
_SECTIONS = (
    (TRANSLATED, "Spelt otherwise here", "becomes", "Taken, and said in a note. One that contradicts this library's "
     "own flag is an error."),
    (ALWAYS, "Always so", "because", "Taken, with a note; with a value, only those that mean what is done."),
    (NO_EFFECT, "Without effect", "because", "Taken, with a note."),
    (REFUSED, "Refused", "instead", "An error that says this."),
)


def text() -> str:
    """Make the Markdown text of docs/megatron_lm_flags.md."""
    parts = [_HEAD, "## The same in both\n", _wrapped(SAME_NAME),
             "Where more than the name has to be known:\n", "| flag | here |\n|---|---|",
             *(f"| {_code(name)} | {meaning} |" for name, meaning in DIFFERENCES), ""]
    for fate, title, column, intro in _SECTIONS:
        parts += [f"## {title}\n", intro + "\n", f"| flag | {column} |\n|---|---|",
                  *(_row(flag) for flag in FLAGS if flag.fate == fate), ""]
    parts += ["## Settings of Megatron-Bridge without a flag\n", "| setting | here |\n|---|---|",
              *(f"| {_code(names)} | {meaning} |" for names, meaning in BRIDGE)]
    return "\n".join(parts).rstrip() + "\n"


def own_flags() -> set[str]:
    """Every flag that is a field of a run."""
    return {"--" + (field.metadata["flag"] or field.name.replace("_", "-"))
            for section in SECTIONS.values() for field in dataclasses.fields(section)}


def _row(flag: MegatronFlag) -> str:
    words = {"0": "", "1": " X", "+": " X ..."}[flag.nargs]
    return f"| `{flag.name}{' ' + ' or '.join(flag.values) if flag.values else words}` | {flag.text} |"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _wrapped(names: tuple[str, ...]) -> str:
    lines = [""]
    for word in [f"`{name}`" for name in names]:
        if len(lines[-1]) + len(word) > 115:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> int:
    """Print the page on Megatron-LM's flags to standard output."""
    print(text(), end="")
    return 0


if __name__ == "__main__":
    run_command(main)
