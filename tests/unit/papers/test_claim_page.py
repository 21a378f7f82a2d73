"""docs/report.md is what the command writes today; planned figures may have moved by a little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv3_megatron.papers.claim import REPORT, Agreement, Claim, judge
from dsv3_megatron.papers.claim_page import as_json, command_letters, page, row_line
from dsv3_megatron.papers.claim_table import JudgedSection, judge_all

PAGE = Path(__file__).resolve().parents[3] / "docs/report.md"
RENEW = "run dsv3 report --slow --output docs/report.md"
# A planned figure may move by so much before the page has to be written again.
TOLERANCE = 0.05


def lines(text: str) -> list[list[str]]:
    """Cells of the tables' rows."""
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) if " | " in line else [] for line in text.splitlines()
            if line.startswith("| ") and not line.startswith(("| ---", "| Figure"))]


def number(text: str) -> float | None:
    match = re.search(r"\d[\d,]*\.?\d*(e-?\d+)?", text)
    return float(match.group().replace(",", "")) if match else None


def stale(written: str, sections) -> list[str]:
    """Rows that the page does not have as they are today."""
    today, letters = page(sections), command_letters(sections)
    found = {(cells[0], cells[1]): cells for cells in lines(written)}
    wrong = []
    for row, cells in zip((row for section in sections for row in section.rows), lines(today), strict=True):
        there = found.get((cells[0], cells[1]))
        if there is None or there[2] != cells[2]:
            wrong.append(f"{cells[0]}: missing")
        elif row.verdict is Agreement.NOT_RUN:
            if "not computed" in there[4]:
                wrong.append(f"{cells[0]}: not computed")
        elif row.claim.is_estimate:
            was, now = number(there[3]), number(cells[3])
            moved = was is None or now is None or abs(was / now - 1) > TOLERANCE
            if there[3] != cells[3] and moved:
                wrong.append(f"{cells[0]}: {there[3]}, today {cells[3]}")
        elif row_line(row, letters) not in written:
            wrong.append(f"{cells[0]}: {there[3:5]}, today {cells[3:5]}")
    return wrong


@pytest.fixture(scope="module")
def sections():
    return judge_all(with_slow=False)


def test_the_page_is_current(sections) -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert stale(written, sections) == [], RENEW
    assert len(lines(written)) == sum(len(section.rows) for section in sections), RENEW
    counts = re.findall(r"^- \*\*(\d+) ([^.]*)\.\*\*$", written, re.MULTILINE)
    assert sum(int(number) for number, _ in counts) == len(lines(written))


def test_a_stale_row_is_found(sections) -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert stale(written.replace("671.03B", "672.03B"), sections)[0].startswith("all parameters")
    assert stale(written.replace("| hidden width |", "| hidden breadth |"), sections) == ["hidden width: missing"]
    moved = re.sub(r"(\| seconds of a step .*? \| 19\.926 s \| )[\d.]+ s", r"\g<1>25.0 s", written)
    assert stale(moved, sections)[0].startswith("seconds of a step: 25.0 s, today")


def test_a_row_says_what_there_is_to_say() -> None:
    claim = Claim("a | b", REPORT, "1", "4", lambda: 5.0, command="dsv3 plan --preset dsv3-671b --search",
                  why="They count otherwise.")
    section = JudgedSection("One", (judge(claim),))
    letters = command_letters([section])
    assert letters == {claim.command: "A"}
    assert row_line(section.rows[0], letters) == (
        r"| a \| b | report, 1 | 4 | 5 | apart by +25.0%. They count otherwise. | A |")
    assert as_json([section])["count"] == {"apart": 1}
    assert as_json([section])["sections"][0]["rows"][0]["distance"] == pytest.approx(0.25)
