"""What cannot be planned is refused with the rule, the values and a setting that works."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.schedule.plan import SCHEDULES, build_plan


@pytest.mark.parametrize(("schedule", "sizes", "message"), [
    ("dualpype", {}, "schedule='dualpype' must be one of 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev; "
                     "did you mean dualpipe?"),
    ("gpipe", {"num_ranks": 2}, "schedule='gpipe' must be one of"),
    ("1f1b", {"num_ranks": 0}, "pipeline_model_parallel_size=0 must be at least 1"),
    ("zbv", {"num_microbatches": 0}, "num_microbatches=0 must be at least 1"),
    ("dualpipe", {"num_ranks": 5}, "pipeline_model_parallel_size=5 must be even under schedule=dualpipe, whose "
                                   "ranks hold a stage before the middle of the model and one behind it; try 4 or 6, "
                                   "or schedule=dualpipev"),
    ("dualpipe", {"num_ranks": 1}, "pipeline_model_parallel_size=1 must be even under schedule=dualpipe, whose "
                                   "ranks hold a stage before the middle of the model and one behind it; try 2, or "
                                   "schedule=dualpipev"),
    ("dualpipe", {"num_microbatches": 1}, "num_microbatches=1 must be even under schedule=dualpipe, where half of "
                                          "them enter at each end; try num_microbatches=2"),
    ("dualpipe", {"num_microbatches": 11}, "num_microbatches=11 must be even under schedule=dualpipe, where half of "
                                           "them enter at each end; try num_microbatches=10 or 12"),
    ("interleaved", {"num_microbatches": 10}, "num_microbatches=10 must be a multiple of "
                                              "pipeline_model_parallel_size=4 under schedule=interleaved, as "
                                              "Megatron-Core requires; try num_microbatches=8 or 12"),
    ("interleaved", {"num_microbatches": 3}, "try num_microbatches=4"),
    ("interleaved", {"num_ranks": 1}, "pipeline_model_parallel_size=1 must be at least 2 under schedule=interleaved; "
                                      "try 2, or schedule=1f1b"),
    ("interleaved", {"virtual_stages": 1}, "virtual_stages=1 must be at least 2 under schedule=interleaved, which is "
                                           "1f1b with one; try 2, or use schedule=1f1b"),
    ("interleaved", {"virtual_stages": 0}, "virtual_stages=0 must be at least 2"),
    ("1f1b", {"virtual_stages": 2}, "virtual_stages=2 must be 1 under schedule=1f1b, whose ranks hold 1 stage each; "
                                    "leave it out, or use schedule=interleaved"),
    ("zbv", {"virtual_stages": 3}, "virtual_stages=3 must be 2 under schedule=zbv, whose ranks hold 2 stages each"),
    ("zb1p", {"is_overlapped": True}, "is_overlapped is an option of the interleaved schedule, not of schedule=zb1p"),
])
def test_what_cannot_be(schedule: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_plan(schedule, **{"num_ranks": 4, "num_microbatches": 8} | sizes)


@pytest.mark.parametrize(("schedule", "num_ranks", "wrong"), [
    ("dualpipe", 5, 12), ("dualpipe", 4, 7), ("dualpipe", 4, 1), ("interleaved", 4, 9),
    ("interleaved", 6, 1)])
def test_the_settings_it_proposes_work(schedule: str, num_ranks: int, wrong: int) -> None:
    with pytest.raises(ConfigError) as caught:
        build_plan(schedule, num_ranks=num_ranks, num_microbatches=wrong)
    field = "num_ranks" if "size=5 must be even" in str(caught.value) else "num_microbatches"
    proposed = re.findall(r"\d+", str(caught.value).rpartition("try ")[2].partition(", or")[0])
    assert proposed
    for value in proposed:
        build_plan(schedule, **{"num_ranks": num_ranks, "num_microbatches": wrong} | {field: int(value)})


def test_pure() -> None:
    """Planning, simulating and drawing need neither torch nor, until something is drawn, matplotlib."""
    code = ("import sys, dsv3_megatron.schedule.compare, dsv3_megatron.schedule.draw\n"
            "print([name for name in ('torch', 'megatron', 'matplotlib', 'numpy') if name in sys.modules])")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == "[]"


def test_every_schedule_on_one_rank_or_two() -> None:
    for schedule in SCHEDULES:
        ranks = 2 if schedule in ("dualpipe", "interleaved") else 1
        assert build_plan(schedule, num_ranks=ranks, num_microbatches=4).num_ranks == ranks
