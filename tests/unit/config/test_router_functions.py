"""What routers compute by name: values by hand, and that one function is all that a new one needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import build_parser, parse_command
from dsv3_megatron.config.router_functions import BALANCE_LOSSES, SCORE_FUNCTIONS, balance_loss, score_function
from dsv3_megatron.ops.router_scores import router_scores


@pytest.fixture
def as_before() -> Iterator[None]:
    """The choices are what they were when a test is over."""
    kept = dict(SCORE_FUNCTIONS), dict(BALANCE_LOSSES)
    yield
    for choices, before in zip((SCORE_FUNCTIONS, BALANCE_LOSSES), kept, strict=True):
        choices.clear()
        choices.update(before)


def test_the_reports_balance_loss_by_hand() -> None:
    """Two sequences: one even, one whose expert 0 has half of the tokens and four tenths of the affinity."""
    load_BE = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    share_BE = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    assert BALANCE_LOSSES["seq_aux_loss"](load_BE, share_BE).tolist() == pytest.approx([1.0, 1.4])


def test_one_function_is_a_choice_of_the_command_line(as_before: None) -> None:
    @balance_loss
    def entropy_of_shares(load_BE: torch.Tensor, share_BE: torch.Tensor) -> torch.Tensor:
        return (share_BE * share_BE.log()).sum(-1) + math.log(share_BE.shape[-1])

    @score_function
    def cauchy(logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE.atan() / math.pi + 0.5

    flags = ["--moe-router-load-balancing-type", "entropy_of_shares", "--moe-router-score-function", "cauchy"]
    run = parse_command(flags).run
    run.validate(1)
    assert run.training.moe_router_load_balancing_type == "entropy_of_shares"
    assert run.model.moe_router_score_function == "cauchy"
    assert "{seq_aux_loss,entropy_of_shares}" in build_parser().format_help()
    logits_TE = torch.tensor([[0.0, 1.0]])
    assert router_scores(logits_TE, "cauchy").tolist()[0] == pytest.approx([0.5, 0.75])
    with pytest.raises(ConfigError, match="moe_router_load_balancing_type=entropy_of_shares: a layout is certified "
                                          "against a reference that has seq_aux_loss alone"):
        shrink(run, 1, 4)
    shrink(run.override(moe_aux_loss_coeff=0.0, moe_router_score_function="sigmoid"), 1, 4)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="--moe-router-load-balancing-type: invalid choice: 'aux_loss'.*seq_aux_loss"):
        parse_command(["--moe-router-load-balancing-type", "aux_loss"])
