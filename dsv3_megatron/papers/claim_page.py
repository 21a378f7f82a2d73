"""The page docs/report.md, and the same as plain values: every claim beside what the library gives."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_megatron.papers.claim import SOURCES, Agreement, Judged, Relation
from dsv3_megatron.papers.claim_table import JudgedSection, count_verdicts

_COLUMNS = ("Figure", "Source", "Published", "This library", "Verdict", "Command")
_LONGEST_COMMAND = 20
_INTRODUCTION = """\
# The papers, figure by figure

This page is written by a command. Do not edit it; run

```bash
dsv3 report --slow --output docs/report.md
```

It has a row for each figure of DeepSeek-V3's technical report and of its companion paper on hardware. Read a row from
the left:

- **Figure** and **Source** say what is stated, and where: the section or the table.
- **Published** is the figure as it is printed.
- **This library** is what this library computes. No number of this column is typed in: each comes out of the code.
- **Verdict** is one of three. *Equal*: the two agree to the last printed digit. *Apart*: they do not; you see by how
  much, and why. *Not checkable here*: it takes more than a computer without GPUs; you see what.
- **Command** shows you the number; the letters stand below. `dsv3 report` itself computes what no other command prints.

A bound, such as "at most 4", is equal if it is kept. Times, memory and costs are predictions of the planner
([how far to trust them](planning/README.md)). A test holds that the page is current.
"""


def page(sections: Sequence[JudgedSection]) -> str:
    """The page as Markdown, with a newline at its end.

    Args:
        sections: Judged sections, as `judge_all` gives them.
    """
    letters = command_letters(sections)
    sources = "\n".join(f"- **{name}**: {text}." for name, text in SOURCES.items())
    commands = "\n".join(f"- **{letter}**: `{command}`" for command, letter in letters.items())
    parts = [_INTRODUCTION, f"Sources:\n\n{sources}\n", f"Commands:\n\n{commands}\n"]
    parts += [_section(section, letters) for section in sections]
    parts.append(_count(sections))
    return "\n".join(parts)


def as_json(sections: Sequence[JudgedSection]) -> dict[str, Any]:
    """Plain values: the rows by section, and the count by verdict."""
    return {
        "count": {str(verdict): number for verdict, number in count_verdicts(sections).items()},
        "sections": [{
            "heading": section.heading,
            "rows": [{
                "figure": row.claim.subject, "source": row.claim.source, "place": row.claim.place,
                "published": row.claim.said, "relation": str(row.claim.relation), "given": row.given,
                "verdict": str(row.verdict), "distance": row.distance, "why": row.claim.why,
                "command": row.claim.command} for row in section.rows]} for section in sections],
    }


def command_letters(sections: Sequence[JudgedSection]) -> dict[str, str]:
    """Commands that are too long for a column, and the letter that stands for each."""
    commands = dict.fromkeys(row.claim.command for section in sections for row in section.rows
                             if len(row.claim.command) > _LONGEST_COMMAND)
    return dict(zip(commands, string.ascii_uppercase, strict=False))


def row_line(row: Judged, letters: Mapping[str, str]) -> str:
    """A row of a section's table.

    Args:
        row: The claim and its verdict.
        letters: What stands for a long command, as `command_letters` gives them.
    """
    claim = row.claim
    said = claim.said if claim.relation is Relation.IS else f"{claim.relation} {claim.said}"
    command = letters.get(claim.command) or (f"`{claim.command}`" if claim.command else "")
    cells = (claim.subject, f"{claim.source}, {claim.place}", said, row.given, _verdict(row), command)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _verdict(row: Judged) -> str:
    words = str(row.verdict)
    if row.verdict is Agreement.NOT_RUN:
        words += ": it takes longer, use --slow"
    if row.distance is not None:
        words += f" by {row.distance:+.1%}"
    return f"{words}. {row.claim.why}".rstrip(" .") + "." if row.claim.why else words


def _section(section: JudgedSection, letters: Mapping[str, str]) -> str:
    head = "| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS)
    return "\n".join([f"## {section.heading}\n", head, *(row_line(row, letters) for row in section.rows), ""])


def _count(sections: Sequence[JudgedSection]) -> str:
    counts = count_verdicts(sections)
    total = sum(counts.values())
    lines = [f"## Count\n\n{total} figures.\n"]
    for verdict, number in counts.items():
        lines.append(f"- **{number} {verdict}.**")
        if verdict is Agreement.APART:
            for section in sections:
                apart = [row.claim.subject for row in section.rows if row.verdict is verdict]
                if apart:
                    lines.append(f"    - {section.heading}: {'; '.join(apart)}.")
    return "\n".join([*lines, ""])
