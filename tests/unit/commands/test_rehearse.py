"""`dsv3 rehearse` on the tiny model and a world of 8: what it sees of a sound run, and faults that are planted.

A rank's process takes some ten seconds, most of them imports; so one rehearsal serves several tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.commands.rehearse import _parse_arguments, main
from dsv3_megatron.commands.rehearse import rehearse as rehearse_ranks_of
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.rehearsal.findings import Rehearsal, as_text
from dsv3_megatron.rehearsal.totals import totals, work_of_step

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ("--preset", "tiny", "--micro-batch-size", "1", "--pipeline-model-parallel-size", "2",
         "--expert-model-parallel-size", "2", "--global-batch-size", "16")
COMMAND = ["--world-size", "8", *FLAGS]
# Micro-batches of the step: 1.5 times the pipeline's ranks.
NUM_MICROBATCHES = 3
# Of either stage, with the MTP module of the last.
NUM_MOE_LAYERS = 2


def rehearse(*words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-m", "dsv3_megatron", "rehearse", *words, "--json"], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def sound() -> tuple[int, dict[str, Any]]:
    """Ranks of both pipeline positions, two steps."""
    return rehearse(*COMMAND, "--ranks", "0", "4", "--imbalance", "1.5", "--ema-decay", "0.999", "--processes", "1",
                    "--save-and-resume")


@pytest.mark.slow
def test_a_sound_run_has_nothing_found(sound: tuple[int, dict[str, Any]]) -> None:
    code, report = sound
    assert report["found"] == [] and code == 0
    assert (report["num_microbatches"], report["run_microbatches"]) == (NUM_MICROBATCHES, 4)
    assert [(rank["pipeline_rank"], rank["expert_rank"]) for rank in report["ranks"]] == [(0, 0), (1, 0)]


@pytest.mark.slow
def test_states_are_the_planners_to_the_byte_and_passes_nearly(sound: tuple[int, dict[str, Any]]) -> None:
    for rank in sound[1]["ranks"]:
        parts = {part["name"]: part for part in rank["components"]}
        assert list(parts) == ["parameters", "gradients", "optimizer", "buffers", "FP8 weights", "activations",
                               "working", "communication"], "the planner's, line by line"
        assert sum(part["bytes"] for part in parts.values()) == rank["peak_bytes"]
        assert sum(part["planned_bytes"] for part in parts.values()) == rank["planned_peak_bytes"]
        for name in ("parameters", "gradients"):
            assert parts[name]["bytes"] == parts[name]["planned_bytes"] > 0
        # Shards are padded, and AdamW counts its steps in a number on the device for each parameter.
        assert abs(parts["optimizer"]["bytes"] - parts["optimizer"]["planned_bytes"]) < 4096
        assert rank["peak_bytes"] == pytest.approx(rank["planned_peak_bytes"], rel=0.02)
        assert rank["peak_bytes"] <= rank["allocated_bytes"] < rank["peak_bytes"] * 1.02
        assert sum(line["bytes"] for line in rank["lines"]) <= rank["peak_bytes"]


@pytest.mark.slow
def test_messages_waits_and_kernels_are_counted(sound: tuple[int, dict[str, Any]]) -> None:
    for rank in sound[1]["ranks"]:
        count = {}
        for row in (row for row in rank["messages"] if row["phase"] == "step"):
            count[row["operation"]] = count.get(row["operation"], 0) + row["count"]
        assert count["send"] == count["receive"] == NUM_MICROBATCHES
        # Two MoE layers a stage, forward and backward; rows go and come, and their gates go.
        assert count["all_to_all"] % (2 * NUM_MICROBATCHES) == 0
        waits = {(wait["what"], wait["line"].partition(":")[0]): wait["count"] for wait in rank["waits"]}
        assert waits["a number is read", "schedule/forward_backward.py"] == 1
        assert sum(rank["launches"].values()) > 1000 and rank["launches"]["mm"] > 50
        assert rank["new_group_calls"] >= 5 and rank["groups"] > rank["groups_alone"]
        assert rank["moe_passes"] == NUM_MOE_LAYERS * NUM_MICROBATCHES and not rank["is_first_step"]
        sums = rank["totals"]
        assert sums["host_waits"] == sum(wait["count"] for wait in rank["waits"])
        assert sums["messages_by_kind"]["send over 2"]["count"] == NUM_MICROBATCHES
        # Rotary tables are made by the first step, once for a length; a later one has nothing of it.
        once = {wait["line"].partition(":")[0] for wait in rank["made_once"]}
        assert once == {"model/rotary.py"} and not any(file == "model/rotary.py" for _, file in waits)


@pytest.mark.slow
def test_a_checkpoint_is_saved_and_resumed(sound: tuple[int, dict[str, Any]]) -> None:
    for rank in sound[1]["ranks"]:
        peaks = rank["peak_bytes_by_phase"]
        assert list(peaks) == ["building", "first step", "step", "saving", "resuming"]
        state = sum(part["bytes"] for part in rank["components"][:3])
        # Saving gathers the optimizer's state on every rank, a bucket at a time.
        assert state < peaks["saving"] < peaks["step"]
        phases: dict[str, set[str]] = {}
        for row in rank["messages"]:
            phases.setdefault(row["phase"], set()).add(row["operation"])
        assert {"all_gather", "gather of objects", "broadcast of objects"} <= phases["saving"]
        assert {"broadcast", "all_gather of objects"} <= phases["resuming"]
        # Four ranks have the dense part and two each of the experts; they share the writing, whole tensors each. Of a
        # parameter there are bf16 and fp32 weights, two fp32 moments and a moving average.
        number = next(part["bytes"] for part in rank["components"] if part["name"] == "parameters") / 2
        assert number * 18 / 8 < rank["saved_bytes"] < number * 18 / 2


# All faults at once, those of one rank in rank 4; each is looked for in its own test.
PLANTED = '''
import sys

sys.path.insert(0, ROOT)
import torch
from dsv3_megatron.rehearsal.forked_ranks import main

kept = []


def plant(task):
    from dsv3_megatron.model.experts import GroupedExperts
    from dsv3_megatron.runs.trainer import Trainer

    mean, forward, reduce = Trainer._mean_balance_loss, GroupedExperts.forward, torch.distributed.all_reduce

    def with_host_tensor(self, *args):
        torch.distributed.all_reduce(torch.zeros(3), group=self.groups.dp)
        return mean(self, *args)

    def with_other_dtype(tensor, *args, **kwargs):
        return reduce(tensor.long() if tensor.dtype == torch.int32 else tensor, *args, **kwargs)

    def allocates_twice_and_reads(self, x, *args):
        x.sum().item()
        kept.append(x.repeat(32, 1))
        return forward(self, x, *args)

    def moves_to_the_host(self, x, *args):
        return forward(self, x.cpu(), *args)

    if task.rank == 3:
        GroupedExperts.forward = moves_to_the_host
    elif task.rank == 7:
        raise MemoryError("this rank's process dies")
    else:
        GroupedExperts.forward = allocates_twice_and_reads
        Trainer._mean_balance_loss = with_host_tensor
    if task.rank == 4:
        Trainer._agree_to_stop = lambda self: 0
        torch.distributed.all_reduce = with_other_dtype


sys.exit(main(sys.argv[1:], plant))
'''


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    script = tmp_path_factory.mktemp("faults") / "planted.py"
    script.write_text(PLANTED.replace("ROOT", repr(str(ROOT))))
    options, flags = _parse_arguments([*COMMAND, "--ranks", "0", "3", "4", "7", "--imbalance", "1.5", "--processes",
                                       "1", "--num-steps", "1"])
    return rehearse_ranks_of(options, flags, command=[str(script)])


@pytest.mark.slow
def test_a_tensor_of_the_host_given_to_a_collective_is_found(faulty: Rehearsal) -> None:
    assert any(text.startswith("rank 0: all_reduce of a tensor of the cpu (3,): NCCL takes a GPU's alone\n"
                               "      at runs/learner.py:") for text in faulty.findings())


@pytest.mark.slow
def test_a_rank_that_skips_an_all_reduce_is_found(faulty: Rehearsal) -> None:
    (found,) = [text for text in faulty.findings() if "the group of 8 ranks (0, 1, ... 7)" in text]
    assert "rank 0: all_reduce of 1 elements, int64 at runs/trainer.py:" in found
    assert "one of them posts fewer" in found and "rank 4: nothing more" in found
    assert found in as_text(faulty)


@pytest.mark.slow
def test_a_tensor_of_another_dtype_is_found(faulty: Rehearsal) -> None:
    (found,) = [text for text in faulty.findings() if ": other dtypes\n" in text]
    assert "the group of 2 ranks (0, 4" in found
    assert "rank 0: all_reduce of 1 elements, int32 at schedule/forward_backward.py:" in found
    assert "rank 4: all_reduce of 1 elements, int64 at schedule/forward_backward.py:" in found


@pytest.mark.slow
def test_a_layer_that_allocates_twice_is_found(faulty: Rehearsal) -> None:
    assert any(text.startswith("rank 0: the peak is +") and "something that the other has not" in text
               for text in faulty.findings())
    largest = max((line for line in faulty.ranks[0].step.lines if line[2] in ("activations", "working")),
                  key=lambda line: line[3])
    assert largest[0].startswith("model/stage/"), "the line that called what was planted"
    assert f"{largest[0]}  {largest[1]}" in as_text(faulty)


@pytest.mark.slow
def test_a_number_read_in_a_layer_is_found(faulty: Rehearsal, sound: tuple[int, dict[str, Any]]) -> None:
    def reads(waits: Iterable[tuple[str, str, int]]) -> int:
        return sum(count for what, line, count in waits
                   if what == "a number is read" and line.startswith("model/stage"))

    before = [(wait["what"], wait["line"], wait["count"]) for wait in sound[1]["ranks"][0]["waits"]]
    assert reads(before) == 0
    assert reads(work_of_step(faulty.ranks[0]).waits) == NUM_MOE_LAYERS * NUM_MICROBATCHES
    assert ", 1 a micro-batch and MoE layer" in as_text(faulty)


@pytest.mark.slow
def test_an_error_of_the_gpus_branch_is_told_with_its_lines_and_what_was_seen_before_it(faulty: Rehearsal) -> None:
    rank = faulty.ranks[1]
    assert rank.failure is not None and "cpu" in rank.failure and "model/experts.py:" in rank.failure
    assert any(text.startswith("rank 3 ends in an error: ") for text in faulty.findings())
    assert os.environ.get("RANK") is None, "the rehearsal's variables are its processes' alone"
    assert rank.failed_in == "first step" and (rank.pipeline_rank, rank.expert_rank) == (0, 1)
    state = sum(rank.step.components[name] for name in ("parameters", "gradients"))
    assert rank.step.peak > state > 0 and rank.built_bytes > 0, "as far as it came"
    sums = totals(rank)
    assert sums["launches"] > 10 and sums["host_waits"] > 0 and sums["messages"] > 0
    text = as_text(faulty)
    assert "  ended in an error in first step, see below; so far:\n  peak " in text


@pytest.mark.slow
def test_a_rank_whose_process_dies_costs_the_others_nothing(faulty: Rehearsal) -> None:
    assert faulty.ranks[3].failure is not None and not faulty.ranks[3].peaks
    assert "its process ended with status 1" in faulty.ranks[3].failure
    assert "MemoryError: this rank's process dies" in faulty.ranks[3].failure
    assert faulty.ranks[2].failure is None and faulty.ranks[2].step.peak > 0


@pytest.mark.slow
def test_one_gpu_in_fp8_with_mtp_writes_its_whole_state_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact numbers: one rank writes everything, in the dtypes that it has it in."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the caller's: a rehearsed GPU has compiled kernels
    code, report = rehearse("--world-size", "1", "--preset", "tiny", "--micro-batch-size", "1", "--global-batch-size",
                            "4", "--fp8", "blockwise", "--num-steps", "1", "--save-and-resume")
    assert code == 0, report["found"]
    (rank,) = report["ranks"]
    parts = {part["name"]: part["bytes"] for part in rank["components"]}
    assert parts["FP8 weights"] > 0 and rank["moe_passes"] == 4 * 2, "three layers and an MTP module, 2 micro-batches"
    run = parse_command(["--preset", "tiny"]).run
    table = count_parameters(run.model)
    number = sum(part.total for part in (*table.main, *table.mtp))
    assert 0 <= parts["parameters"] - 2 * number < 4096, "buffers of parameters are padded"
    biases = 4 * 4 * run.model.num_experts
    assert rank["saved_bytes"] == number * (2 + 4 + 4 + 4) + biases


SLURM = ROOT / "examples/slurm/pretrain_dsv3_2048.sbatch"


def slurm_flags() -> list[str]:
    """The flags of the example, with folders in place of its variables, as the shell itself takes them apart."""
    text = SLURM.read_text(encoding="utf-8")
    array = text[text.index("flags=("):text.index("run_job ")]
    done = subprocess.run(["bash", "-c", f"{array}\nprintf '%s\\n' \"${{flags[@]}}\""], text=True, check=True,
                          capture_output=True, env={"DATA": "/d", "VALID": "/v", "TOKENIZER": "/t", "OUTPUT": "/o"})
    return done.stdout.splitlines()


def test_the_slurm_examples_flags_fit_its_gpus() -> None:
    run = parse_command(slurm_flags()).run
    run.validate(2048)
    assert (run.fp8.fp8, run.training.recompute_granularity) == ("blockwise", "selective")
    assert max(rank.peak_bytes for rank in estimate_memory(run, 2048)) < 80 * 2**30


@pytest.mark.slow
def test_the_slurm_examples_flags_are_rehearsed_with_fewer_layers_and_narrow() -> None:
    """The layout, schedule and formats as they are: PP8 x TP2, EP64 on 2048 ranks; a layer or two a stage."""
    narrow = ["--hidden-size", "256", "--num-attention-heads", "4", "--q-lora-rank", "64", "--kv-lora-rank", "64",
              "--ffn-hidden-size", "256", "--moe-ffn-hidden-size", "128", "--vocab-size", "1280", "--num-layers", "16",
              "--max-position-embeddings", "4096"]
    code, report = rehearse("--world-size", "2048", *slurm_flags(), *narrow, "--ranks", "0", "256", "1792",
                            "--num-steps", "1", "--num-microbatches", "16")
    errors = [text for text in report["found"] if "the peak is" not in text]
    assert errors == [] and len(report["ranks"]) == 3
    assert all(rank["failure"] is None and rank["moe_passes"] for rank in report["ranks"])


@pytest.mark.parametrize(("words", "text"), [
    ([*FLAGS], "--world-size must be given: how many GPUs the run has"),
    (["--world-size", "0", *FLAGS], "--world-size=0 must be at least 1"),
    (["--world-size", "7", *FLAGS], "world_size=7"),
    ([*COMMAND, "--ranks", "8"], "--ranks 8 must be from 0 to 7, below --world-size=8"),
    ([*COMMAND, "--ranks", "1", "--all-kinds"], "--all-kinds chooses ranks itself; leave out --ranks, or it"),
    ([*COMMAND, "--imbalance", "3"], "--imbalance=3 must be at least 1, which is balance, and at most 2"),
    ([*COMMAND, "--num-microbatches", "0"], "--num-microbatches=0 must be at least 1"),
    ([*COMMAND, "--device-memory-gb", "0"], "--device-memory-gb=0 must be above 0"),
    ([*COMMAND, "--pipeline-schedule", "nonsense"], "pipeline-schedule"),
    ([*COMMAND, "--no-such-flag"], "--no-such-flag is not a flag"),
])
def test_bad_input_is_refused_before_anything_starts(words: list[str], text: str, capsys: pytest.CaptureFixture[str]
                                                     ) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2 and text in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_that_share_a_sequence_pass_a_latent_a_token_and_layer() -> None:
    """Once forward and once backward to the other rank, whose gradients of them come back; nothing wider travels."""
    flags = ("--preset", "tiny", "--context-parallel-size", "2", "--global-batch-size", "2")
    code, report = rehearse("--world-size", "2", *flags, "--processes", "1")
    assert code == 0 and report["found"] == []
    (rank,), run = report["ranks"], parse_command(flags).run
    assert rank["planned_peak_bytes"] == pytest.approx(rank["peak_bytes"], rel=0.1)
    passed = {(row["dtype"], row["count"], row["mean_bytes"]) for row in rank["messages"]
              if row["phase"] == "step" and row["operation"] == "all_to_all"}
    layers, tokens = run.model.num_layers + run.model.mtp_num_layers, 2 * run.training.seq_length // 2
    numbers = tokens * (run.model.kv_lora_rank + run.model.qk_rope_head_dim)
    assert passed == {("bfloat16", 2 * layers, 2 * numbers), ("float32", layers, 4 * numbers)}
