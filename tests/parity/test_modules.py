"""Our local modules one by one against the reference in float64: outputs, and gradients of inputs and parameters.

Legend: B sequences, S positions, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.certification.reference import (
    Architecture,
    block,
    mla,
    moe,
    mtp_module,
    sequence_balance_loss,
    shift_left,
    swiglu,
)
from dsv3_megatron.certification.reference_weights import is_router_bias
from dsv3_megatron.certification.weight_names import whole_from_reference
from tests.parity.architectures import BALANCE_LOSS_ALPHA, variant
from tests.parity.compare import assert_close, gradients_by_name, relative_error

BATCH, LENGTH = 3, 13


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(weights):
    """Weights to differentiate by: all but the routers' biases."""
    return {name: weight.clone().requires_grad_(not is_router_bias(name)) for name, weight in weights.items()}


def swapped(x: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] of the reference <-> [S, B, ...] of Megatron-Core."""
    return x.transpose(0, 1).contiguous()


def check_gradients(model, groups, prefix, weights, num_layers):
    """Every parameter's gradient below `prefix` equals the reference's, and none of the reference's is left over."""
    expected = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    ours = gradients_by_name(model, groups, prefix)
    for name, gradient in ours.items():
        assert_close(gradient, whole_from_reference(name, expected, num_layers), f"gradient of {name}")


class TestAttention:
    @pytest.mark.parametrize("name", ["plain", "full-rank-query", "yarn", "yarn-mscale"])
    @pytest.mark.parametrize("length", [1, LENGTH])
    def test_forward_and_backward(self, build, groups, name, length):
        model_config = variant(name, mtp_num_layers=0)
        model, weights = build(model_config)
        weights, x_BSH = leaves(weights), noise(BATCH, length, model_config.hidden_size).requires_grad_()
        ours_SBH = swapped(x_BSH.detach()).requires_grad_()

        expected = mla(weights, "model.layers.1.self_attn", Architecture.of(model_config), x_BSH)
        actual, bias = model.decoder.layers[1].self_attention(ours_SBH, None)
        cotangent = noise(*expected.shape, seed=1)
        expected.backward(cotangent)
        actual.backward(swapped(cotangent))

        assert bias is None
        assert_close(swapped(actual), expected, "output")
        assert_close(swapped(ours_SBH.grad), x_BSH.grad, "gradient of the input")
        check_gradients(model, groups, "decoder.layers.1.self_attention.", weights, model_config.num_layers)

    def test_positions_beyond_the_original_context(self, build):
        """YaRN where it matters: longer than the ramp's context of 16 tokens."""
        model_config = variant("yarn", mtp_num_layers=0, original_max_position_embeddings=16)
        model, weights = build(model_config)
        x_BSH = noise(1, 96, model_config.hidden_size)
        expected = mla(weights, "model.layers.0.self_attn", Architecture.of(model_config), x_BSH)
        actual, _ = model.decoder.layers[0].self_attention(swapped(x_BSH), None)
        assert_close(swapped(actual), expected, "output")

    def test_later_tokens_change_nothing(self, build):
        model, _ = build(variant("plain"))
        attention, x_SBH = model.decoder.layers[0].self_attention, noise(LENGTH, 2, 32)
        changed = x_SBH.clone()
        changed[7:] = noise(LENGTH - 7, 2, 32, seed=5)
        before, after = attention(x_SBH, None)[0], attention(changed, None)[0]
        assert_close(after[:7], before[:7], "outputs before the change")
        assert relative_error(after[7:], before[7:]) > 0.1


class TestExperts:
    @pytest.mark.parametrize("changes", [
        {}, {"moe_router_topk": 1}, {"moe_router_topk": 2}, {"moe_router_topk": 12}, {"num_shared_experts": 0},
        {"num_shared_experts": 2}, {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 2},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 2, "num_shared_experts": 2},
        {"moe_router_num_groups": 6, "moe_router_group_topk": 4, "moe_router_topk_scaling_factor": 1.0},
    ], ids=str)
    def test_forward_and_backward(self, build, groups, changes):
        """Output, routing, load and balance loss of one MoE layer, and gradients of all of it."""
        model_config = variant("plain", mtp_num_layers=0, **changes)
        model, weights = build(model_config)
        layer, weights = model.decoder.layers[1].mlp, leaves(weights)
        x_BSH = noise(BATCH, LENGTH, model_config.hidden_size).requires_grad_()
        ours_SBH = swapped(x_BSH.detach()).requires_grad_()

        expected, routing = moe(weights, "model.layers.1.mlp", Architecture.of(model_config), x_BSH)
        balance = sequence_balance_loss(routing.scores_TE.unflatten(0, (BATCH, LENGTH)),
                                        top_k=model_config.moe_router_topk, alpha=BALANCE_LOSS_ALPHA)
        actual, _bias = layer(ours_SBH)
        cotangent = noise(*expected.shape, seed=1)
        # Ours attaches the balance loss of each sequence, times its tokens, to a loss that is a sum over tokens.
        ((expected * cotangent).sum() + balance * BATCH * LENGTH).backward()
        actual.backward(swapped(cotangent))

        assert_close(swapped(actual), expected, "output")
        counts = torch.bincount(routing.expert_ids_TK.flatten(), minlength=model_config.num_experts)
        assert torch.equal(layer.router.tokens_per_expert.cpu(), counts)
        # The sum that is reported is kept in fp32: rounding of some additions.
        assert_close(layer.router.balance_loss_sum, balance * BATCH, "balance loss", tolerance=1e-6)
        assert_close(swapped(ours_SBH.grad), x_BSH.grad, "gradient of the input")
        check_gradients(model, groups, "decoder.layers.1.mlp.", weights, model_config.num_layers)

    def test_expert_without_tokens_gets_a_zero_gradient(self, build, groups):
        model, _weights = build(variant("plain", moe_router_topk=1))
        layer = model.decoder.layers[1].mlp
        layer.router.expert_bias.fill_(-10.0)
        layer.router.expert_bias[5] = 10.0
        layer(noise(4, 2, 32))[0].sum().backward()
        gradients = gradients_by_name(model, groups, "decoder.layers.1.mlp.experts.")
        for name, gradient in gradients.items():
            assert bool(gradient.abs().sum() > 0) == (".experts.5." in name), name

    def test_micro_batch_of_one_token(self, build):
        model_config = variant("groups")
        model, weights = build(model_config)
        x_BSH = noise(1, 1, 32)
        expected, _ = moe(weights, "model.layers.1.mlp", Architecture.of(model_config), x_BSH)
        assert_close(swapped(model.decoder.layers[1].mlp(swapped(x_BSH))[0]), expected, "output")


def test_dense_ffn(build, groups):
    model, weights = build(variant("plain"))
    weights, x_BSH = leaves(weights), noise(BATCH, LENGTH, 32).requires_grad_()
    ours_SBH = swapped(x_BSH.detach()).requires_grad_()
    expected = swiglu(weights, "model.layers.0.mlp", x_BSH)
    actual, _ = model.decoder.layers[0].mlp(ours_SBH)
    cotangent = noise(*expected.shape, seed=1)
    expected.backward(cotangent)
    actual.backward(swapped(cotangent))
    assert_close(swapped(actual), expected, "output")
    assert_close(swapped(ours_SBH.grad), x_BSH.grad, "gradient of the input")
    check_gradients(model, groups, "decoder.layers.0.mlp.", weights, 3)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_layer(build, groups, layer):
    """Attention and FFN with their norms and residuals, without a balance loss in the way."""
    model_config = variant("groups")
    model, weights = build(model_config)
    ours = model.decoder.layers[layer]
    if layer == 1:
        ours.mlp.router.balance_loss_coeff = 0.0
    weights, x_BSH = leaves(weights), noise(BATCH, LENGTH, 32).requires_grad_()
    ours_SBH = swapped(x_BSH.detach()).requires_grad_()
    expected, _ = block(weights, Architecture.of(model_config), layer, x_BSH)
    actual, _ = ours(ours_SBH, attention_mask=None)
    cotangent = noise(*expected.shape, seed=1)
    expected.backward(cotangent)
    actual.backward(swapped(cotangent))
    assert_close(swapped(actual), expected, "output")
    assert_close(swapped(ours_SBH.grad), x_BSH.grad, "gradient of the input")
    check_gradients(model, groups, f"decoder.layers.{layer}.", weights, model_config.num_layers)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["plain", "two-shared", "all-dense", "yarn-mscale"])
def test_mtp(build, groups, name, depth):
    """MTP modules alone, fed with a random output of the main model: outputs of every depth and all gradients."""
    model_config = variant(name, mtp_num_layers=depth)
    model, weights = build(model_config)
    for module in model.mtp.modules():
        if hasattr(module, "balance_loss_coeff"):
            module.balance_loss_coeff = 0.0
    weights, h_BSH = leaves(weights), noise(BATCH, LENGTH, 32).requires_grad_()
    ours_SBH = swapped(h_BSH.detach()).requires_grad_()
    tokens_BS = torch.randint(0, model_config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    positions_BS = torch.arange(LENGTH).expand(BATCH, -1)

    expected, arch = [h_BSH], Architecture.of(model_config)
    for k in range(1, depth + 1):
        expected.append(mtp_module(weights, arch, k, expected[-1], shift_left(tokens_BS, k))[0])
    actual = model.mtp(input_ids=tokens_BS, position_ids=positions_BS, hidden_states=ours_SBH, attention_mask=None,
                       embedding=model.embedding).chunk(1 + depth, dim=0)
    # Positions whose token lies beyond the sequence's end are not counted, so they may differ.
    loss, ours = torch.zeros(()), torch.zeros(())
    for k in range(1, depth + 1):
        cotangent = noise(BATCH, LENGTH, 32, seed=k)
        cotangent[:, LENGTH - k:] = 0
        assert_close(swapped(actual[k])[:, : LENGTH - k], expected[k][:, : LENGTH - k], f"output of depth {k}")
        loss = loss + (expected[k] * cotangent).sum()
        ours = ours + (swapped(actual[k]) * cotangent).sum()
    loss.backward()
    ours.backward()

    assert_close(swapped(ours_SBH.grad), h_BSH.grad, "gradient of the main model's output")
    check_gradients(model, groups, "mtp.", weights, model_config.num_layers)
    check_gradients(model, groups, "embedding.", weights, model_config.num_layers)
