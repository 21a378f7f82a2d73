"""The reference model against Hugging Face's, against brute force, and against cases worked out by hand.

Transformers' DeepseekV3 computes norms, router, softmax and rotary angles in float32 whatever the model's dtype.
`wide_transformers` lets its own code run with float64 in those places, so that a difference of convention cannot hide
behind rounding; one test runs it untouched.

Legend: B sequences, S positions, T tokens, H hidden, E experts, K experts per token, V vocabulary.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from dsv3_megatron.certification.reference import (
    Architecture,
    ReferenceRouting,
    block,
    loss_and_gradients,
    losses,
    main_model,
    mtp_module,
    random_weights,
    rope,
    rope_frequencies,
    route,
    select_experts,
    sequence_balance_loss,
    shift_left,
    softmax_scale,
    updated_router_bias,
    weight_shapes,
)
from tests.transformers_model import (
    huggingface_config,
    huggingface_model,
    huggingface_mtp,
    mtp_outputs,
    stacked_experts,
)

BASE = Architecture(
    num_layers=2,
    hidden_size=24,
    num_attention_heads=3,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    ffn_hidden_size=28,
    num_experts=8,
    moe_ffn_hidden_size=12,
    moe_router_topk=4,
    vocab_size=31,
    q_lora_rank=14,
    mtp_num_layers=0,
)
GROUPED = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
# A short original context puts the YaRN ramp inside the four pairs of an 8-wide rotary part.
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 256,
    "rotary_base": 50.0,
}
VARIANTS = {
    "plain": {},
    "full-rank-query": {"q_lora_rank": None},
    "groups": GROUPED,
    "all-moe": {"num_dense_layers": 0, "moe_router_topk_scaling_factor": 1.5, **GROUPED},
    "no-shared": {"num_shared_experts": 0},
    "two-shared": {"num_shared_experts": 2, "q_lora_rank": None, **GROUPED},
    "yarn": YARN,
    "yarn-groups": {**YARN, **GROUPED, "num_dense_layers": 0},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
}


def variant(name: str, **changes) -> Architecture:
    return dataclasses.replace(BASE, **{**VARIANTS[name], **changes})


def tokens(arch: Architecture, batch: int = 2, length: int = 13, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and their successors as labels, int64 [B, S]."""
    ids = torch.randint(0, arch.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


# Against Hugging Face.


class WideTorch:
    """The torch module with float64 under float32's names."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def wide_transformers(monkeypatch):
    from transformers import modeling_rope_utils
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    monkeypatch.setattr(modeling_deepseek_v3, "torch", WideTorch())
    monkeypatch.setattr(modeling_rope_utils, "torch", WideTorch())
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def assert_equal_to(actual: dict, expected: dict, *, tolerance: float) -> None:
    """Compare tensor by tensor, relative to the largest entry of the expected one."""
    assert actual.keys() == expected.keys()
    for name in expected:
        error = (actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", VARIANTS)
def test_main_model_equals_transformers(name, wide_transformers):
    arch = variant(name)
    weights = random_weights(arch, seed=1)
    tokens_BS, labels_BS = tokens(arch)
    result, gradients = loss_and_gradients(weights, arch, tokens_BS, labels_BS, balance_loss_alpha=0.0)
    model = huggingface_model(arch, weights)
    logits_BSV = model(tokens_BS, use_cache=False).logits
    loss = cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
    loss.backward()

    # float64 on both sides: rounding of some hundred operations, far below any difference of convention.
    torch.testing.assert_close(result.logits_BSV, logits_BSV, rtol=0, atol=1e-11)
    torch.testing.assert_close(result.lm_loss, loss, rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in model.named_parameters() if p.numel() > 0}
    assert_equal_to(stacked_experts(gradients, arch), expected, tolerance=1e-10)


def test_main_model_equals_untouched_transformers_in_float32():
    arch = variant("yarn-groups")
    weights = random_weights(arch, seed=2, dtype=torch.float32)
    tokens_BS, labels_BS = tokens(arch)
    with torch.no_grad():
        expected = huggingface_model(arch, weights)(tokens_BS, use_cache=False).logits
        actual = losses(weights, arch, tokens_BS, labels_BS).logits_BSV
    assert actual.dtype == torch.float32
    # float32 has 6e-8 per operation; sums of some hundred terms in two orders, logits of size 1.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_transformers_reads_the_weights_under_their_names(tmp_path):
    from safetensors.torch import save_file
    from transformers import DeepseekV3ForCausalLM

    arch = variant("groups")
    weights = random_weights(arch, seed=3, dtype=torch.float32)
    huggingface_config(arch).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_equal_to(model.state_dict(), stacked_experts(weights, arch), tolerance=0.0)


def test_experts_of_kept_groups_win_with_negative_biased_scores(wide_transformers):
    """Discarded groups must not come back with score 0, as in some releases of Transformers."""
    arch = variant("groups", num_dense_layers=0)
    weights = random_weights(arch, seed=4)
    lowered = {n: v - 3.0 if n.endswith("e_score_correction_bias") else v for n, v in weights.items()}
    tokens_BS, labels_BS = tokens(arch)
    result = losses(lowered, arch, tokens_BS, labels_BS)
    unlowered = losses(weights, arch, tokens_BS, labels_BS)
    for layer, routing in result.routings.items():
        assert torch.equal(routing.expert_ids_TK, unlowered.routings[layer].expert_ids_TK)
    logits_BSV = huggingface_model(arch, lowered)(tokens_BS, use_cache=False).logits
    torch.testing.assert_close(result.logits_BSV, logits_BSV, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["groups", "yarn"])
def test_mtp_equals_transformers_mtp_layers(name, wide_transformers):
    arch = variant(name, mtp_num_layers=2)
    weights = random_weights(arch, seed=5)
    tokens_BS, labels_BS = tokens(arch)
    result = losses(weights, arch, tokens_BS, labels_BS)
    model = huggingface_model(arch, weights)
    hidden_BSH = model.model(tokens_BS, use_cache=False).last_hidden_state
    torch.testing.assert_close(result.normed_BSH[0], hidden_BSH, rtol=0, atol=1e-11)
    outputs = mtp_outputs(model, huggingface_mtp(model, arch, weights), tokens_BS, hidden_BSH)
    for depth, hidden_BSH in enumerate(outputs, start=1):
        torch.testing.assert_close(result.normed_BSH[depth], hidden_BSH, rtol=0, atol=1e-10)
        torch.testing.assert_close(result.mtp_logits_BSV[depth - 1], model.lm_head(hidden_BSH), rtol=0, atol=1e-10)


# Weights.


def test_parameter_counts_of_deepseek_v3():
    arch = Architecture(
        num_layers=61,
        hidden_size=7168,
        num_attention_heads=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        ffn_hidden_size=18432,
        num_experts=256,
        moe_ffn_hidden_size=2048,
        moe_router_topk=8,
        vocab_size=129280,
        q_lora_rank=1536,
        num_dense_layers=3,
    )
    shapes = weight_shapes(arch)
    trained = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith("correction_bias")}
    mtp = sum(count for name, count in trained.items() if name.startswith("model.layers.61."))
    assert (sum(trained.values()) - mtp, mtp) == (671_026_404_352, 11_610_067_968)


def test_random_weights_are_reproducible_and_nontrivial():
    arch = variant("groups", mtp_num_layers=1)
    weights, again = random_weights(arch, seed=7), random_weights(arch, seed=7)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(value.std() > 0.01 for value in weights.values())
    narrow = random_weights(arch, seed=7, dtype=torch.float32)
    assert all(torch.equal(weights[name].float(), narrow[name]) for name in weights)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(weights[name], random_weights(variant("groups", num_layers=5), seed=7)[name])
    assert not torch.equal(weights[name], random_weights(arch, seed=8)[name])


def test_architecture_reads_any_object_with_its_fields():
    class Config:
        def __init__(self, arch):
            self.__dict__.update(dataclasses.asdict(arch), dropout=0.1)

    assert Architecture.of(Config(BASE)) == BASE


# Rotary embedding.


def test_yarn_of_deepseek_v3():
    """Section 4 of the specification: pairs up to 10 untouched, from 23 divided by 40, scale 0.1352338."""
    arch = variant("plain", qk_nope_head_dim=128, qk_rope_head_dim=64, rope_type="yarn", rotary_scaling_factor=40.0)
    plain = rope_frequencies(dataclasses.replace(arch, rope_type="rope"))
    factors = [slow / fast for slow, fast in zip(rope_frequencies(arch), plain, strict=True)]
    assert factors[:11] == [1.0] * 11 and factors[11] < 1.0
    assert factors[22] > 1 / 40 and factors[23:] == pytest.approx([1 / 40] * 9)
    assert softmax_scale(arch) == pytest.approx(0.1352338, abs=5e-8)
    assert softmax_scale(dataclasses.replace(arch, rope_type="rope")) == pytest.approx(0.0721688, abs=5e-8)


def test_rope_turns_pairs_as_complex_numbers():
    arch = variant("plain")
    x_BSND = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    turned = torch.view_as_complex(rope(x_BSND, arch).reshape(2, 5, 3, 4, 2).contiguous())
    original = torch.view_as_complex(x_BSND.reshape(2, 5, 3, 4, 2).contiguous())
    for position, pair in itertools.product(range(5), range(4)):
        turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(position * 10000.0 ** (-pair / 4)).double())
        torch.testing.assert_close(turned[:, position, :, pair], original[:, position, :, pair] * turn)


# Routing.

GROUPINGS = st.sampled_from([(8, 1, 1, 3), (8, 4, 2, 4), (12, 3, 2, 4), (12, 4, 3, 6), (16, 4, 1, 3), (16, 8, 4, 8)])


@settings(max_examples=60)
@given(GROUPINGS, st.integers(0, 2**31), st.floats(-3, 3))
def test_selection_respects_the_groups(grouping, seed, offset):
    experts, groups, kept, top_k = grouping
    arch = variant(
        "plain",
        num_experts=experts,
        moe_router_num_groups=groups,
        moe_router_group_topk=kept,
        moe_router_topk=top_k,
    )
    biased_E = (torch.rand(experts, generator=torch.Generator().manual_seed(seed)) + offset).tolist()
    chosen = select_experts(biased_E, arch)
    per_group = experts // groups
    assert len(set(chosen)) == top_k
    assert len({e // per_group for e in chosen}) <= kept
    # Best of all sets of groups by the sum of their top K/M scores, then best experts inside: by enumeration.
    best = max(
        itertools.combinations(range(groups), kept),
        key=lambda gs: sum(sum(sorted(biased_E[g * per_group : (g + 1) * per_group])[-(top_k // kept) :]) for g in gs),
    )
    inside = [e for e in range(experts) if e // per_group in best]
    assert sum(biased_E[e] for e in chosen) == pytest.approx(
        max(sum(biased_E[e] for e in some) for some in itertools.combinations(inside, top_k))
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gates_sum_to_the_scale_and_ignore_the_bias(top_k):
    arch = variant("plain", moe_router_topk=top_k, moe_router_topk_scaling_factor=2.5)
    weights = random_weights(arch, seed=9)
    prefix = "model.layers.1.mlp.gate"
    x_TH = torch.randn(20, arch.hidden_size, dtype=torch.float64)
    routing = route(weights, prefix, arch, x_TH)
    torch.testing.assert_close(routing.gates_TK.sum(dim=1), torch.full((20,), 2.5, dtype=torch.float64))
    scores_TK = torch.sigmoid(x_TH @ weights[f"{prefix}.weight"].T).gather(1, routing.expert_ids_TK)
    torch.testing.assert_close(routing.gates_TK, 2.5 * scores_TK / scores_TK.sum(dim=1, keepdim=True))
    # A bias on one expert makes every token choose it and leaves the scores alone.
    weights[f"{prefix}.e_score_correction_bias"][3] += 10.0
    biased = route(weights, prefix, arch, x_TH)
    assert (biased.expert_ids_TK == 3).any(dim=1).all()
    assert torch.equal(biased.scores_TE, routing.scores_TE)


def test_balance_loss_equals_the_triple_loop():
    batch, length, experts, top_k, alpha = 3, 7, 6, 2, 0.01
    scores_BSE = torch.rand(batch, length, experts, dtype=torch.float64, requires_grad=True)
    loss = sequence_balance_loss(scores_BSE, top_k=top_k, alpha=alpha)
    s = scores_BSE.tolist()
    expected = 0.0
    for b in range(batch):
        for i in range(experts):
            count, share = 0, 0.0
            for t in range(length):
                count += i in sorted(range(experts), key=lambda j: -s[b][t][j])[:top_k]
                share += s[b][t][i] / sum(s[b][t])
            expected += alpha * (experts / (top_k * length) * count) * (share / length) / batch
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    # Even scores: f_i sums to E over i and P_i is 1/E, so the loss is alpha.
    even = torch.ones(1, 5, experts, dtype=torch.float64)
    assert sequence_balance_loss(even, top_k=top_k, alpha=alpha).item() == pytest.approx(alpha)


def test_bias_moves_against_the_load():
    bias_E = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    expert_ids_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    expected = torch.tensor([0.499, 0.5, 0.5, 0.501], dtype=torch.float64)
    torch.testing.assert_close(updated_router_bias(bias_E, expert_ids_TK, 0.001), expected)


def test_unused_experts_get_zero_gradients():
    arch = variant("plain", num_dense_layers=0)
    weights = random_weights(arch, seed=10)
    weights["model.layers.0.mlp.gate.e_score_correction_bias"][:4] += 10.0
    _, gradients = loss_and_gradients(weights, arch, *tokens(arch))
    used = [gradients[f"model.layers.0.mlp.experts.{e}.down_proj.weight"].abs().sum().item() > 0 for e in range(8)]
    assert used == [True] * 4 + [False] * 4


# Losses and multi-token prediction.


def copying_model(source: str) -> tuple[Architecture, dict]:
    """An MTP model whose blocks add nothing and whose embedding and head are one-hot.

    Its depth-1 logits at a position are `sqrt(H)` at the token that eh_proj's half `source` brings, 0 elsewhere.
    """
    arch = variant("plain", hidden_size=8, vocab_size=8, mtp_num_layers=1, layernorm_epsilon=0.0)
    weights = random_weights(arch, seed=11)
    for name, value in weights.items():
        if "down_proj" in name or "o_proj" in name:
            value.zero_()
        elif "norm" in name:
            value.fill_(1.0)
    weights["model.embed_tokens.weight"] = torch.eye(8, dtype=torch.float64)
    weights["lm_head.weight"] = torch.eye(8, dtype=torch.float64)
    halves = {"embedding": (torch.eye(8), torch.zeros(8, 8)), "hidden": (torch.zeros(8, 8), torch.eye(8))}
    weights["model.layers.2.eh_proj.weight"] = torch.cat(halves[source], dim=1).double()
    return arch, weights


@pytest.mark.parametrize(("source", "offset"), [("embedding", 1), ("hidden", 0)])
def test_mtp_reads_the_next_token_and_predicts_the_one_after(source, offset):
    arch, weights = copying_model(source)
    sequence = [3, 5, 5, 5, 2, 2, 7]
    ids = torch.tensor([sequence])
    result = losses(weights, arch, ids[:, :-1], ids[:, 1:], balance_loss_alpha=0.0)
    peak = math.sqrt(8)
    log_sum = math.log(math.exp(peak) + 7)
    # Six tokens in: at depth 1, five positions i read token i + offset and predict token i + 2.
    by_hand = [log_sum - peak * (sequence[i + offset] == sequence[i + 2]) for i in range(5)]
    assert result.mtp_losses[0].item() == pytest.approx(sum(by_hand) / 5)
    main = [log_sum - peak * (sequence[i] == sequence[i + 1]) for i in range(6)]
    assert result.lm_loss.item() == pytest.approx(sum(main) / 6)
    assert result.total.item() == pytest.approx(sum(main) / 6 + 0.3 * sum(by_hand) / 5)
    # The report divides by T, not by the number of terms.
    report = losses(weights, arch, ids[:, :-1], ids[:, 1:], mtp_mean_over="main")
    assert report.mtp_losses[0].item() == pytest.approx(sum(by_hand) / 6)
    # The mask belongs to the label: hiding label 3 hides main position 3 and depth-1 position 2.
    mask = torch.ones(1, 6)
    mask[0, 3] = 0
    masked = losses(weights, arch, ids[:, :-1], ids[:, 1:], mask)
    assert masked.lm_loss.item() == pytest.approx((sum(main) - main[3]) / 5)
    assert masked.mtp_losses[0].item() == pytest.approx((sum(by_hand) - by_hand[2]) / 4)


def test_filler_tokens_reach_no_counted_position():
    arch = variant("groups", mtp_num_layers=2)
    weights = random_weights(arch, seed=12)
    tokens_BS, labels_BS = tokens(arch)
    tokens_BS, labels_BS = tokens_BS.clamp(min=1), labels_BS.clamp(min=1)
    _, gradients = loss_and_gradients(weights, arch, tokens_BS, labels_BS, balance_loss_alpha=0.0)
    assert gradients["model.embed_tokens.weight"][0].abs().max() == 0
    # The balance loss of the MTP layers does see them.
    _, gradients = loss_and_gradients(weights, arch, tokens_BS, labels_BS, balance_loss_alpha=1.0)
    assert gradients["model.embed_tokens.weight"][0].abs().max() > 0


def test_model_is_causal():
    arch = variant("groups", mtp_num_layers=1)
    weights = random_weights(arch, seed=13)
    tokens_BS, labels_BS = tokens(arch)
    changed_BS = tokens_BS.clone()
    changed_BS[:, 8] = (changed_BS[:, 8] + 1) % arch.vocab_size
    before, after = losses(weights, arch, tokens_BS, labels_BS), losses(weights, arch, changed_BS, labels_BS)
    torch.testing.assert_close(before.logits_BSV[:, :8], after.logits_BSV[:, :8], rtol=0, atol=1e-12)
    assert (before.logits_BSV[:, 8] - after.logits_BSV[:, 8]).abs().max() > 1e-3
    # Depth 1 reads one token ahead.
    mtp_before, mtp_after = before.mtp_logits_BSV[0], after.mtp_logits_BSV[0]
    torch.testing.assert_close(mtp_before[:, :7], mtp_after[:, :7], rtol=0, atol=1e-12)
    assert (mtp_before[:, 7] - mtp_after[:, 7]).abs().max() > 1e-3


def test_total_gradient_agrees_with_finite_differences():
    arch = variant("groups", mtp_num_layers=1)
    weights = random_weights(arch, seed=14)
    batch = tokens(arch)
    options = {"mtp_loss_scaling_factor": 0.3, "balance_loss_alpha": 0.05}
    result, gradients = loss_and_gradients(weights, arch, *batch, **options)
    assert len(result.balance_losses) == 2 and len(result.mtp_losses) == 1
    step = 1e-6
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.2.eh_proj.weight",
        "lm_head.weight",
    ):
        direction = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        up = losses({**weights, name: weights[name] + step * direction}, arch, *batch, **options)
        down = losses({**weights, name: weights[name] - step * direction}, arch, *batch, **options)
        slope = (up.total - down.total).item() / (2 * step)
        assert slope == pytest.approx((gradients[name] * direction).sum().item(), rel=1e-5), name


def test_parts_compose_to_the_whole():
    arch = variant("plain", mtp_num_layers=1)
    weights = random_weights(arch, seed=15)
    tokens_BS, labels_BS = tokens(arch)
    result = losses(weights, arch, tokens_BS, labels_BS)
    normed, hidden, routings = main_model(weights, arch, tokens_BS)
    assert list(routings) == [1] and isinstance(routings[1], ReferenceRouting)
    assert torch.equal(block(weights, arch, 1, hidden[1])[0], hidden[2])
    deeper, routing = mtp_module(weights, arch, 1, normed, shift_left(tokens_BS, 1))
    assert torch.equal(deeper, result.normed_BSH[1])
    assert torch.equal(routing.expert_ids_TK, result.routings[2].expert_ids_TK)


def test_unknown_mean_is_refused():
    with pytest.raises(ValueError, match="mtp_mean_over='tokens' must be 'counted' or 'main'"):
        losses({}, BASE, *tokens(BASE), mtp_mean_over="tokens")
