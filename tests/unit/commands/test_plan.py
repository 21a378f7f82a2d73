"""`dsv3 plan`: its JSON, its text, its picture, and what it says to wrong input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from dsv3_megatron.commands import plan as command
from dsv3_megatron.config.load import parse_command
from tests.unit.commands.conftest import TOOLS

RUN = ("--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "64", "--global-batch-size", "512",
       "--pipeline-model-parallel-size", "4")


@pytest.fixture
def plan(capsys):

    def call(*flags):
        status = command.main([str(flag) for flag in flags])
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
    shown = {name: seconds for name, seconds in found["breakdown"].items() if not name.startswith("hidden")}
    assert sum(shown.values()) == pytest.approx(found["step_time_s"])
    assert found["sensitivity"]["bf16_flops"] < 0


def test_text_and_picture(plan, tmp_path) -> None:
    picture = tmp_path / "plan.png"
    status, out, _ = plan(*RUN, "--tokens", "1e12", "--png", picture)
    assert status == 0
    for line in ("dsv3-16b on 64 x h800, phase training: 512 sequences of 4096 tokens a step", "TP1 PP4 EP8 1f1b",
                 "modules (--transformer-impl", "where the step goes", "memory by pipeline rank, GB: fits",
                 "84.9 GB visible less 5.1 GB headroom (CUDA context", "the run", "total", "a checkpoint takes",
                 "what 10% more of each does to the step time"):
        assert line in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_failures(plan) -> None:
    flags = (*RUN, "--tokens", "1e12", "--price-per-gpu-hour", "2", "--mtbf-hours-per-gpu", "45600")
    status, out, _ = plan(*flags, "--storage-gb-per-second", "10", "--json")
    found = json.loads(out)
    goodput = found["goodput"]
    assert status == 0 and goodput["training_days"] == pytest.approx(found["total"]["days"])
    assert goodput["checkpoint_seconds"] == pytest.approx(found["checkpoint_bytes"] / 10e9)
    assert goodput["days"] == pytest.approx(goodput["training_days"] / goodput["effective_training_time"])
    assert goodput["price"] == pytest.approx(2 * 64 * 24 * goodput["days"])
    status, out, _ = plan(*flags, "--checkpoint-seconds", "30", "--restart-seconds", "600")
    assert status == 0 and "effective training time" in out
    status, _, err = plan(*flags)
    assert status == 2 and "--checkpoint-seconds is not given" in err
    status, _, err = plan(*RUN, "--spares", "4")
    assert status == 2 and "--spares says what a failure costs, and --mtbf-hours-per-gpu is not given" in err


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
    assert status == 0 and "DOES NOT FIT" in out  # an answer


@pytest.mark.parametrize(("flags", "message"), [
    ((), "--hardware must be given"),
    (("--hardware", "h800"), "--num-gpus must be given"),
    (("--hardware", "abacus", "--num-gpus", "8"), "hardware='abacus' is not known; choose one of h800"),
    (("--hardware", "h800", "--num-gpus", "0"), "--num-gpus=0 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "100", "--preset", "dsv3-671b"), "must divide world_size=100"),
    (("--hardware", "a100", "--num-gpus", "4", "--fp8", "blockwise"), "hardware=a100 has no fp8 products"),
    (("--hardware", "h800", "--num-gpus", "8", "--imbalance", "0.5"),
     "--imbalance=0.5 must be at least 1, which is balance, and at most 10000"),
    (("--hardware", "h800", "--num-gpus", "8", "--top", "0"), "--top=0 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "8", "--png", "plan.jpg"), "--png=plan.jpg must end with .png"),
    (("--hardware", "h800", "--num-gpus", "4", "--tokens", "-1"), "--tokens=-1 must be at least 1"),
    (("--hardware", "h800", "--num-gpus", "8", "--sched", "x"), "--sched is not a flag"),
    (("--calibrate", "nowhere"), "--calibrate=nowhere has no config.json"),
])
def test_wrong_input(plan, flags, message: str) -> None:
    status, out, err = plan(*flags)
    assert status == 2 and out == "" and message in err


@pytest.mark.parametrize("flag", ["--imbalance", "--tokens", "--price-per-gpu-hour", "--memory-headroom-gb",
                                  "--num-gpus"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e308", "1e400", "-1"])
def test_numbers_that_cannot_be(plan, flag: str, number: str) -> None:
    given = () if flag == "--num-gpus" else ("--num-gpus", "8")
    status, out, err = plan("--preset", "tiny", "--hardware", "h800", *given, f"{flag}={number}", "--json")
    assert status == 2 and out == "" and (f"{flag}=" in err or f"argument {flag}: invalid" in err)


def test_a_headroom_that_is_given_decides_what_fits(plan) -> None:
    peak = max(json.loads(plan(*RUN, "--json")[1])["peak_memory_bytes"])
    for spare, fits in ((0.1e9, True), (-0.1e9, False)):
        headroom = (84943110144 - peak - spare) / 1e9
        found = json.loads(plan(*RUN, "--json", "--memory-headroom-gb", headroom)[1])
        assert found["fits"] is fits
        assert found["memory_usable_bytes"] == pytest.approx(peak + spare)
        assert found["memory_headroom_bytes"] == {"as given": pytest.approx(headroom * 1e9)}
    # The search keeps to it too: what the memory of two devices' difference does not hold is rejected.
    wide, narrow = (json.loads(plan("--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "16",
                                    "--global-batch-size", "512", "--search", "--top", "1", "--json",
                                    "--memory-headroom-gb", headroom)[1])["search"] for headroom in (0, 50))
    assert wide["ranked"][0]["peak_memory_bytes"] <= 84943110144
    assert narrow["ranked"][0]["peak_memory_bytes"] <= 84943110144 - 50e9


def test_the_default_headroom_is_the_sum_of_its_parts(plan) -> None:
    found = json.loads(plan(*RUN, "--json")[1])
    assert set(found["memory_headroom_bytes"]) == {"CUDA context and libraries", "NCCL buffers", "fragmentation"}
    assert found["memory_usable_bytes"] == found["memory_visible_bytes"] - sum(found["memory_headroom_bytes"].values())
    assert {"context_bytes", "nccl_bytes", "fragmentation_share"} <= set(found["unverified"])


def replaced(command: tuple[str, ...], flags: str) -> list[str]:
    """A command with flags in the place of its own of the same names, as a flag may be given once."""
    pasted = shlex.split(flags)
    kept: list[str] = []
    for word in command:
        if word.startswith("--"):
            is_kept = word not in pasted and word.replace("--", "--no-", 1) not in pasted
        if is_kept:
            kept.append(word)
    return [*kept, *pasted]


@pytest.mark.parametrize("given", [
    (), ("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "--pipeline-model-parallel-size",
         "4", "--pipeline-model-parallel-layout", "Et*6|t*7|t*7|t*7mL", "--micro-batch-size", "2"),
    ("--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2", "--pipeline-schedule",
     "interleaved", "--overlap-moe-expert-parallel-comm")], ids=["preset", "recomputing", "interleaved"])
def test_flags_of_the_ranking_can_be_pasted(plan, given: tuple[str, ...]) -> None:
    """Each place's flags, in the place of the command's own, are a run that may start, in the layout it names."""
    command = ("--preset", "dsv3-16b", "--global-batch-size", "512", *given)
    status, out, err = plan(*command, "--hardware", "h800", "--num-gpus", "64", "--search", "--top", "12", "--json")
    assert status == 0, err
    ranked = json.loads(out)["search"]["ranked"]
    assert len(ranked) == 12 and len({place["flags"] for place in ranked}) == 12
    for place in ranked:
        pasted = replaced(command, place["flags"])
        run = parse_command([*pasted, "--check-only", "--world-size", "64"]).run
        run.validate(64)
        parallel = run.parallel
        assert (parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size,
                parallel.expert_model_parallel_size, run.training.micro_batch_size, run.training.recompute_granularity
                ) == (place["pp"], place["tp"], place["ep"], place["micro_batch_size"], place["recompute"])
        assert parallel.schedule == place["schedule"] or place["pp"] == 1
        # Planned as pasted, it is what the ranking says.
        again = json.loads(plan(*pasted, "--hardware", "h800", "--num-gpus", "64", "--json")[1])
        assert again["step_time_s"] == pytest.approx(place["step_time_s"])
        assert max(again["peak_memory_bytes"]) == place["peak_memory_bytes"] and again["fits"]


def test_the_ranking_comes_first(plan) -> None:
    out = plan("--preset", "dsv3-16b", "--global-batch-size", "512", "--hardware", "h800", "--num-gpus", "64",
               "--search", "--top", "2")[1]
    lines = out.splitlines()
    assert lines[0].startswith("search: ") and "take a place's flags in place of the run's own" in lines[0]
    assert lines[3].strip().startswith("--tensor-model-parallel-size ")


def test_remedies_are_flags_that_the_run_takes(plan) -> None:
    command = ("--preset", "dsv3-16b", "--global-batch-size", "512", "--micro-batch-size", "16")
    found = json.loads(plan(*command, "--hardware", "h800", "--num-gpus", "8", "--tokens", "1e9", "--json")[1])
    remedies = [line.rpartition(": ")[0] for line in found["memory_remedies"] if line.startswith("--")]
    assert remedies
    for flags in remedies:
        parse_command(replaced(command, flags)).run.validate(8)


def test_the_command_needs_no_torch() -> None:
    """A laptop asks about 2048 devices without loading what trains on them."""
    code = ("import runpy, sys; sys.argv = ['plan_run.py', '--preset', 'tiny', '--hardware', 'h800', '--num-gpus', "
            "'4', '--json']\ntry:\n    runpy.run_path('plan_run.py', run_name='__main__')\nexcept SystemExit as end:\n"
            "    assert end.code == 0, end.code\nassert 'torch' not in sys.modules and 'megatron' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=TOOLS, check=True, capture_output=True, timeout=60)
