"""`dsv3 simulate`: its JSON, its text, its files, and what it says to wrong input."""

from __future__ import annotations

import json

import pytest

from dsv3_megatron.commands import simulate as command


@pytest.fixture
def simulate(capsys):

    def call(*flags, schedule="dualpipe", ranks=4, microbatches=8):
        named = ["--schedule", schedule] if schedule else []
        status = command.main([*named, "--pipeline-model-parallel-size", str(ranks), "--num-microbatches",
                            str(microbatches), *map(str, flags)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_json_of_dualpipe(simulate) -> None:
    status, out, err = simulate("--json", "--cost-f", 1, "--cost-b", 2, "--cost-w", 1, "--cost-fb", 3, "--cost-p2p", 0)
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "schedule": "dualpipe", "num_ranks": 4, "num_stages": 4, "num_microbatches": 8, "step_time": 26,
        "ideal_time": 24, "bubble": [2, 2, 2, 2], "peak_activations": [5, 5, 5, 5], "parameters": [2, 2, 2, 2]}


@pytest.mark.parametrize(("schedule", "bubble", "peak", "parameters"), [
    ("1f1b", 21, [8, 7, 6, 5, 4, 3, 2, 1], 1), ("zb1p", 7, [8] * 8, 1), ("dualpipe", 6, [9] * 8, 2),
    ("dualpipev", 14, [17] * 8, 2), ("zbv", 7, [16] * 8, 2), ("interleaved", 21, list(range(23, 8, -2)), 2)])
def test_published_numbers(simulate, schedule: str, bubble: int, peak: list[int], parameters: int) -> None:
    """Default costs; of the V-shaped ones P is half of the stages PP."""
    found = json.loads(simulate("--json", schedule=schedule, ranks=8, microbatches=24)[1])
    assert found["bubble"] == [bubble] * 8 and found["step_time"] - found["ideal_time"] == bubble
    assert found["peak_activations"] == peak and found["parameters"] == [parameters] * 8


def test_costs_are_exact(simulate) -> None:
    """Tenths, of which a sum of floats would miss the formula by an ulp."""
    found = json.loads(simulate("--json", "--cost-f", "0.1", "--cost-b", "0.3", "--cost-w", "0.1", "--cost-fb", "0.4",
                                schedule="1f1b")[1])
    assert found["bubble"] == [1.2] * 4 and found["step_time"] == 4.4


def test_actions(simulate) -> None:
    actions = json.loads(simulate("--json", "--actions", schedule="dualpipev", ranks=2, microbatches=4)[1])["actions"]
    assert actions[0][:5] == [{"op": "F", "chunk": c, "mb": m} for c, m in ((0, 0), (0, 1), (0, 2), (1, 0))] + [
        {"op": "I", "chunk": 1, "mb": 0}]
    assert {"op": "FB", "f": {"op": "F", "chunk": 0, "mb": 3}, "b": {"op": "B", "chunk": 1, "mb": 1}} in actions[0]
    status, out, _ = simulate("--actions", schedule="dualpipev", ranks=2, microbatches=4)
    assert status == 0 and "rank 0: F0.0  F0.1  F0.2  F1.0  I1.0  W1.0  F1.1  F0.3&B1.1  F1.2&B0.0" in out


def test_text(simulate) -> None:
    status, out, _ = simulate("--cost-fb", "2.5", ranks=8, microbatches=24)
    assert status == 0
    assert "bubble      4.5" in out and "published formula: 4.5" in out
    assert out.splitlines()[-8].split() == ["0", "3", "9", "2"]
    assert "does not hold" in simulate("--cost-f", 3, schedule="zbv")[1]
    assert "published formula without transfers: 2" in simulate("--cost-p2p", "0.5")[1]


def test_compare(simulate) -> None:
    status, out, _ = simulate("--compare", "--cost-fb", "2.4", schedule=None, ranks=8, microbatches=32)
    assert status == 0
    rows = out.partition("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1f1b", *["interleaved"] * 4, "zb1p", "zbv", "dualpipe", "dualpipev"]
    assert "Recommended: interleaved V=4 with pairs has the shortest step, 85.8, 26.7% less than 1f1b." in out

    found = json.loads(simulate("--compare", "--json", "--virtual-stages", 8, schedule="1f1b", ranks=3,
                                microbatches=6)[1])
    assert found["schedule"] == "1f1b" and len(found["bubble"]) == 3
    by_name = {(row["schedule"], row["virtual_stages"]): row for row in found["comparison"]}
    assert "must be even" in by_name["dualpipe", None]["problem"]
    assert by_name["interleaved", 8]["bubble"] == 0.75
    assert found["recommended"]["step_time"] == min(
        row["step_time"] for row in found["comparison"] if "problem" not in row)


def test_files(simulate, tmp_path) -> None:
    status, _, _ = simulate("--png", tmp_path / "a.png", "--trace", tmp_path / "a.json", schedule="1f1b", ranks=2,
                            microbatches=2)
    assert status == 0 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    status, out, err = simulate("--json", "--trace", tmp_path / "missing" / "a.json")
    assert status == 2 and out == "" and "missing does not exist; make it first" in err
    status, out, err = simulate("--png", tmp_path / "missing" / "a.png")
    assert status == 2 and out == "" and "missing does not exist; make it first" in err


@pytest.mark.parametrize(("flags", "sizes", "message"), [
    ((), {"ranks": 5}, "pipeline_model_parallel_size=5 must be even under schedule=dualpipe"),
    ((), {"microbatches": 9}, "try num_microbatches=8 or 10"),
    ((), {"schedule": "interleaved", "microbatches": 6}, "try num_microbatches=4 or 8"),
    ((), {"schedule": "gpipe"}, "schedule='gpipe' must be one of 1f1b, interleaved"),
    ((), {"schedule": None}, "schedule must be given: one of 1f1b"),
    (("--virtual-stages", 3), {}, "virtual_stages=3 must be 2 under schedule=dualpipe"),
    (("--virtual-stages", 1, "--compare"), {"schedule": "1f1b"}, "virtual_stages=1 must be at least 2"),
    (("--cost-f", 0), {}, "cost_f=0 must be greater than 0; try 1"),
    (("--cost-b", -1), {}, "cost_b=-1 must be greater than 0"),
    (("--cost-w", 2), {}, "cost_w=2 must be less than cost_b=2, of which it is a part; try 1"),
    (("--cost-fb", 1), {}, "cost_fb=1 must be at least 2"),
    (("--cost-p2p", -1), {}, "cost_p2p=-1 must not be negative"),
    ((), {"ranks": 10 ** 6, "microbatches": 10 ** 6}, "more than the 2000000 that are simulated one by one"),
])
def test_wrong_input(simulate, flags, sizes, message: str) -> None:
    status, out, err = simulate(*flags, **sizes)
    assert status == 2 and out == "" and err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_a_cost_that_is_no_number(simulate, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulate("--cost-f", "nan")
    assert stopped.value.code == 2 and "'nan' is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("cost", ["nan", "inf", "-inf", "1e400", "1e999999999", "-1e999999999", "1e-999999999", "1/0",
                                  "1e31/1", "1/1e31", "x", "", "1/2/3", "9" * 5000])
def test_costs_that_are_no_numbers_or_beyond_all_measure(simulate, cost: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        simulate(f"--cost-f={cost}")
