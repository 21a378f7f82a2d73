"""Evaluations that keep documents apart: a run's own validation loss, each document alone, under any layout.

Documents end with token 1, EOD; a row of an array or a window of a dataset holds several.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dsv3_megatron.certification.reference_weights import Architecture, weight_shapes
from dsv3_megatron.commands.evaluate import EvaluationRequest
from dsv3_megatron.config.data import DOCUMENT_SWITCHES
from dsv3_megatron.data.document_ends import document_bounds
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import EOS_TOKEN, save_tokenizer
from dsv3_megatron.runs.evaluator import Evaluation
from tests.distributed.evaluations import TOLERANCE, arguments_of, evaluate, request_for, validation
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.small_run import SEQ_LENGTH, small_run
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.compare import relative_error
from tests.transformers_model import huggingface_model

pytestmark = pytest.mark.distributed

EOD, NUM_WINDOWS = 1, 12
ALL_ON, ALL_OFF = dict.fromkeys(DOCUMENT_SWITCHES, True), dict.fromkeys(DOCUMENT_SWITCHES, False)
# Documents of 5, 1 and 8 tokens and the beginning of another; the last token is predicted only.
ROWS = np.array([[7, 3, 9, 2, EOD, EOD, 5, 8, 6, 2, 4, 11, 3, EOD, 9, 10],
                 [4, 4, EOD, 100, 50, 8, 2, 9, 7, 12, EOD, 13, 3, 5, 2, EOD]])


def documents_alone() -> list[tuple[int, slice, np.ndarray]]:
    """Row and positions of each document of ROWS, and its ids with the one that its last position predicts."""
    return [(row, slice(start, end), ROWS[row, start : end + 1])
            for row, bounds in enumerate(document_bounds(ROWS[:, :-1], EOD))
            for start, end in itertools.pairwise(bounds)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with every switch, validated at the end on `valid`, of which every window is a sample; `ids.npy`.

    Its only document holds EODs, each of which ends one; a step is all windows, since a validation is the mean of its
    steps' means and not every step has as many tokens that count.
    """
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    for name, lengths in (("train", [7, 12, 5, 30] * 12), ("valid", [NUM_WINDOWS * SEQ_LENGTH + 1])):
        with DatasetWriter(str(folder / name), vocab_size=128, options={"append_eod": True, "eod_id": EOD}) as writer:
            ids = (generator.zipf(1.3, size=sum(lengths)) % 126 + 2).astype(np.int64)
            ids[np.cumsum(lengths) - 1] = EOD
            ids[generator.random(len(ids)) < 0.15] = EOD
            writer.add_documents(ids, np.array(lengths))
    run_ranks(1, "dsv3_megatron", "train", *arguments_of(small_run()), *(
        f"--seq-length 16 --micro-batch-size 4 --global-batch-size {NUM_WINDOWS} --train-iters 10 --lr 1e-2 "
        "--min-lr 1e-3 --lr-warmup-iters 0 --precision bf16 --eval-interval 10 --eval-iters 1 --log-interval 1 "
        "--reset-attention-mask --reset-position-ids --eod-mask-loss "
        f"--data-path {folder}/train --valid-data-path {folder}/valid --save {folder}/run "
        f"--tensorboard-dir {folder}/logs").split())
    np.save(folder / "ids.npy", ROWS)
    return folder


def test_the_runs_own_validation_loss(trained: Path) -> None:
    """Without a flag the switches of training hold; each of them matters."""
    own = EvaluationRequest(load=f"{trained}/run", data_path=f"{trained}/valid", micro_batch_size=4)
    variants = [{}, {"reset_attention_mask": False}, {"eod_mask_loss": False}, ALL_OFF,
                {**ALL_OFF, "reset_position_ids": True}]
    found, *others = run_ranks(1, evaluate, [dataclasses.replace(own, switches=switches) for switches in variants])[0]
    inputs = np.fromfile(trained / "valid.bin", np.uint16)[:-1]
    assert len(inputs) == NUM_WINDOWS * SEQ_LENGTH
    record = validation(trained)
    assert (found.tokens, found.rows) == (np.count_nonzero(inputs != EOD), NUM_WINDOWS)
    # The same products in the same precision; sums of fp32 losses, in another order.
    assert found.loss == pytest.approx(record["lm_loss"], rel=1e-6)
    assert found.mtp_losses == pytest.approx(record["mtp_losses"], rel=1e-6)
    losses = [found.loss, *(other.loss for other in others)]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-5 * found.loss, losses
    assert [other.tokens for other in others] == [found.tokens, *[len(inputs)] * 3]


def check_rows(found: Evaluation, logprobs: np.ndarray, expected: np.ndarray, *, is_eod_counted: bool) -> None:
    assert relative_error(torch.from_numpy(logprobs), torch.from_numpy(expected)) <= TOLERANCE
    counted = np.full(expected.shape, True) if is_eod_counted else ROWS[:, :-1] != EOD
    assert (found.tokens, found.rows) == (counted.sum(), 2)
    assert found.loss == pytest.approx(-expected[counted].mean(dtype=np.float64), rel=1e-6)


def test_a_document_is_scored_as_if_alone_under_every_layout(trained: Path) -> None:
    """Also one whose row is padded (TP2), or whose beginning another pipeline stage has read."""
    alone = []
    for number, (_, _, ids) in enumerate(documents_alone()):
        np.save(trained / f"{number}.npy", ids[None])
        alone.append(request_for(f"alone-{number}", trained, "run", tokens=f"{trained}/{number}.npy", switches=ALL_OFF))
    packed = request_for("packed", trained, "run", switches=ALL_OFF)
    single = request_for("single", trained, "run", micro_batch_size=2)
    layouts = [request_for(name, trained, "run") for name in ("dp2", "pp2-interleaved", "ep2", "tp2-ep2")]
    found = run_ranks(1, evaluate, [*alone, packed, single])[0][-1:] + run_ranks(2, evaluate, layouts)[0]

    expected = np.full((2, ROWS.shape[1] - 1), np.nan, np.float32)
    for number, (row, positions, _) in enumerate(documents_alone()):
        expected[row, positions] = np.load(trained / f"run-alone-{number}.npy")[0]
    for request, result in zip([single, *layouts], found, strict=True):
        check_rows(result, np.load(request.logprobs), expected, is_eod_counted=False)
        assert result.mtp_losses == pytest.approx(found[0].mtp_losses, rel=1e-6)
    difference = np.abs(np.load(packed.logprobs) - expected)
    assert difference[0, :5].max() < 1e-5 and difference[0, 6:].max() > 1e-3, "packed, documents do see each other"


def test_transformers_on_each_document(tmp_path: Path) -> None:
    """A Hugging Face checkpoint with a tokenizer beside it, under flags, by the command."""
    model = small_run().model
    published = published_weights(model, dtype=torch.float32)
    write_checkpoint(tmp_path / "hf", config_json(model), published)
    np.save(tmp_path / "ids.npy", ROWS)
    arch = Architecture.of(model)
    transformers = huggingface_model(arch, {key: published[key] for key in weight_shapes(arch)})
    expected = np.full((2, ROWS.shape[1] - 1), np.nan, np.float32)
    with torch.no_grad():
        for row, positions, ids in documents_alone():
            logits_BSV = transformers(torch.from_numpy(ids[None, :-1]), use_cache=False).logits
            logprobs = logits_BSV.log_softmax(-1).gather(-1, torch.from_numpy(ids[None, 1:, None]))
            expected[row, positions] = logprobs[0, :, 0]
    save_tokenizer(Tokenizer(WordLevel({"word": 0, EOS_TOKEN: EOD}, unk_token="word")), tmp_path / "hf")
    (printed,) = run_ranks(1, "dsv3_megatron", "evaluate", "--load", tmp_path / "hf", "--tokens",
                           tmp_path / "ids.npy", "--json", "--precision", "fp32", "--logprobs", tmp_path / "out.npy",
                           "--reset-attention-mask")
    fields = {name: value for name, value in json.loads(printed).items() if name != "perplexity"}
    fields["mtp_losses"] = tuple(fields["mtp_losses"])
    check_rows(Evaluation(**fields), np.load(tmp_path / "out.npy"), expected, is_eod_counted=True)


def test_rows_without_a_token_that_counts(trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ends.npy", np.array([[EOD, 5]]))
    with pytest.raises(RankError, match=r"leaves out the token after each EOD \(id 1\), and the rows have no other"):
        run_ranks(1, evaluate, [request_for("ends", trained, "run", tokens=f"{tmp_path}/ends.npy")])
    assert not list(trained.glob("run-ends*"))
