"""tools/plan_run.py: its JSON, its text, its picture, and what it says to wrong input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.unit.tools.conftest import TOOLS, load_tool

RUN = ("--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "64", "--global-batch-size", "512",
       "--pipeline-model-parallel-size", "4")


@pytest.fixture
def plan(capsys):
    tool = load_tool("plan_run")

    def call(*flags):
        status = tool.main([str(flag) for flag in flags])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_json(plan) -> None:
    status, out, err = plan(*RUN, "--json", "--tokens", "1e12", "--price-per-gpu-hour", "2")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert {"gpu_hours_per_trillion_tokens", "step_time_s", "tokens_per_second", "mfu_causal", "mfu_non_causal",
            "peak_memory_bytes", "fits", "breakdown"} <= set(found)
    assert len(found["peak_memory_bytes"]) == 4 and found["fits"] is True
    assert found["tokens_per_second"] == pytest.approx(512 * 4096 / found["step_time_s"])
    assert found["gpu_hours_per_trillion_tokens"] == pytest.approx(1e12 / found["tokens_per_second"] * 64 / 3600)
    assert found["total"]["gpu_hours"] == pytest.approx(found["gpu_hours_per_trillion_tokens"])
    assert found["total"]["price"] == pytest.approx(2 * found["total"]["gpu_hours"])
    shown = {name: seconds for name, seconds in found["breakdown"].items() if name != "hidden_all_to_all"}
    assert sum(shown.values()) == pytest.approx(found["step_time_s"])
    assert found["sensitivity"]["bf16_flops"] < 0


def test_text_and_picture(plan, tmp_path) -> None:
    picture = tmp_path / "plan.png"
    status, out, _ = plan(*RUN, "--tokens", "1e12", "--png", picture)
    assert status == 0
    for line in ("dsv3-16b on 64 x h800, phase training: 512 sequences of 4096 tokens a step", "PP4 EP8 1f1b",
                 "where the step goes", "memory by pipeline rank, GB of 84.9: fits", "the run", "total",
                 "what 10% more of each does to the step time"):
        assert line in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_search(plan) -> None:
    status, out, _ = plan("--preset", "laptop", "--hardware", "h800", "--num-gpus", "8", "--global-batch-size", "32",
                          "--search", "--top", "3", "--json")
    found = json.loads(out)["search"]
    assert status == 0 and len(found["ranked"]) == 3
    times = [layout["step_time_s"] for layout in found["ranked"]]
    assert times == sorted(times)
    assert found["num_layouts"] == 3 + sum(rejected["count"] for rejected in found["rejected"])
    assert {rejected["kind"] for rejected in found["rejected"]} == {"rule", "slower"}


def test_a_run_that_does_not_fit(plan) -> None:
    status, out, _ = plan("--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "8", "--global-batch-size",
                          "512", "--micro-batch-size", "16", "--tokens", "1e9")
    assert status == 1 and "DOES NOT FIT" in out


@pytest.mark.parametrize(("flags", "message"), [
    ((), "--hardware must be given"),
    (("--hardware", "h800"), "--num-gpus must be given"),
    (("--hardware", "abacus", "--num-gpus", "8"), "hardware='abacus' is not known; choose one of h800"),
    (("--hardware", "h800", "--num-gpus", "0"), "--num-gpus=0 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "100", "--preset", "dsv3-671b"), "must divide world_size=100"),
    (("--hardware", "a100", "--num-gpus", "4", "--fp8", "blockwise"), "hardware=a100 has no fp8 products"),
    (("--hardware", "h800", "--num-gpus", "8", "--imbalance", "0.5"), "--imbalance=0.5 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "8", "--top", "0"), "--top=0 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "8", "--png", "plan.jpg"), "--png=plan.jpg must end with .png"),
    (("--hardware", "h800", "--num-gpus", "4", "--tokens", "-1"), "--tokens=-1 must be greater than 0"),
    (("--hardware", "h800", "--num-gpus", "8", "--sched", "x"), "--sched is not a flag"),
    (("--calibrate", "nowhere"), "--calibrate=nowhere has no config.json"),
])
def test_wrong_input(plan, flags, message: str) -> None:
    status, out, err = plan(*flags)
    assert status == 2 and out == "" and message in err


def test_the_command_needs_no_torch() -> None:
    """A laptop asks about 2048 devices without loading what trains on them."""
    code = ("import runpy, sys; sys.argv = ['plan_run.py', '--preset', 'tiny', '--hardware', 'h800', '--num-gpus', "
            "'4', '--json']\ntry:\n    runpy.run_path('plan_run.py', run_name='__main__')\nexcept SystemExit as end:\n"
            "    assert end.code == 0, end.code\nassert 'torch' not in sys.modules and 'megatron' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=TOOLS, check=True, capture_output=True, timeout=60)
