"""The whole model against the reference in float64: every loss, every gradient, every routing decision.

The MTP losses of both are divided by all of the main loss's tokens, as in the report (eq. 24), where Megatron-Core
divides by the tokens that have a target.

Legend: B sequences, S positions, K experts per token.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv3_megatron.certification.reference import loss_and_gradients, losses
from dsv3_megatron.certification.reference_weights import is_router_bias
from dsv3_megatron.certification.weight_names import reference_names, whole_from_reference
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.optim.router_bias import collect_expert_loads
from tests.parity.architectures import BALANCE_LOSS_ALPHA, MTP_LAMBDA, VARIANTS, variant
from tests.parity.compare import assert_close, gradients_by_name

BATCH, LENGTH = 2, 11
# In fp32 both sides round to 6e-8 in every operation; through ten layers and a sum over 22 tokens the largest error
# seen is 3e-6 of a tensor's largest gradient.
FLOAT32_TOLERANCE = 3e-5


def token_ids(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def summed_losses(model: torch.nn.Module, tokens_BS: torch.Tensor, labels_BS: torch.Tensor):
    """Our losses per depth, summed, and the sum to differentiate: main + lambda / D * MTP."""
    output = model(input_ids=tokens_BS, position_ids=torch.arange(LENGTH).expand(BATCH, -1), attention_mask=None,
                   labels=labels_BS)
    main, mtp = output.main_BS.sum(), [losses_BS.sum() for losses_BS in output.mtp_BS]
    return main, mtp, main + MTP_LAMBDA / max(1, len(mtp)) * sum(mtp)


def check(build, groups, model_config: ModelConfig, dtype: torch.dtype = torch.float64, *,
          reference_config: ModelConfig | None = None, alpha: float = BALANCE_LOSS_ALPHA, **tolerance: float) -> None:
    """Compare our model of `model_config` with the reference, of another configuration or alpha where asked."""
    model, weights = build(model_config, dtype)
    tokens_BS, labels_BS = token_ids(model_config.vocab_size)
    expected, gradients = loss_and_gradients(
        weights, reference_config or model_config, tokens_BS, labels_BS, mtp_loss_scaling_factor=MTP_LAMBDA,
        balance_loss_alpha=alpha, mtp_mean_over="main")
    main, mtp, total = summed_losses(model, tokens_BS, labels_BS)
    total.backward()

    num_tokens = BATCH * LENGTH
    assert_close(main / num_tokens, expected.lm_loss, "main loss", **tolerance)
    assert len(mtp) == model_config.mtp_num_layers
    for depth, (ours, theirs) in enumerate(zip(mtp, expected.mtp_losses, strict=True), start=1):
        assert_close(ours / num_tokens, theirs, f"MTP loss of depth {depth}", **tolerance)

    loads_LE, balance_L = collect_expert_loads(
        [model], num_layers=model_config.num_layers, num_mtp_layers=model_config.mtp_num_layers,
        num_experts=model_config.num_experts, device=torch.device("cpu"))
    for row in range(model_config.num_layers + model_config.mtp_num_layers):
        if row not in expected.routings:
            assert loads_LE[row].sum() == 0 and balance_L[row] == 0
            continue
        counts = torch.bincount(expected.routings[row].expert_ids_TK.flatten(), minlength=model_config.num_experts)
        assert torch.equal(loads_LE[row], counts), row
        # Reported in fp32 in every precision.
        assert_close(balance_L[row] / BATCH, expected.balance_losses[row].double(), f"balance loss of layer {row}",
                     tolerance=1e-5)

    ours = gradients_by_name(model, groups)
    for name, gradient in ours.items():
        assert_close(gradient / num_tokens, whole_from_reference(name, gradients, model_config.num_layers),
                     f"gradient of {name}", **tolerance)
    covered = {part for name in ours for part in reference_names(name, model_config.num_layers)}
    assert covered == {name for name in weights if not is_router_bias(name)}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients(build, groups, name):
    check(build, groups, variant(name))


@pytest.mark.parametrize("name", ["plain", "mtp-2-groups"])
def test_losses_and_gradients_in_fp32(build, groups, name):
    """The precision of training without fast bf16, against the reference in float64."""
    check(build, groups, variant(name), torch.float32, tolerance=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("change", [
    {"moe_router_topk_scaling_factor": 2.5001},
    {"layernorm_epsilon": 1.001e-6},
    {"rotary_base": 10001.0},
    {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
], ids=str)
def test_another_model_fails(build, groups, change):
    """The comparison sees differences far smaller than a mistake in a convention makes."""
    model_config = variant("plain")
    with pytest.raises(AssertionError, match="main loss: relative error"):
        check(build, groups, model_config, reference_config=dataclasses.replace(model_config, **change))


def test_balance_loss_of_another_weight_fails(build, groups):
    """The balance loss reaches the gradients with exactly its weight; the reported sum is too coarse to see this."""
    with pytest.raises(AssertionError, match="gradient of .*: relative error"):
        check(build, groups, variant("plain"), alpha=BALANCE_LOSS_ALPHA * 1.000001)


def test_logits_without_labels(build):
    model_config = variant("groups")
    model, weights = build(model_config)
    tokens_BS, labels_BS = token_ids(model_config.vocab_size)
    expected = losses(weights, model_config, tokens_BS, labels_BS)
    actual = model(input_ids=tokens_BS, position_ids=torch.arange(LENGTH).expand(BATCH, -1), attention_mask=None)
    assert_close(actual, expected.logits_BSV, "logits")
