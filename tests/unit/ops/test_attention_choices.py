"""Which implementation of core attention is chosen, what refuses, and that a run and the planner are told alike."""

import dataclasses
import sys
import types

import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.ops import attention
from dsv3_megatron.ops.attention import causal_attention, reference_attention
from dsv3_megatron.ops.attention_choices import PADDED, AttentionCase, choose_attention
from dsv3_megatron.ops.recompute import is_at_hand
from dsv3_megatron.planning.memory.settings import pads_values
from dsv3_megatron.planning.time.operations import Shape

V3 = AttentionCase("cuda")
BOTH = frozenset({"transformer_engine", "flash_attn_interface"})


@pytest.mark.parametrize(("setting", "changes", "expected"), [
    ("auto", {}, "cudnn"),
    ("auto", {"packages": BOTH}, "engine"),
    ("auto", {"capability": (10, 0)}, "cudnn"),
    ("auto", {"capability": (8, 0)}, "sdpa_padded"),
    ("auto", {"cudnn_version": 91002}, "sdpa_padded"),
    ("auto", {"cudnn_version": 91002, "packages": frozenset({"flash_attn_interface"})}, "flash3"),
    ("auto", {"cudnn_version": 91002, "query_width": 96, "value_width": 64}, "cudnn"),
    ("auto", {"cudnn_version": 0, "query_width": 96, "value_width": 64}, "sdpa_padded"),
    ("auto", {"query_width": 192, "value_width": 192}, "sdpa_padded"),
    ("auto", {"query_width": 20, "value_width": 12}, "sdpa_padded"),
    ("auto", {"value_bytes": 4, "packages": BOTH}, "sdpa_padded"),
    ("auto", {"has_documents": True, "packages": frozenset({"transformer_engine"})}, "sdpa_padded"),
    ("auto", {"has_documents": True, "packages": BOTH}, "flash3"),
    ("auto", {"device": "cpu"}, "blocked"),
    ("fused", {}, "cudnn"),
    ("fused", {"packages": BOTH}, "engine"),
    ("fused", {"has_documents": True}, "cudnn"),
    ("flash", {}, "flash_padded"),
    ("flash", {"packages": BOTH}, "flash3"),
    ("flash", {"packages": BOTH, "capability": (10, 0)}, "flash_padded"),
    ("unfused", {}, "reference"),
    ("unfused", {"device": "cpu"}, "reference"),
    ("local", {}, "blocked"),
    ("local", {"device": "cpu"}, "blocked"),
])
def test_choice(setting, changes, expected):
    assert choose_attention(setting, dataclasses.replace(V3, **changes))[0] == expected


@pytest.mark.parametrize(("setting", "changes", "message"), [
    ("fused", {"device": "cpu"}, "attention_backend=fused is not possible .*no cudnn: it needs a GPU"),
    ("flash", {"device": "cpu"}, "attention_backend=flash is not possible .*no flash3: it needs a GPU"),
    ("fused", {"capability": (8, 0)}, r"no cudnn: compute capability 8\.0, not 9\.x or 10\.x"),
    ("fused", {"cudnn_version": 91002}, r"no cudnn: cuDNN 91002 is older than 9\.19\); set attention_backend=auto"),
    ("fused", {"value_bytes": 4}, "it takes 16-bit numbers, not 32-bit"),
    ("flash", {"query_width": 320}, "keys are at most 256 wide"),
    ("flash", {"capability": (7, 5)}, r"compute capability 7\.5 is below 8\.0"),
    ("eager", {}, "attention_backend='eager' must be one of auto, flash, fused, unfused, local; try auto"),
])
def test_what_is_not_possible_is_refused(setting, changes, message):
    with pytest.raises(ConfigError, match=message):
        choose_attention(setting, dataclasses.replace(V3, **changes))


def test_the_reason_names_what_was_passed_over():
    assert choose_attention("auto", V3)[1] == "no engine: transformer_engine is not installed"
    reason = choose_attention("auto", dataclasses.replace(V3, capability=(8, 0)))[1]
    assert "no cudnn: compute capability 8.0" in reason and "no flash3" in reason


@pytest.mark.parametrize("setting", ["fused", "flash"])
def test_a_run_is_refused_before_it_computes(setting):
    from dsv3_megatron.model.attention import set_attention_backend

    run = preset("tiny").override(attention_backend=setting)
    with pytest.raises(ConfigError, match=f"attention_backend={setting} is not possible for heads of"):
        set_attention_backend([], run, "fp32")


def test_modules_are_told_and_the_log_says_so(caplog):
    from dsv3_megatron.model import attention as modules
    from dsv3_megatron.ops.backend import log_choice

    log_choice.cache_clear()
    module = modules.LocalMLASelfAttention.__new__(modules.LocalMLASelfAttention)
    torch.nn.Module.__init__(module)
    with caplog.at_level("INFO", "dsv3_megatron"):
        for setting, expected in (("auto", "blocked"), ("unfused", "reference"), ("local", "blocked")):
            modules.set_attention_backend([torch.nn.ModuleList([module])], preset("tiny").override(
                attention_backend=setting), "fp32")
            assert module.attention_backend == expected
            assert caplog.text.count(f"attention_backend {setting}: backend {expected} (cpu") == 1


def test_the_planner_is_told_alike():
    run = preset("dsv3-671b").override(transformer_impl="local")
    for setting, padded in (("auto", False), ("fused", False), ("flash", True)):
        own = run.override(attention_backend=setting)
        assert pads_values(own, device="cuda", precision="bf16") is padded
        assert Shape.of(own).pads_values is padded
        assert (choose_attention(setting, V3)[0] in PADDED) is padded
    assert pads_values(run, device="cuda", precision="fp32")
    assert not pads_values(run, device="cpu", precision="bf16")


@pytest.mark.parametrize(("backend", "bounds", "is_held"), [
    ("cudnn", None, True), ("flash3", None, True), ("sdpa", None, False), ("sdpa_padded", None, False),
    ("cudnn", ((0, 16, 40), (0, 16, 40)), False)])
def test_a_result_is_held_where_the_kernel_keeps_it_as_it_is(backend, bounds, is_held, monkeypatch):
    """The parts of documents are put together in another tensor, and padding is cut off in another one."""

    def kernel(q, k, v, scale, width):
        return reference_attention(q, k, v, scale).contiguous()

    monkeypatch.setitem(attention._ATTENDS, backend, kernel)
    result = causal_attention(*_inputs()[0], softmax_scale=0.2, document_bounds=bounds, backend=backend)
    assert is_at_hand(result.flatten(2)) is is_held


def _inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 2, 3, 24), (40, 2, 3, 24), (40, 2, 3, 16), (40, 2, 3, 16))
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.requires_grad_() for t in inputs], grad


def _run(backend, bounds=None):
    inputs, grad = _inputs()
    out = causal_attention(*inputs, softmax_scale=0.3, backend=backend, document_bounds=bounds)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def _flash_attn_func(q, k, v, *, softmax_scale, causal):
    """As the package has it: [B, S, N, D] in and out."""
    assert causal
    return reference_attention(*(t.transpose(0, 1) for t in (q, k, v)), softmax_scale).transpose(0, 1)


class _DotProductAttention:
    """As Transformer Engine has it: [S, B, N, D] in, [S, B, N U] out."""

    def __init__(self, heads, widths, *, attention_dropout, qkv_format, attn_mask_type, softmax_scale):
        assert (heads, widths, qkv_format, attn_mask_type) == (3, (24, 16), "sbhd", "causal")
        self.scale = softmax_scale

    def __call__(self, q, k, v):
        return reference_attention(q, k, v, self.scale).flatten(2)


@pytest.mark.parametrize("bounds", [None, ((0, 7, 40), (0, 40))], ids=["whole", "documents"])
@pytest.mark.parametrize("backend", ["cudnn", "flash_padded", "flash3", "engine"])
def test_each_way_equals_the_padded_one(monkeypatch, backend, bounds):
    """In float64, with what needs a GPU replaced by the formula: layouts, widths, scale. Not the kernels."""
    import contextlib

    kernels = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda chosen: kernels.append(chosen) or contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=_flash_attn_func))
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch",
                        types.SimpleNamespace(DotProductAttention=_DotProductAttention))
    attention._engine_module.cache_clear()
    for got, expected in zip(_run(backend, bounds), _run("sdpa_padded", bounds), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    attention._engine_module.cache_clear()
    named = {"cudnn": "CUDNN_ATTENTION", "flash_padded": "FLASH_ATTENTION"}
    assert {kernel.name for (kernel,) in kernels} == ({named[backend]} if backend in named else set())
