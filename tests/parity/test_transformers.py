"""Our model in fp32 against Transformers' DeepseekV3ForCausalLM with the same weights, over a grid of architectures.

Compared are the hidden states after each layer, the logits of the main model and of every MTP depth, the experts that
each token goes to, and the gradient of every parameter. The grid covers every pair of values of its factors; those of
MTP are Transformers' own decoder layer between its own norms.

Transformers differs from the report in how it scores groups, which `moe_router_group_score_topk` follows where asked,
and did in how it masks them (`moe_router_group_mask`); its latents' norms have an epsilon that no setting of it changes
(`latent_layernorm_epsilon`). The last tests show both.

Legend: B sequences, S positions, T tokens, E experts, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dsv3_megatron.certification.reference import Weights, shift_left
from dsv3_megatron.certification.reference_weights import Architecture, is_router_bias
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.optim.router_bias import routers
from tests.parity.architectures import MTP_LAMBDA
from tests.parity.compare import assert_close, gradients_by_name
from tests.parity.pairwise import all_pairs, covering_rows, pairs_of
from tests.transformers_model import (
    half_split_rotary,
    huggingface_gradients,
    huggingface_model,
    huggingface_mtp,
    mtp_outputs,
)

# Both sides in fp32; the largest difference relative to the largest entry of each tensor.
TOLERANCE = 1e-5
BATCH = 2
ORIGINAL_CONTEXT = 16

EVEN = {"hidden_size": 32, "num_attention_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
        "v_head_dim": 6, "ffn_hidden_size": 40, "moe_ffn_hidden_size": 16, "vocab_size": 48}
# Everything odd but the rotary width, whose pairs have to be whole; values wider than the part of a key without RoPE.
ODD = {"hidden_size": 33, "num_attention_heads": 3, "kv_lora_rank": 13, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6,
       "v_head_dim": 11, "ffn_hidden_size": 45, "moe_ffn_hidden_size": 17, "vocab_size": 53}
# A short original context and a small base put the YaRN ramp inside the few pairs of these rotary parts.
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": ORIGINAL_CONTEXT,
        "rotary_base": 50.0, "beta_fast": 4.0}
ROPE = {"plain": {}, "yarn": YARN, "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}
GROUPS_KEPT = {1: 1, 4: 2, 8: 4}
FACTORS: dict[str, tuple[Any, ...]] = {
    "query": ("full", "latent"),
    "groups": (1, 4, 8),
    "topk": (1, 2, 3, 4, 5, 6, 7, 8),
    "dense": (0, 1, 3),
    "shared": (0, 1, 2),
    "rope": tuple(ROPE),
    "rotary_pairs": ("interleaved", "half-split"),
    "sizes": ("even", "odd"),
    "length": (11, 37),  # within and beyond the original context
    "mtp": (0, 1, 2),
}
GRID = covering_rows(FACTORS)


def architecture(row: dict[str, Any]) -> ModelConfig:
    """The architecture of a row of the grid: 24 experts, and at least one MoE layer."""
    groups, top_k = row["groups"], row["topk"]
    kept = GROUPS_KEPT[groups]
    return ModelConfig(
        **(EVEN if row["sizes"] == "even" else ODD), **ROPE[row["rope"]], num_layers=max(2, row["dense"] + 1),
        num_dense_layers=row["dense"], q_lora_rank=19 if row["query"] == "latent" else None, num_experts=24,
        moe_router_topk=top_k, moe_router_num_groups=groups, moe_router_group_topk=kept,
        # 4 of 2 groups and 8 of 4 are V3's proportion, where the report's rule and Transformers' are the same.
        moe_router_group_score_topk=2 if groups > 1 and top_k != 2 * kept else None,
        num_shared_experts=row["shared"], mtp_num_layers=row["mtp"], max_position_embeddings=640)


@dataclass
class Outputs:
    """What one implementation computed.

    Attributes:
        hidden_BSH: After each layer of the main model, and after each MTP depth's last norm.
        logits_BSV: Of the main model and of each MTP depth.
        experts_BSE: Which experts each token goes to, bool, by row of the load table.
        gradients: Of the loss below, by checkpoint name (theirs) or global name (ours).
    """

    hidden_BSH: list[torch.Tensor]
    logits_BSV: list[torch.Tensor]
    experts_BSE: dict[int, torch.Tensor]
    gradients: Weights


def theirs(arch: Architecture, weights: Weights, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, *,
           rotary_pairs: str = "interleaved") -> Outputs:
    """Transformers' side: the sum of the token losses, main + lambda / D * MTP, and its gradients."""
    is_half_split = rotary_pairs == "half-split"
    if is_half_split:
        weights = half_split_rotary(weights, arch)
    model = huggingface_model(arch, weights, rope_interleave=not is_half_split)
    mtp = huggingface_mtp(model, arch, weights) if arch.mtp_num_layers else None
    hidden, experts = [], {}
    layers = list(model.model.layers) + [layer.mtp_block for layer in (mtp.layers if mtp else ())]
    for row, layer in enumerate(layers):
        if row < arch.num_layers:
            layer.register_forward_hook(lambda _module, _args, output: hidden.append(output))
        if arch.is_moe_layer(row):
            layer.mlp.gate.register_forward_hook(
                lambda _module, _args, output, row=row: experts.__setitem__(row, _as_map(output[2], arch, tokens_BS)))
    final_BSH = model.model(tokens_BS, use_cache=False).last_hidden_state
    outputs = [final_BSH, *(mtp_outputs(model, mtp, tokens_BS, final_BSH) if mtp else ())]
    logits = [model.lm_head(output_BSH) for output_BSH in outputs]
    total = torch.zeros(())
    for depth, logits_BSV in enumerate(logits):
        known = labels_BS.shape[1] - depth
        loss = cross_entropy(logits_BSV[:, :known].flatten(0, 1), shift_left(labels_BS, depth)[:, :known].flatten(),
                             reduction="sum")
        total = total + loss * (MTP_LAMBDA / arch.mtp_num_layers if depth else 1.0)
    total.backward()
    gradients = huggingface_gradients(model, mtp, arch)
    if is_half_split:
        gradients = half_split_rotary(gradients, arch, inverse=True)
    return Outputs(hidden + outputs[1:], logits, experts, gradients)


def _as_map(ids_TK: torch.Tensor, arch: Architecture, tokens_BS: torch.Tensor) -> torch.Tensor:
    chosen_TE = torch.zeros(ids_TK.shape[0], arch.num_experts, dtype=torch.bool).scatter_(1, ids_TK, True)
    assert (chosen_TE.sum(1) == arch.moe_router_topk).all()
    return chosen_TE.unflatten(0, tokens_BS.shape)


def ours(model: torch.nn.Module, groups: Any, config: ModelConfig, tokens_BS: torch.Tensor, labels_BS: torch.Tensor
         ) -> Outputs:
    """Our side: the model as a run builds it, its own losses."""
    hidden, mtp_hidden, experts = [], [], {}
    handles = [layer.register_forward_hook(lambda _module, _args, output: hidden.append(output[0].transpose(0, 1)))
               for layer in model.decoder.layers]
    if config.mtp_num_layers:
        handles.append(model.mtp.register_forward_hook(lambda _module, _args, output: mtp_hidden.extend(
            part.transpose(0, 1) for part in output.chunk(1 + config.mtp_num_layers)[1:])))
    for row, router in routers([model], config.num_layers):
        handles.append(router.register_forward_hook(lambda _module, _args, output, row=row: experts.__setitem__(
            row, output[1].unflatten(0, tokens_BS.T.shape).transpose(0, 1))))
    position_ids_BS = torch.arange(tokens_BS.shape[1]).expand(BATCH, -1)
    losses = model(input_ids=tokens_BS, position_ids=position_ids_BS, attention_mask=None, labels=labels_BS)
    (losses.main_BS.sum() + sum(loss.sum() for loss in losses.mtp_BS) * (MTP_LAMBDA / max(1, len(losses.mtp_BS)))
     ).backward()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        logits = [model(input_ids=tokens_BS, position_ids=position_ids_BS, attention_mask=None)]
        logits += [model.output_layer(hidden_BSH.transpose(0, 1).contiguous())[0].transpose(0, 1)
                   for hidden_BSH in mtp_hidden]
    return Outputs(hidden + mtp_hidden, logits, experts, gradients_by_name(model, groups))


def compare(actual: Outputs, expected: Outputs, weights: Weights, config: ModelConfig, *,
            tolerance: float = TOLERANCE) -> None:
    """Every tensor of both sides; an MTP depth up to the last position whose token it reads."""
    length, layers = expected.logits_BSV[0].shape[1], config.num_layers
    assert len(actual.hidden_BSH) == len(expected.hidden_BSH) == layers + config.mtp_num_layers
    for index, pair in enumerate(zip(actual.hidden_BSH, expected.hidden_BSH, strict=True)):
        known = length - max(0, index - layers + 1)
        assert_close(*(side[:, :known] for side in pair), f"hidden states after layer {index}", tolerance=tolerance)
    for depth, pair in enumerate(zip(actual.logits_BSV, expected.logits_BSV, strict=True)):
        assert_close(*(side[:, : length - depth] for side in pair), f"logits of depth {depth}", tolerance=tolerance)
    assert actual.experts_BSE.keys() == expected.experts_BSE.keys()
    for row, experts_BSE in expected.experts_BSE.items():
        known = length - max(0, row - layers + 1)
        assert torch.equal(actual.experts_BSE[row][:, :known], experts_BSE[:, :known]), f"experts of layer {row}"
    assert expected.gradients.keys() == {name for name in weights if not is_router_bias(name)}
    largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    for name, gradient in actual.gradients.items():
        theirs_too = whole_from_reference(name, expected.gradients, layers)
        if config.moe_router_topk == 1 and name.endswith("mlp.router.weight"):
            # One gate is its affinity divided by itself: the gradient is 0, and both sides have rounding alone.
            assert max(gradient.abs().max().item(), theirs_too.abs().max().item()) <= tolerance * largest
            continue
        assert_close(gradient, theirs_too, f"gradient of {name}", tolerance=tolerance)


def token_ids(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config.vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def check(build, groups, config: ModelConfig, length: int, *, router_bias: float = 0.0, **options: Any) -> None:
    """Compare both sides on random tokens, with `router_bias` added to every router's bias."""
    config.validate()
    model, weights = build(config, torch.float32, moe_aux_loss_coeff=0.0)
    weights = {name: weight.float() + (router_bias if is_router_bias(name) else 0.0)
               for name, weight in weights.items()}
    for _row, router in routers([model], config.num_layers):
        router.expert_bias += router_bias
    tokens_BS, labels_BS = token_ids(config, length)
    expected = theirs(Architecture.of(config), weights, tokens_BS, labels_BS, **options)
    compare(ours(model, groups, config, tokens_BS, labels_BS), expected, weights, config)


def test_the_grid_covers_every_pair() -> None:
    covered = set().union(*(pairs_of(row) for row in GRID))
    assert covered == all_pairs(FACTORS)
    assert len(all_pairs(FACTORS)) > 400 and len(GRID) < 50
    without_one = set().union(*(pairs_of(row) for row in GRID[1:]))
    assert without_one != all_pairs(FACTORS)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("row", GRID, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_equals_transformers(build, groups, row) -> None:
    check(build, groups, architecture(row), row["length"], rotary_pairs=row["rotary_pairs"])


def test_equals_transformers_in_long_sequences(build, groups) -> None:
    """Several blocks of the attention, and eight times the original context of 40."""
    row = {"query": "latent", "groups": 8, "topk": 8, "dense": 1, "shared": 1, "rope": "yarn-mscale", "sizes": "odd",
           "mtp": 1}
    check(build, groups, dataclasses.replace(architecture(row), original_max_position_embeddings=40), 320)


@pytest.mark.parametrize("change, message", [
    ({"moe_router_topk_scaling_factor": 2.5002}, "hidden states after layer 1: relative error"),
    ({"rotary_base": 10040.0}, "hidden states after layer 0: relative error"),
    ({"mscale_all_dim": 1.0001}, "hidden states after layer 0: relative error"),
    ({"layernorm_epsilon": 1.1e-4}, "hidden states after layer 0: relative error"),
], ids=str)
def test_another_model_fails(build, groups, change, message) -> None:
    """The comparison sees differences far smaller than a mistake in a convention makes."""
    row = {"query": "latent", "groups": 4, "topk": 4, "dense": 1, "shared": 1, "sizes": "even", "mtp": 1,
           "rope": "yarn" if "mscale_all_dim" in change else "plain"}
    config = architecture(row)
    model, weights = build(config, torch.float32, moe_aux_loss_coeff=0.0)
    weights = {name: weight.float() for name, weight in weights.items()}
    tokens_BS, labels_BS = token_ids(config, 11)
    other = dataclasses.replace(config, **change)
    with pytest.raises(AssertionError, match=message):
        compare(ours(model, groups, config, tokens_BS, labels_BS),
                theirs(Architecture.of(other), weights, tokens_BS, labels_BS), weights, config)


# -- where Transformers and the report differ ----------------------------------------------------------


def grouped(**changes: Any) -> ModelConfig:
    """V3's proportion of experts to groups, 4 of 2, in one dense and two MoE layers."""
    row = {"query": "full", "groups": 4, "topk": 4, "dense": 1, "shared": 1, "rope": "plain", "sizes": "even", "mtp": 0}
    return dataclasses.replace(architecture(row), num_layers=3, **changes)


def test_group_scores_of_the_report_and_of_transformers(build, groups) -> None:
    """The report sums a group's best K / M affinities, here 6 / 2, Transformers always 2: other groups are kept."""
    check(build, groups, grouped(moe_router_topk=6, moe_router_group_score_topk=2), 11)
    with pytest.raises(AssertionError, match="hidden states after layer 1"):
        check(build, groups, grouped(moe_router_topk=6), 11)


def test_latents_have_an_epsilon_of_their_own(build, groups) -> None:
    """Transformers norms the latents with 1e-6 whatever rms_norm_eps says, as DeepSeek's code does."""
    check(build, groups, grouped(q_lora_rank=19, layernorm_epsilon=1e-3, latent_layernorm_epsilon=1e-6), 11)
    with pytest.raises(AssertionError, match="hidden states after layer 0"):
        check(build, groups, grouped(q_lora_rank=19, layernorm_epsilon=1e-3), 11)


@pytest.fixture
def transformers_before_45441(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' router as it was before that change of April 2026: its own source with another mask."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    source = inspect.getsource(modeling_deepseek_v3.DeepseekV3TopkRouter)
    assert source.count('float("-inf")') == 1
    namespace = dict(vars(modeling_deepseek_v3))
    exec(source.replace('float("-inf")', "0.0"), namespace)
    monkeypatch.setattr(modeling_deepseek_v3, "DeepseekV3TopkRouter", namespace["DeepseekV3TopkRouter"])


# With this on every bias no affinity, of 0..1, is above 0. As many experts are kept as are dropped and as are chosen: a
# token goes to all of the kept ones, or to all of the others, and no choice is among equals.
NEGATIVE, EIGHT_EXPERTS = -2.0, {"num_experts": 8}


def test_dropped_groups_are_excluded_as_in_transformers_today(build, groups) -> None:
    check(build, groups, grouped(**EIGHT_EXPERTS), 11, router_bias=NEGATIVE)
    with pytest.raises(AssertionError, match="hidden states after layer 1"):
        check(build, groups, grouped(moe_router_group_mask="zero", **EIGHT_EXPERTS), 11, router_bias=NEGATIVE)


def test_dropped_groups_at_zero_as_in_older_transformers(build, groups, transformers_before_45441) -> None:
    check(build, groups, grouped(moe_router_group_mask="zero", **EIGHT_EXPERTS), 11, router_bias=NEGATIVE)
    with pytest.raises(AssertionError, match="hidden states after layer 1"):
        check(build, groups, grouped(**EIGHT_EXPERTS), 11, router_bias=NEGATIVE)


def test_both_masks_are_one_where_no_affinity_is_negative(build, groups, transformers_before_45441) -> None:
    """As in DeepSeek-V3, whose smallest bias is above 2."""
    check(build, groups, grouped(), 11, router_bias=2.0)
    check(build, groups, grouped(moe_router_group_mask="zero"), 11, router_bias=2.0)
