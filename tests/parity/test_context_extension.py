"""A model whose context a phase extends in place: DeepSeek-V3's YaRN, against Transformers, beyond 4096 positions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dsv3_megatron.certification.reference_weights import Architecture
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.model.rotary import RotaryTables, change_context, inverse_frequencies, softmax_scale
from tests.parity.architectures import variant
from tests.parity.compare import assert_close
from tests.transformers_model import huggingface_model

V3 = {phase.name: phase.model for phase in preset("dsv3-671b").recipe().phases}
# V3's heads, and its rotary embedding before and in the extension, in a model of two narrow layers.
HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 2,
         "num_layers": 2, "mtp_num_layers": 0}
ROTARY = ("rope_type", "rotary_base", "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast",
          "beta_slow", "mscale", "mscale_all_dim", "max_position_embeddings")
FP32 = 1e-5  # of sums in another order, as in test_transformers.py


def narrow(phase: str) -> ModelConfig:
    return variant("groups", **HEADS, **{name: getattr(V3[phase], name) for name in ROTARY})


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "rotary", None), RotaryTables)]


def logits(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BS, position_ids=torch.arange(tokens_BS.shape[1])[None], attention_mask=None)


def test_the_reports_numbers(build) -> None:
    """Softmax scale 0.0721688, then 0.1352338; frequency pairs up to 10 kept, from 23 on divided by 40."""
    model, _ = build(narrow("lowest"), torch.float32)
    assert len(attentions(model)) == 2
    assert all(attention.softmax_scale == pytest.approx(0.0721688, abs=5e-8) for attention in attentions(model))
    plain = inverse_frequencies(attentions(model)[0].config)
    for phase in ("extension-32k", "extension-128k"):
        change_context([model], V3[phase])
        for attention in attentions(model):
            assert attention.softmax_scale == softmax_scale(attention.config) == pytest.approx(0.1352338, abs=5e-8)
            assert attention.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192), rel=1e-12)
            ratio = (plain / inverse_frequencies(attention.rotary.config)).tolist()
            assert ratio[:11] == pytest.approx([1.0] * 11) and ratio[23:] == pytest.approx([40.0] * 9)
            assert all(1 < value < 40 for value in ratio[11:23])
            cos_SP, _sin_SP = attention.rotary(2, torch.zeros(1))
            assert cos_SP[0].tolist() == [1.0] * 32  # mscale = mscale_all_dim: no multiplier


def test_logits_beyond_4096_positions_equal_transformers(build) -> None:
    """Both phases of the extension have the same YaRN; its model is Hugging Face's, reached in place."""
    before, after = narrow("lowest"), narrow("extension-32k")
    model, weights = build(before, torch.float32)
    tokens_BS = torch.randint(0, before.vocab_size, (1, 4096 + 64), generator=torch.Generator().manual_seed(0))
    plain = logits(model, tokens_BS)[:, 4096:]  # the tables of the first context are made
    change_context([model], after)
    ours = logits(model, tokens_BS)[:, 4096:]
    theirs = huggingface_model(Architecture.of(after), {name: value.float() for name, value in weights.items()})
    with torch.no_grad():
        expected = theirs(tokens_BS, use_cache=False, logits_to_keep=64).logits
    assert_close(ours, expected, "logits beyond the original context", tolerance=FP32)
    with pytest.raises(AssertionError):
        assert_close(plain, expected, "logits without the extension", tolerance=FP32)


@pytest.mark.parametrize("change", [{"beta_fast": 8.0}, {"original_max_position_embeddings": 128}, {"mscale": 0.5},
                                    {"rotary_scaling_factor": 10.0}, {"rope_type": "rope"}], ids=str)
def test_every_layer_changes_as_if_it_had_been_built_so(build, change) -> None:
    """Layers share a configuration; each must follow, whichever of YaRN's fields changes, MTP's module too."""
    first, second = variant("yarn"), dataclasses.replace(variant("yarn"), **change)
    tokens_BS = torch.randint(0, first.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    model, _ = build(first, torch.float32)
    logits(model, tokens_BS)
    change_context([model], second)
    built, _ = build(second, torch.float32)
    assert torch.equal(logits(model, tokens_BS), logits(built, tokens_BS))
    assert len(attentions(model)) == first.num_layers + 1
    for changed, wanted in zip(attentions(model), attentions(built), strict=True):
        assert changed.softmax_scale == wanted.softmax_scale
        like = torch.zeros(1)
        assert all(torch.equal(a, b) for a, b in zip(changed.rotary(40, like), wanted.rotary(40, like), strict=True))
