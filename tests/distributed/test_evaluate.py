"""Evaluations of whole checkpoints: a run's own validation loss, Transformers' log-probabilities, any layout alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.certification.reference import losses
from dsv3_megatron.certification.reference_weights import Architecture, weight_shapes
from dsv3_megatron.certification.routing_notes import Notes, merge_notes
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.commands.evaluate import EvaluationRequest
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.runs.evaluator import Evaluation
from tests.distributed.evaluations import (
    LAYOUTS,
    TOLERANCE,
    arguments_of,
    evaluate,
    evaluate_noted,
    request_for,
    validation,
)
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.small_run import SEQ_LENGTH, small_run
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import YARN
from tests.parity.compare import relative_error
from tests.routing import compare_routing
from tests.transformers_model import huggingface_model

pytestmark = pytest.mark.distributed

NUM_WINDOWS = 12
# Affinities, in 0..1, of one forward pass in fp32.
SCORE_ROUNDING = 2e-6


# -- a checkpoint of a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps in bf16 under EP2, validated at the end on `valid`, of which every window is a sample; `ids.npy`."""
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    for name, lengths in (("train", [300] * 4), ("valid", [NUM_WINDOWS * SEQ_LENGTH + 1])):
        with DatasetWriter(str(folder / name), vocab_size=128) as writer:
            writer.add_documents((generator.zipf(1.3, size=sum(lengths)) % 128).astype(np.int64), np.array(lengths))
    run_ranks(2, "dsv3_megatron", "train", *arguments_of(small_run()), *(
        "--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 5 --lr 1e-2 --min-lr 1e-3 "
        "--lr-warmup-iters 0 --precision bf16 --eval-interval 5 --eval-iters 3 --log-interval 1 "
        f"--expert-model-parallel-size 2 --data-path {folder}/train --valid-data-path {folder}/valid "
        f"--save {folder}/run --tensorboard-dir {folder}/logs").split())
    np.save(folder / "ids.npy", generator.integers(0, 128, size=(7, 12)).astype(np.uint16))
    return folder


def test_the_runs_own_validation_loss(trained: Path) -> None:
    """In one process, in bf16 as it was trained: the same windows, each scored once."""
    (found,) = run_ranks(1, evaluate, [EvaluationRequest(load=f"{trained}/run", data_path=f"{trained}/valid")])[0]
    record = validation(trained)
    assert found.tokens == NUM_WINDOWS * SEQ_LENGTH and found.rows == NUM_WINDOWS
    # The same products in the same precision; sums of fp32 losses, in another order.
    assert found.loss == pytest.approx(record["lm_loss"], rel=1e-6)
    assert found.mtp_losses == pytest.approx(record["mtp_losses"], rel=1e-6)


def test_windows_of_another_length_score_every_token(trained: Path) -> None:
    """The last row is shorter, and rows are added to fill the step: neither counts."""
    request = EvaluationRequest(load=f"{trained}/run", data_path=f"{trained}/valid", seq_length=11, micro_batch_size=4)
    for found in (run_ranks(num_ranks, evaluate, [request])[0][0] for num_ranks in (1, 2)):
        assert (found.tokens, found.rows) == (NUM_WINDOWS * SEQ_LENGTH, 18)


@pytest.fixture(scope="module")
def in_one_process(trained: Path) -> tuple[Evaluation, np.ndarray, Notes]:
    """What was found, log-probabilities and routing."""
    ((found, notes),) = run_ranks(1, evaluate_noted, [request_for("single", trained, "run")])[0]
    return found, np.load(trained / "run-single.npy"), notes


def test_loss_is_the_mean_of_the_log_probabilities(in_one_process: tuple[Evaluation, np.ndarray, Notes]) -> None:
    found, logprobs, _ = in_one_process
    assert logprobs.shape == (7, 11) and logprobs.dtype == np.float32 and (logprobs < 0).all()
    assert found.loss == pytest.approx(-logprobs.mean(dtype=np.float64), rel=1e-6)
    assert (found.tokens, found.rows) == (77, 7)


def with_next_token(notes: Notes) -> Notes:
    """What routers saw of tokens that count: an MTP module reads the token after, which a row's last one has not.

    There it reads whatever the row is padded with, and nothing is made of the result.
    """
    return {key: dataclasses.replace(choices, **{
        name: {place: value for place, value in getattr(choices, name).items() if "MTP" not in key[1] or place[1] < 10}
        for name in ("scores", "ids")}) for key, choices in notes.items()}


def test_every_layout_gives_the_same(trained: Path, in_one_process: tuple[Evaluation, np.ndarray, Notes]) -> None:
    """Rows of 11 are padded under TP2, and seven rows do not fill a step of two replicas."""
    requests = [request_for(name, trained, "run", micro_batch_size=size)
                for name, size in zip(LAYOUTS, (1, 2, 1, 1, 1, 2, 1, 2, 3, 2, 3, 1), strict=True)]
    expected, logprobs, notes = in_one_process
    ranks = [dict(zip(LAYOUTS, rank, strict=True)) for rank in run_ranks(2, evaluate_noted, requests, notes)]
    for name in LAYOUTS:
        found = ranks[0][name][0]
        assert found == ranks[1][name][0], "every rank has the result"
        compare_routing(with_next_token(notes), merge_notes([rank[name][1] for rank in ranks]), rounding=SCORE_ROUNDING)
        actual = np.load(trained / f"run-{name}.npy")
        assert relative_error(torch.from_numpy(actual), torch.from_numpy(logprobs)) <= TOLERANCE, name
        assert found.loss == pytest.approx(expected.loss, rel=1e-6), name
        assert found.mtp_losses == pytest.approx(expected.mtp_losses, rel=1e-6), name
    assert not list(trained.glob("*.partial"))


def test_the_command_under_torchrun(trained: Path, in_one_process: tuple[Evaluation, np.ndarray, Notes]) -> None:
    """The result on the first rank's stdout and nothing else, on none of the others'."""
    first, second = run_ranks(2, "dsv3_megatron", "evaluate", "--load", trained / "run", "--tokens",
                              trained / "ids.npy", "--json", "--precision", "fp32", "--pipeline-model-parallel-size", 2)
    assert second == ""
    assert json.loads(first)["loss"] == pytest.approx(in_one_process[0].loss, rel=1e-6)


def test_several_datasets_are_evaluated_by_one_command(trained: Path) -> None:
    """Under PP2, of other numbers of rows: each result is what the dataset has alone, to the last bit."""
    def command(*datasets: str) -> dict[str, Any]:
        return json.loads(run_ranks(2, "dsv3_megatron", "evaluate", "--load", trained / "run", "--data-path", *datasets,
                                    "--json", "--pipeline-model-parallel-size", 2)[0])

    found = command(f"valid={trained}/valid", f"train={trained}/train")
    assert list(found) == ["valid", "train"]
    assert found == {name: command(f"{trained}/{name}") for name in found}
    assert found["valid"]["rows"] == NUM_WINDOWS != found["train"]["rows"]


def test_damaged_tensors_are_named(trained: Path, tmp_path: Path) -> None:
    """Files of the right size with other content: one error, and no file of log-probabilities."""
    import shutil

    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "ids.npy", tmp_path / "ids.npy")
    for file in (tmp_path / "run").glob("iter_*/*.distcp"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(RankError, match="is truncated or corrupt"):
        run_ranks(1, evaluate, [request_for("damaged", tmp_path, "run")])
    assert not (tmp_path / "run-damaged.npy").exists()


def unwritable(folder: Path) -> str:
    """The disk is full after some rows; what the first rank meets, every rank raises."""
    from dsv3_megatron.checkpoint.folder import CheckpointError

    class FullDisk:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device", "out.npy")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    from dsv3_megatron.runs import evaluator

    opened = evaluator.LogProbsWriter._open

    def open_on_full_disk(writer: Any) -> None:
        opened(writer)
        writer._stream = FullDisk(writer._stream)

    evaluator.LogProbsWriter._open = open_on_full_disk  # type: ignore[method-assign]
    try:
        evaluate([request_for("full", folder, "run")])
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_full_disk_leaves_nothing_and_every_rank_says_so(trained: Path) -> None:
    for message in run_ranks(2, unwritable, trained):
        assert "run-full.npy: No space left on device" in message
    assert not list(trained.glob("run-full*"))


# -- a Hugging Face checkpoint -------------------------------------------------------------------------

HUGGING_FACE_MODELS = {
    "plain": {}, "yarn-mtp-2": {**YARN, "mtp_num_layers": 2, "moe_router_topk": 1, "moe_router_group_topk": 1,
                                "moe_router_group_score_topk": 2, "original_max_position_embeddings": 8}}


@pytest.mark.parametrize("name", HUGGING_FACE_MODELS)
def test_log_probabilities_of_transformers(name: str, tmp_path: Path) -> None:
    """In one process, under layouts, and converted to a checkpoint of ours; beyond the original context of the second.
    """
    model = dataclasses.replace(small_run().model, max_position_embeddings=64, **HUGGING_FACE_MODELS[name])
    published = published_weights(model, dtype=torch.float32)
    write_checkpoint(tmp_path / "hf", config_json(model), published)
    convert_to_megatron(tmp_path / "hf", tmp_path / "converted")
    ids = torch.randint(0, model.vocab_size, (5, 24), generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "ids.npy", ids.numpy())
    arch = Architecture.of(model)
    # Without the MTP modules' copies of embedding and head.
    weights = {key: published[key] for key in weight_shapes(arch)}
    with torch.no_grad():
        logits_BSV = huggingface_model(arch, weights)(ids, use_cache=False).logits[:, :-1]
        expected = logits_BSV.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        reference = losses({key: value.double() for key, value in weights.items()}, arch, ids[:, :-1], ids[:, 1:],
                           mtp_mean_over="main")

    single = [request_for("single", tmp_path, "hf", micro_batch_size=5)]
    several = [request_for("pp2", tmp_path, "hf", micro_batch_size=2), request_for("tp2-ep2", tmp_path, "hf"),
               request_for("ep2", tmp_path, "converted")]
    results = run_ranks(1, evaluate, single)[0] + run_ranks(2, evaluate, several)[0]
    for request, found in zip(single + several, results, strict=True):
        assert request.logprobs is not None
        actual = torch.from_numpy(np.load(request.logprobs))
        assert relative_error(actual, expected) <= TOLERANCE, request
        assert found.loss == pytest.approx(-expected.double().mean().item(), rel=1e-6)
        assert found.mtp_losses == pytest.approx([loss.item() for loss in reference.mtp_losses], rel=1e-6)
