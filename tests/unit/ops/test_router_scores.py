"""Affinities by name, and that nothing else in the library computes them."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.config_json import model_config_to_json
from dsv3_megatron.config.router_functions import SCORE_FUNCTIONS
from dsv3_megatron.ops.router_scores import router_scores
from tests.parity.architectures import variant

LOGITS = [[-3.0, 0.0, 0.5, 4.0], [700.0, -700.0, 1.0, 2.0]]


def test_values_by_hand() -> None:
    """Token by token in Python's floats, also where an exponential of a logit would overflow."""
    logits_TE = torch.tensor(LOGITS, dtype=torch.float64)
    for row, sigmoid, softmax in zip(LOGITS, router_scores(logits_TE, "sigmoid"), router_scores(logits_TE, "softmax"),
                                     strict=True):
        assert sigmoid.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in row], rel=1e-12)
        shares = [math.exp(x - max(row)) for x in row]
        assert softmax.tolist() == pytest.approx([share / sum(shares) for share in shares], rel=1e-12)


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_backward_keeps_the_result_alone(name: str) -> None:
    """One table of the logits' size, as the memory estimate has it."""
    logits_TE = torch.randn(6, 8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        scores_TE = router_scores(logits_TE, name)
    assert [tensor.data_ptr() for tensor in kept] == [scores_TE.data_ptr()]


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="moe_router_score_function='tanh' must be one of sigmoid, softmax"):
        router_scores(torch.zeros(1, 4), "tanh")


def test_export_looks_at_the_affinities_and_not_at_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function changed here is another model, whatever it is called; one that computes sigmoids is not."""
    model = variant("groups")
    assert model_config_to_json(model, dtype="float32")["scoring_func"] == "sigmoid"
    monkeypatch.setitem(SCORE_FUNCTIONS, "sigmoid", SCORE_FUNCTIONS["softmax"])
    with pytest.raises(CheckpointError, match="moe_router_score_function='sigmoid': config.json cannot express"):
        model_config_to_json(model, dtype="float32")
    monkeypatch.setitem(SCORE_FUNCTIONS, "sigmoid", lambda logits_TE: (1 + (logits_TE / 2).tanh()) / 2)
    assert model_config_to_json(model, dtype="float32")["scoring_func"] == "sigmoid"
