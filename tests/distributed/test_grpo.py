"""GRPO in whole runs: kept rollouts give the same steps, and a run goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsv3_megatron.ops.backend import choose_product_backend
from dsv3_megatron.post_training.kept import kept_rollouts, read_rollout
from tests.digit_tokenizer import DIGIT_VOCAB, write_digit_tokenizer, write_sums
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import MODEL, steps

pytestmark = pytest.mark.distributed

ARCHITECTURE = MODEL[:MODEL.index("--vocab-size")]
# Three steps of four answers share a rollout. The judge of an untrained model's answers tells them apart.
GRPO = ["--vocab-size", str(DIGIT_VOCAB), "--seq-length", "24", "--micro-batch-size", "1", "--global-batch-size", "4",
        "--group-size", "2", "--updates-per-rollout", "3", "--max-new-tokens", "6", "--train-iters", "6",
        "--lr", "3e-3", "--min-lr", "3e-3", "--precision", "fp32", "--log-interval", "1", "--kl-coefficient", "0.1",
        "--mtp-num-layers", "1", "--moe-router-bias-update-rate", "0", "--keep-last", "0"]
# fp32, sums in another order, over six steps.
TOLERANCE = 1e-4
LAYOUTS = {"pipeline": ["--pipeline-model-parallel-size", "2"],
           "experts and tensors": ["--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2"]}
NUMBERS = ("lm_loss", "grad_norm", "grpo/kl", "grpo/clip-fraction", "grpo/ratio")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "rule.py").write_text("def judge(text, record):\n"
                                    "    return sum(map(ord, text)) % 7 + len(record['prompt'])\n")
    return ["--prompts", write_sums(folder / "sums.jsonl"), "--tokenizer-model", write_digit_tokenizer(folder / "tok"),
            "--reward", f"{folder}/rule.py:judge"]


def grpo(num_ranks: int, folder: Path, *arguments: str) -> dict[int, dict]:
    run_ranks(num_ranks, "dsv3_megatron", "grpo", *arguments, "--tensorboard-dir", str(folder / "logs"), timeout_s=180)
    return steps(folder / "logs")


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in one process, with a checkpoint after each step, and prompts that are kept apart."""
    folder = tmp_path_factory.mktemp("whole")
    grpo(1, folder, *ARCHITECTURE, *GRPO, *given, "--save", str(folder / "saved"), "--save-interval", "1",
         "--rollouts", str(folder / "rollouts"), "--valid-prompts", given[1], "--eval-interval", "3")
    return folder


def test_a_run_says_what_its_answers_were(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "logs/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "validation"] == [0, 3, 6]
    assert all(3 <= line["grpo/reward"] <= 10 for line in lines if line["kind"] == "validation")
    first, second = map(read_rollout, kept_rollouts(whole / "rollouts"))
    by_step = steps(whole / "logs")
    for rollout, numbers in ((first, (1, 2, 3)), (second, (4, 5, 6))):
        assert len(rollout.answers) == 12 and rollout.rules == ("judge",)
        assert all(0 < len(answer.ids) <= 6 for answer in rollout.answers)
        for number in numbers:
            told = rollout.numbers(2)
            assert {name: by_step[number][name] for name in told} == told
    # Before the first update both the policy and the reference are the generator.
    assert by_step[1]["grpo/ratio"] == pytest.approx(1, abs=1e-5) and by_step[1]["grpo/kl"] < 1e-9
    assert by_step[2]["grpo/ratio"] != pytest.approx(1, abs=1e-4) and by_step[4]["grpo/kl"] > 1e-6
    # A second rollout is by other weights: its first step begins at a ratio of 1 again.
    assert by_step[4]["grpo/ratio"] == pytest.approx(1, abs=1e-5)


def test_a_run_goes_on_bit_for_bit_between_two_steps_of_a_rollout(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "saved/iter_0000002", tmp_path / "saved/iter_0000002")
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text("2")
    shutil.copytree(whole / "rollouts", tmp_path / "rollouts")
    config, saved = str(whole / "logs/config.json"), str(tmp_path / "saved")
    again = grpo(1, tmp_path, "--config", config, "--load", saved, "--save", saved,
                 "--rollouts", str(tmp_path / "rollouts"))
    expected = steps(whole / "logs")
    for iteration in range(3, 7):
        for name in (*NUMBERS, "grpo/reward", "grpo/entropy"):
            assert again[iteration][name] == expected[iteration][name], (iteration, name)
    for mine, theirs in zip(kept_rollouts(tmp_path / "rollouts"), kept_rollouts(whole / "rollouts"), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


def test_kept_rollouts_give_the_same_steps(whole: Path, given: list[str], tmp_path: Path) -> None:
    expected = steps(whole / "logs")
    replayed = grpo(1, tmp_path, *ARCHITECTURE, *GRPO, *given, "--replay", str(whole / "rollouts"))
    for iteration, step in expected.items():
        for name in NUMBERS:
            assert replayed[iteration][name] == step[name], (iteration, name)


def require_close(found: dict[int, dict], expected: dict[int, dict]) -> None:
    for iteration, step in expected.items():
        for name in NUMBERS:
            assert found[iteration][name] == pytest.approx(step[name], rel=TOLERANCE, abs=1e-6), (iteration, name)


def test_replicas_give_the_answers_and_the_steps_of_one_process(whole: Path, given: list[str], tmp_path: Path) -> None:
    replicas = grpo(2, tmp_path, *ARCHITECTURE, *GRPO, *given, "--rollouts", str(tmp_path / "rollouts"))
    require_close(replicas, steps(whole / "logs"))
    for mine, theirs in zip(kept_rollouts(tmp_path / "rollouts"), kept_rollouts(whole / "rollouts"), strict=True):
        for answer, other in zip(read_rollout(mine).answers, read_rollout(theirs).answers, strict=True):
            assert (answer.ids, answer.advantage) == (other.ids, other.advantage)
            assert answer.reference_logprobs_T == pytest.approx(other.reference_logprobs_T, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_rollouts_give_the_same_steps_under_a_layout(
        layout: str, whole: Path, given: list[str], tmp_path: Path) -> None:
    require_close(grpo(2, tmp_path, *ARCHITECTURE, *GRPO, *given, "--replay", str(whole / "rollouts"),
                       *LAYOUTS[layout]), steps(whole / "logs"))


def test_tensor_parallel_ranks_answer_together(whole: Path, given: list[str], tmp_path: Path) -> None:
    """Answers of one process, up to fp32's rounding; one rank judges."""
    ranks = grpo(2, tmp_path, *ARCHITECTURE, *GRPO, *given, "--rollouts", str(tmp_path / "rollouts"),
                 "--tensor-model-parallel-size", "2", "--valid-prompts", given[1], "--eval-interval", "3")
    require_close(ranks, steps(whole / "logs"))
    for mine, theirs in zip(kept_rollouts(tmp_path / "rollouts"), kept_rollouts(whole / "rollouts"), strict=True):
        for answer, other in zip(read_rollout(mine).answers, read_rollout(theirs).answers, strict=True):
            assert (answer.ids, answer.text, answer.rewards) == (other.ids, other.text, other.rewards)
            assert answer.logprobs_T == pytest.approx(other.logprobs_T, abs=1e-4)


@pytest.mark.parametrize(("precision", "layout"), [
    ("fp32", []), ("fp32", ["--tensor-model-parallel-size", "2"]), ("bf16", ["--tensor-model-parallel-size", "2"])],
    ids=["fp32-replicas", "fp32-tensors", "bf16-tensors"])
def test_a_rollout_has_the_bits_of_its_first_step(given: list[str], tmp_path: Path, precision: str, layout: list[str]
                                                  ) -> None:
    """Each token's ratio is 1, with drafts too: the mean of 24 answers' ratios is 1 without rounding."""
    if precision == "bf16" and choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) != "native":
        pytest.skip("this processor has no units for bf16: it multiplies in fp32, which is tested as such")
    flags = dict(zip(GRPO[::2], GRPO[1::2], strict=True)) | {
        "--precision": precision, "--global-batch-size": "24", "--updates-per-rollout": "1", "--train-iters": "1",
        "--rollout-speculative": "mtp", "--grpo-level": "token", "--rollouts": str(tmp_path / "rollouts")}
    words = [word for pair in flags.items() for word in pair]
    (step,) = grpo(2, tmp_path, *ARCHITECTURE, *words, *given, *layout).values()
    assert (step["grpo/ratio"], step["grpo/kl"]) == (1.0, 0.0)
