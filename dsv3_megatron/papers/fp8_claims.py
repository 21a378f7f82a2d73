"""What the papers say of FP8: formats, groups of scales, what stays wider, the sums of the tensor core."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter

from dsv3_megatron.config.precision import LinearPrecision, precision_map
from dsv3_megatron.config.weights import sections
from dsv3_megatron.metrics.parameters import optimizer_bytes_per_parameter
from dsv3_megatron.papers.claim import COMPANION, REPORT, Claim
from dsv3_megatron.papers.training_claims import v3_run

_MAP = "dsv3 report --slow"


@lru_cache(maxsize=1)
def _precisions() -> dict[str, LinearPrecision]:
    run = v3_run().override(fp8="blockwise")
    return dict(precision_map(run.fp8, run.model))


def _every(get: Callable[[LinearPrecision], str], ending: str = "") -> str:
    """What the linears of attention and FFNs whose name ends so have: one word if all have the same."""
    return ", ".join(sorted({get(precision) for name, precision in _precisions().items()
                             if name.endswith(ending) and re.search(r"\.(self_attention|mlp)\.", name)}))


def _matrices_not_in_fp8() -> str:
    """Components with a matrix that is in no FP8 product; norms are no matrices."""
    in_fp8 = {name for name, precision in _precisions().items() if precision.is_fp8}
    wide = {weight.component for section in sections(v3_run().model) for weight in section.weights
            if weight.is_matrix and section.ours + weight.module not in in_fp8}
    return ", ".join(sorted(wide))


def _group(of: str) -> str:
    from dsv3_megatron.ops.fp8 import scale_groups

    rows, columns = {"activation": scale_groups.TILE, "weight": scale_groups.SQUARE}[of]
    return f"{rows}x{columns}"


def _promotion() -> float:
    import inspect

    from dsv3_megatron.ops.fp8.gemm import block_gemm

    return float(inspect.signature(block_gemm).parameters["promotion"].default)


def error_without_promotion() -> float:
    """Largest relative error of a product of two random positive matrices, K = 4096, summed as Hopper's tensor core
    does and never promoted to fp32."""
    import dataclasses

    import torch

    from dsv3_megatron.ops.fp8.gemm import block_gemm
    from dsv3_megatron.ops.fp8.quantize import quantize
    from dsv3_megatron.ops.fp8.scale_groups import SQUARE

    generator = torch.Generator().manual_seed(0)
    matrices = (quantize(torch.rand(16, 4096, generator=generator)),
                quantize(torch.rand(16, 4096, generator=generator), SQUARE))
    a, b = (dataclasses.replace(matrix, scales=torch.ones_like(matrix.scales)) for matrix in matrices)
    exact = a.values.double() @ b.values.double().T
    found = block_gemm(a, b, accumulation="fp22_aligned", promotion=None).double()
    return float(((found - exact) / exact).abs().max())


FP8 = (
    Claim("products of a linear layer in FP8", REPORT, "3.3.1", "Fprop, Dgrad, Wgrad",
          lambda: ", ".join(name.capitalize() for name in ("fprop", "dgrad", "wgrad")
                            if _every(attrgetter(name)) == "fp8"), command=_MAP),
    Claim("components that stay wider, of those with a matrix", REPORT, "3.3.1", "embedding, head, router",
          _matrices_not_in_fp8, command=_MAP,
          why="The report's list, less norms and attention operators, which have no matrix. The MTP module's "
              "projection is wider here too, as the published weights have it."),
    Claim("format of the operands", REPORT, "3.3.2", "float8_e4m3fn", lambda: _operand_format(), is_slow=True,
          command=_MAP, why="E4M3 on all tensors; torch's name of it."),
    Claim("group of activations with one scale", REPORT, "3.3.2", "1x128", lambda: _group("activation"), is_slow=True,
          command=_MAP),
    Claim("group of weights with one scale", REPORT, "3.3.2", "128x128", lambda: _group("weight"), is_slow=True,
          command=_MAP),
    Claim("products between two promotions to fp32", REPORT, "3.3.2", "128", _promotion, is_slow=True, command=_MAP),
    Claim("bits that the tensor core keeps of a sum", REPORT, "3.5.2", "14 bits", lambda: _bits_kept(), is_slow=True,
          command=_MAP,
          why="The companion says 13 fraction bits, which with the leading one are 14."),
    Claim("largest error of a product without promotion, K = 4096", REPORT, "3.3.2", "2%",
          error_without_promotion, 0.01, is_slow=True, command=_MAP,
          why="Of two random matrices, whose distribution the report does not say. Positive numbers are the worst case "
              "of a truncating sum, which is what is computed here."),
    Claim("kept input of the linear after attention", REPORT, "3.3.3", "e5m6",
          lambda: _every(lambda precision: precision.cached_input, "self_attention.linear_proj"), command=_MAP),
    Claim("its scales", REPORT, "3.3.3", "power_of_2",
          lambda: _every(lambda precision: precision.input_scales, "self_attention.linear_proj"), command=_MAP),
    Claim("kept input of SwiGLU in experts", REPORT, "3.3.3", "e4m3",
          lambda: _every(lambda precision: precision.cached_input, "mlp.experts.linear_fc2"), command=_MAP,
          why="Its output is computed again in backward."),
    Claim("scales of what is dispatched", REPORT, "3.3.3", "power_of_2",
          lambda: _every(lambda precision: precision.input_scales, "mlp.experts.linear_fc1"), command=_MAP),
    Claim("moments of AdamW", REPORT, "3.3.3", "bf16, bf16",
          lambda: f"{v3_run().training.exp_avg_dtype}, {v3_run().training.exp_avg_sq_dtype}", command=_MAP),
    Claim("bytes of a master weight (FP32)", REPORT, "3.3.3", "4", lambda: float(_master_bytes()), command=_MAP),
    Claim("error of the loss against BF16, 16B and 230B models, 1T tokens", REPORT, "3.3, B.1", "0.25%",
          why="It takes two runs of a 16B model over 1T tokens. docs/experiments has the error on tiny and laptop, and "
              "what another order of sums alone makes."),
    Claim("divergence with gradients in 128x128 blocks, 16B model, 300B tokens", REPORT, "B.2", "(diverges)",
          why="It takes the same run; at the size of tiny nothing is seen (docs/experiments)."),
    Claim("LogFMT-8bit against E4M3, 7B dense models", COMPANION, "3.2", "(better)",
          why="The papers did not use this format either. It would take the format and a dense model."),
)


def _operand_format() -> str:
    import torch

    from dsv3_megatron.ops.fp8.quantize import quantize

    return str(quantize(torch.ones(1, 128)).values.dtype).removeprefix("torch.")


def _bits_kept() -> float:
    """Bits of the significand that the model of the tensor core keeps, by trying smaller and smaller ends."""
    import torch

    from dsv3_megatron.ops.fp8.gemm import truncate_to_fp22

    ends = [end for end in range(1, 24) if truncate_to_fp22(torch.tensor([1 + 2.0 ** -end]))[0] != 1]
    return float(max(ends) + 1)


def _master_bytes() -> int:
    """Bytes of a parameter's master weight: what the optimizer holds less its moments."""
    training = v3_run().training
    moments = sum({"bf16": 2, "fp32": 4}[dtype] for dtype in (training.exp_avg_dtype, training.exp_avg_sq_dtype))
    return optimizer_bytes_per_parameter(training) - moments
