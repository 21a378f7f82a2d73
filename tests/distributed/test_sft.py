"""Fine-tuning in whole runs: it begins with a base model's weights, layouts agree, and it goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import MODEL, VOCAB, data, steps
from tests.unit.data.chat.written import write_conversations

__all__ = ["data"]  # a fixture
pytestmark = pytest.mark.distributed

SFT = ["--lr", "3e-3", "--min-lr", "3e-4", "--log-interval", "1", "--split", "100,0,0",
       "--global-batch-size", "4", "--micro-batch-size", "1", "--precision", "fp32"]
# fp32, sums in another order; largest relative difference seen over the steps of a run: 3e-6.
TOLERANCE = 3e-5


def sft(num_ranks: int, folder: Path, *arguments: str) -> dict[int, dict]:
    run_ranks(num_ranks, "dsv3_megatron", "sft", *SFT, *arguments, "--tensorboard-dir", str(folder / "logs"),
              timeout_s=180)
    return steps(folder / "logs")


@pytest.fixture(scope="module")
def base(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a pretraining of two steps, with an MTP module."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(1, "dsv3_megatron", "train", *MODEL, *data, "--train-iters", "2", "--mtp-num-layers", "1",
              "--save", str(folder / "checkpoints"), timeout_s=180)
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("chat") / "chat")
    write_conversations(prefix, [3 + (7 * number) % 15 for number in range(30)], vocab_size=VOCAB)
    return prefix


def test_layouts_equal_one_process_and_a_resumed_run_the_uninterrupted(base: Path, chat: str, tmp_path: Path) -> None:
    given = ["--pretrained-checkpoint", str(base), "--data-path", chat]
    whole = sft(1, tmp_path / "one", *given, "--save", str(tmp_path / "one/saved"), "--save-interval", "4",
                "--keep-last", "0")
    assert len(whole) > 8 and whole[1]["learning_rate"] > whole[len(whole)]["learning_rate"]
    split = sft(4, tmp_path / "four", *given, "--pipeline-model-parallel-size", "2",
                "--expert-model-parallel-size", "2")
    assert whole.keys() == split.keys()
    for iteration, step in whole.items():
        for name in ("lm_loss", "grad_norm", "mtp_losses"):
            assert split[iteration][name] == pytest.approx(step[name], rel=TOLERANCE), (iteration, name)

    # The base model is not needed any more: the run has its own checkpoint.
    shutil.copytree(tmp_path / "one/saved/iter_0000004", tmp_path / "again/iter_0000004")
    (tmp_path / "again/latest_checkpointed_iteration.txt").write_text("4")
    folder = str(tmp_path / "again")
    again = sft(1, tmp_path / "resumed", "--config", str(tmp_path / "one/logs/config.json"), "--load", folder,
                "--save", folder)
    for iteration in range(5, len(whole) + 1):
        for name in ("lm_loss", "grad_norm", "mtp_losses", "learning_rate"):
            assert again[iteration][name] == whole[iteration][name], (iteration, name)


def test_a_hugging_face_model_begins_a_run_and_mtp_may_be_left_out(base: Path, chat: str, tmp_path: Path) -> None:
    run_ranks(1, "dsv3_megatron", "convert", "megatron-to-hf", "--input", str(base), "--output", str(tmp_path / "hf"),
              "--dtype", "fp32", timeout_s=180)
    first = [sft(1, tmp_path / str(number), "--pretrained-checkpoint", str(folder), "--data-path", chat,
                 "--train-iters", "1", *flags)[1]
             for number, (folder, flags) in enumerate([
                 (base, ()), (tmp_path / "hf", ("--seq-length", "16")), (base, ("--mtp-num-layers", "0"))])]
    assert first[0]["lm_loss"] == first[1]["lm_loss"] == first[2]["lm_loss"]
    assert first[0]["grad_norm"] == first[1]["grad_norm"] != first[2]["grad_norm"]
    assert first[0]["mtp_losses"] == first[1]["mtp_losses"] and not first[2]["mtp_losses"]
