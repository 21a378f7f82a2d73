"""What is told of a guard's decisions."""

from __future__ import annotations

from pathlib import Path

from dsv3_megatron.guards.events import Event, report
from tests.unit.guards.judged import SPIKE, guard


def checkpoints(folder: Path, *iterations: int) -> str:
    """A folder that looks like that of a run with these checkpoints."""
    for iteration in iterations:
        (folder / f"iter_{iteration:07d}").mkdir()
        (folder / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return str(folder)


def test_the_report_says_what_fired_and_what_to_do(tmp_path: Path) -> None:
    made = guard(on_spike="rollback", max_rollbacks=0)
    made.decide(SPIKE, 9.0, 1.0)
    event = Event(12, "spike", "ended the run", ("lm loss 9 exceeds 2.25",), (44, 47), (), 9.0, 1.0)
    assert f"Nothing was saved in {tmp_path}." in report(made, [event], str(tmp_path))
    save = checkpoints(tmp_path, 4, 8)
    text = report(made, [event], save)
    for sign in ("a spike after 0 rollbacks (max_rollbacks=0)", "1 updates left out, 1 spikes, 0 rollbacks",
                 "iteration 12: lm loss 9 exceeds 2.25: ended the run; samples 44 to 47", "4 good steps",
                 "lm loss    2 2 2 2", f"the newest checkpoint in {save} is that of iteration 8. It is the "
                 "last one before the spikes"):
        assert sign in text
    made.counters.jumps.append((16, 28))
    assert "samples that rollbacks jumped over: 16 to 27" in report(made, [event], save)
    made.counters.consecutive_skips = 6
    assert (f"If a resumed run ends the same way, go back to an earlier one (write 4 into {save}/"
            "latest_checkpointed_iteration.txt)") in report(made, [event], save)
    assert "Nothing was saved: save is not set." in report(made, [], None)
