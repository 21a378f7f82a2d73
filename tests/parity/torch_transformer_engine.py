"""Transformer Engine's modules in plain torch, to build and run the Transformer Engine spec without a GPU.

`install()` puts a package `transformer_engine` into a process that has not imported Megatron-Core yet. Its modules
have the names of parameters, the arguments and the extra state of Transformer Engine 2.20 and compute the same
functions; they stand for a run of one process without FP8. So what Megatron-Core and this library make of them (which
module stands where, conventions of widths and scales, names, checkpoint keys) is checked everywhere, and a machine
with a GPU is left with what is Transformer Engine's own.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch


class _Module(torch.nn.Module):
    """What every module of Transformer Engine has: state of FP8, empty without it, in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def _weight(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any, init: Callable[[Any], Any],
                parallel_mode: str | None = None) -> torch.nn.Parameter:
        """Created here and given to the init method, as Transformer Engine does; garbage if that does nothing."""
        weight = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype, device=device))
        with torch.no_grad():
            init(weight)
        if len(shape) > 1:
            weight.tensor_model_parallel, weight.partition_stride = True, 1  # type: ignore[attr-defined]
            weight.partition_dim = 1 if parallel_mode == "row" else 0  # type: ignore[attr-defined]
        return weight


class Linear(_Module):
    """x @ weight.T"""

    def __init__(self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool,
                 tp_group: Any, tp_size: int, get_rng_state_tracker: Any, init_method: Callable[[Any], Any], bias: bool,
                 return_bias: bool, parallel_mode: str | None, params_dtype: torch.dtype, device: Any,
                 rng_tracker_name: str | None = None) -> None:
        super().__init__()
        assert tp_size == 1 and not bias and not fuse_wgrad_accumulation and parallel_mode in ("column", "row", None)
        self.in_features, self.out_features, self.use_bias, self.tp_size = in_features, out_features, bias, tp_size
        self.parallel_mode = parallel_mode
        self.weight = self._weight((out_features, in_features), params_dtype, device, init_method, parallel_mode)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(inp, self.weight)


class LayerNormLinear(Linear):
    """rms_norm(x) @ weight.T"""

    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str,
                 zero_centered_gamma: bool, return_layernorm_output: bool, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        self.eps, self.layer_norm_bias = eps, None
        self.layer_norm_weight = self._weight(
            (in_features,), kwargs["params_dtype"], kwargs["device"], lambda weight: weight.fill_(1.0))
        self.layer_norm_weight.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return torch.nn.functional.linear(normed, self.weight)


class GroupedLinear(_Module):
    """Rows m_splits[i] of x @ weight_i.T"""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, sequence_parallel: bool,
                 fuse_wgrad_accumulation: bool, tp_group: Any, tp_size: int, get_rng_state_tracker: Any,
                 rng_tracker_name: str, init_method: Callable[[Any], Any], bias: bool, return_bias: bool,
                 parallel_mode: str | None, params_dtype: torch.dtype, device: Any, ub_name: str | None = None,
                 single_grouped_weight: bool = False, single_grouped_bias: bool = False) -> None:
        super().__init__()
        assert tp_size == 1 and not bias and not fuse_wgrad_accumulation and not single_grouped_weight
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.tp_size = bias, tp_size
        self.single_grouped_weight = self.single_grouped_bias = False
        for index in range(num_gemms):
            self.register_parameter(f"weight{index}", self._weight(
                (out_features, in_features), params_dtype, device, init_method, parallel_mode))

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        parts = inp.split(m_splits)
        return torch.cat([torch.nn.functional.linear(part, getattr(self, f"weight{index}"))
                          for index, part in enumerate(parts)])


class RMSNorm(_Module):
    """x / rms(x) * weight"""

    def __init__(self, normalized_shape: int, *, eps: float, sequence_parallel: bool, zero_centered_gamma: bool,
                 params_dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = self._weight((normalized_shape,), params_dtype, device, lambda weight: weight.fill_(1.0))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(inp, inp.shape[-1:], self.weight, self.eps)


class DotProductAttention(_Module):
    """Causal attention of [s, b, heads, width] tensors with values of their own width; [s, b, heads * value width]."""

    def __init__(self, num_attention_heads: int, kv_channels: tuple[int, int], *, num_gqa_groups: int,
                 attention_dropout: float, attn_mask_type: str, attention_type: str, softmax_scale: float,
                 sequence_parallel: bool, tp_size: int, get_rng_state_tracker: Any, tp_group: Any,
                 layer_number: int) -> None:
        super().__init__()
        assert num_gqa_groups == num_attention_heads and attention_dropout == 0.0 and attention_type == "self"
        assert attn_mask_type == "causal"
        self.heads, self.widths, self.softmax_scale = num_attention_heads, kv_channels, softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, *,
                attn_mask_type: str) -> torch.Tensor:
        assert attn_mask_type == "causal" and attention_mask is None
        assert query.shape[2:] == key.shape[2:] == (self.heads, self.widths[0])
        assert value.shape[2:] == (self.heads, self.widths[1])
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)


def install() -> None:
    """Make `import transformer_engine` find these modules.

    Raises:
        RuntimeError: Megatron-Core is imported already and has looked for the real ones.
    """
    if "megatron.core" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("Megatron-Core looks for Transformer Engine once, when it is imported; install before that")
    absent = type("Absent", (), {})  # base or type of what Megatron-Core names and this library does not use
    recipe = _module("transformer_engine.common.recipe", DelayedScaling=absent)
    common = _module("transformer_engine.common", recipe=recipe)
    pytorch = _module(
        "transformer_engine.pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, GroupedLinear=GroupedLinear,
        RMSNorm=RMSNorm, DotProductAttention=DotProductAttention,
        fp8=_module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=absent, fp8_autocast=absent,
                    fp8_model_init=absent),
        distributed=_module("transformer_engine.pytorch.distributed", CudaRNGStatesTracker=absent,
                            activation_recompute_forward=absent),
        tensor=_module("transformer_engine.pytorch.tensor", QuantizedTensor=absent),
        router=_module("transformer_engine.pytorch.router", fused_compute_score_for_moe_aux_loss=absent,
                       fused_moe_aux_loss=absent, fused_topk_with_score_function=absent))
    _module("transformer_engine", common=common, pytorch=pytorch, __version__="2.20.0")


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for key, value in content.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module
