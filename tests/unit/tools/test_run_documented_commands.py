"""The runner of documented commands: what it reads from a planted page, runs, leaves out and finds to fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import run_documented_commands
from tools.run_documented_commands import Command, Outcome, Workplace, all_pages, commands, make_room, smaller

PAGE = """# A page

```
WORD=kept
TOLD=yes python -c 'import os; open("a.txt", "w").write(os.environ["TOLD"])'
python -c 'print(open("a.txt").read()); \\
raise SystemExit("$WORD" != "kept")'
python -c 'print("the last line"); raise SystemExit(3)' | cat
sbatch job.sbatch
no-such-program
```

```text
python -c 'raise SystemExit(1)'
```
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A place to run pages whose inputs are an empty folder."""
    workplace = Workplace(tmp_path / "work", 60, run_documented_commands.NOT_RUN)
    workplace.inputs = tmp_path / "inputs"
    workplace.inputs.mkdir()
    return workplace


def test_a_planted_page_is_run_in_order(workplace: Workplace) -> None:
    """Variables, what an earlier command wrote, an exit code, a program that is missing, and output that is none."""
    told: list[tuple[Command, Outcome]] = []
    workplace.page(Path("page.md"), PAGE, lambda command, outcome: told.append((command, outcome)))
    assert [outcome.kind for _, outcome in told] == ["ran", "ran", "failed", "not run", "failed"]
    assert "exit code 3" in told[2][1].said and "the last line" in told[2][1].said
    assert told[3][1].said == "needs Slurm"
    assert "cannot be started" in told[4][1].said and "no-such-program" in told[4][1].said


def test_a_command_that_does_not_end_is_ended(workplace: Workplace) -> None:
    """It fails, and the page goes on."""
    workplace.timeout_s = 0.5
    outcome = workplace.run(Command(["python", "-c", "import time; time.sleep(60)"]), workplace.folder)
    assert outcome.kind == "failed" and outcome.seconds < 30
    assert "none within" in outcome.said


def test_a_failing_page_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The counts are said at the end."""
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(run_documented_commands, "ROOT", tmp_path)
    monkeypatch.setattr(Workplace, "make_inputs", lambda self: tmp_path)
    assert run_documented_commands.main(["page.md"]) == 1
    assert "2 ran, 2 failed, 1 not run" in capsys.readouterr().out
    (tmp_path / "page.md").write_text("```\npython -c pass\n```\n")
    assert run_documented_commands.main(["page.md"]) == 0


@pytest.mark.parametrize(("line", "run"), [
    ("bash examples/pretrain_dsv3.sh --preset tiny --train-iters 20",
     ["bash examples/pretrain_dsv3.sh --preset tiny --train-iters 2 --lr-warmup-iters 1 --eval-iters 1"]),
    ("bash examples/pretrain_dsv3.sh --preset laptop --print-model",
     ["bash examples/pretrain_dsv3.sh --preset laptop --print-model"]),
    ("dsv3 preprocess --shard 3/64 --append-eod",
     ["dsv3 preprocess --shard 1/2 --append-eod", "dsv3 preprocess --shard 2/2 --append-eod"]),
])
def test_commands_are_made_smaller(line: str, run: list[str]) -> None:
    """Only those that train are shortened, and a part of a dataset has its other parts."""
    assert smaller(line.split()) == [words.split() for words in run]


def test_only_what_a_command_writes_makes_room(tmp_path: Path) -> None:
    """A folder that is read, a run that is resumed and parts to be merged stay."""
    for name in ("tokenizer", "checkpoints", "data"):
        (tmp_path / name).mkdir()
    for name in ("c_text_document.bin", "c_text_document.shard-1-of-2.bin", "d_text_document.bin"):
        (tmp_path / "data" / name).touch()
    make_room("x --tokenizer-model tokenizer --save checkpoints --load checkpoints".split(), tmp_path)
    make_room("x --output-prefix data/c".split(), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "c_text_document.shard-1-of-2.bin", "checkpoints", "d_text_document.bin", "data", "tokenizer"]
    make_room("x --save checkpoints --load converted".split(), tmp_path)
    make_room("x --output tokenizer".split(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_every_reason_and_change_is_of_a_command_shown() -> None:
    """A line of the two tables that no page needs any longer is found."""
    shown = [str(command) for page in all_pages()
             for command in commands((run_documented_commands.ROOT / page).read_text(encoding="utf-8"))]
    assert len(shown) > 60
    for pattern, *_ in [*run_documented_commands.NOT_RUN, *run_documented_commands.SMALLER]:
        assert any(re.match(pattern, text) for text in shown), pattern
