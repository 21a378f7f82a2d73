"""`BlockAttention` by a fused kernel of torch: one call for each region of a block, and its log-sum-exp.

Flash attention gives the log-sum-exp of what it has seen, and its backward pass takes that of everything and the whole
output: so it serves one block of several. Values are padded to the queries' width, as the kernel wants them alike. On
CUDA the kernel is FlashAttention 2's. It was not run for want of a GPU; its sister for CPUs, with the same arguments
and results, is what tests run.

Source: Dao 2023, arXiv 2307.08691, section 3.1, for the kernel.

Shapes: S sequence, B micro-batch, N heads, A = B N rows of heads, D query and key width, U value width, C positions
looked at.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.ops.block_attention import BlockAttention, Region

# The widest head that FlashAttention 2 takes.
_MOST_WIDTH = 256


def choose_block_attention(setting: str, device: str, value_bytes: int, query_width: int) -> tuple[str, str]:
    """What computes attention to blocks: "flash", the kernel, or "local", products in tiles; and the reason.

    Args:
        setting: Value of `attention_backend` in a run: "auto", "flash" or "local".
        device: "cpu" or "cuda".
        value_bytes: Bytes of a number.
        query_width: Width of a query head, D.

    Raises:
        ConfigError: the kernel was asked for where it cannot be.
    """
    missing = [what for what, is_so in (("no CUDA", device != "cuda"), ("fp32", value_bytes != 2),
                                        (f"heads wider than {_MOST_WIDTH}", query_width > _MOST_WIDTH)) if is_so]
    if setting == "flash" and missing:
        raise ConfigError(f"attention_backend=flash cannot attend to blocks of other ranks here: {', '.join(missing)}; "
                          "leave it at auto")
    if setting == "local" or missing:
        return "local", ", ".join(missing) or "asked for"
    return "flash", "it takes blocks"


def block_attention(backend: str, q_SBND: torch.Tensor, value_width: int, softmax_scale: float
                    ) -> BlockAttention | FusedBlockAttention:
    """Queries that look at blocks, by what `choose_block_attention` said; arguments as of `BlockAttention`."""
    kind = FusedBlockAttention if backend == "flash" else BlockAttention
    return kind(q_SBND, value_width, softmax_scale)


class FusedBlockAttention:
    """Queries, and what they have seen so far; arguments and methods as of `BlockAttention`.

    Args:
        q_SBND: Queries, of a kind that the kernel takes, or any on a CPU.
        value_width: Width of a value, U.
        softmax_scale: Multiplies the scores.
    """

    def __init__(self, q_SBND: torch.Tensor, value_width: int, softmax_scale: float) -> None:
        self.q_SBND, self.value_width, self.softmax_scale = q_SBND, value_width, softmax_scale

    def forward(self) -> FusedForwardPass:
        """Begin to look at blocks."""
        return FusedForwardPass(self)

    def backward(self, grad_out_SBNU: torch.Tensor, out_SBNU: torch.Tensor, logsumexp_AS: torch.Tensor
                 ) -> FusedBackwardPass:
        """Begin to look at the same blocks again; arguments as of `BlockAttention.backward`."""
        return FusedBackwardPass(self, grad_out_SBNU, out_SBNU, logsumexp_AS)

    def operands(self, k_CBND: torch.Tensor, v_CBNU: torch.Tensor, region: Region) -> tuple[torch.Tensor, ...]:
        """Queries, keys and padded values of a region [B, N, positions, D]."""
        keys = _of_region(k_CBND, region, region.keys), self.padded(_of_region(v_CBNU, region, region.keys))
        return _of_region(self.q_SBND, region, region.queries), *keys

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Values, outputs or their gradients, brought to the queries' width."""
        return torch.nn.functional.pad(x, (0, self.q_SBND.shape[-1] - self.value_width))


class FusedForwardPass:
    """The output over the blocks so far.

    Attributes:
        logsumexp_AS: Log-sum-exp of each query's scores, fp32; -inf where nothing was seen.
    """

    def __init__(self, attention: FusedBlockAttention) -> None:
        self._attention, q = attention, attention.q_SBND
        length, batch, heads, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        self._out_SBNU = q.new_zeros(length, batch, heads, attention.value_width, dtype=wide)
        self.logsumexp_AS = q.new_full((batch * heads, length), float("-inf"), dtype=wide)

    def look(self, k_CBND: torch.Tensor, v_CBNU: torch.Tensor, regions: tuple[Region, ...]) -> None:
        """Look at a block; arguments as of `ForwardPass.look`."""
        heads, width = self._attention.q_SBND.shape[2], self._attention.value_width
        for region in regions:
            seen, logsumexp = _forward(self._attention.operands(k_CBND, v_CBNU, region), region.is_causal,
                                       self._attention.softmax_scale)
            before = _statistics(self.logsumexp_AS, heads, region)
            after = torch.logaddexp(before, logsumexp)
            out = _of_region(self._out_SBNU, region, region.queries)
            out.mul_((before - after).exp_().unsqueeze(-1))
            out.addcmul_(seen[..., :width].to(out.dtype), (logsumexp - after).exp_().unsqueeze(-1))
            before.copy_(after)

    def output(self, dtype: torch.dtype) -> torch.Tensor:
        """The output [S, B, N, U], once all blocks were seen."""
        return self._out_SBNU.to(dtype)


class FusedBackwardPass:
    """The gradient of the queries over the blocks so far; arguments as of `BlockAttention.backward`."""

    def __init__(self, attention: FusedBlockAttention, grad_out_SBNU: torch.Tensor, out_SBNU: torch.Tensor,
                 logsumexp_AS: torch.Tensor) -> None:
        self._attention, self._logsumexp_AS = attention, logsumexp_AS
        self._grad_out_SBNU, self._out_SBNU = grad_out_SBNU, out_SBNU
        self._grad_q_SBND = torch.zeros_like(attention.q_SBND, dtype=logsumexp_AS.dtype)

    def look(self, k_CBND: torch.Tensor, v_CBNU: torch.Tensor, regions: tuple[Region, ...]
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at a block; arguments as of `ForwardPass.look`.

        Returns:
            Gradients of the keys and values, of their shapes and dtypes.
        """
        attention, wide = self._attention, self._logsumexp_AS.dtype
        # Contiguous also where keys or values are a part of a wider tensor.
        grad_k_CBND, grad_v_CBNU = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k_CBND, v_CBNU))
        for region in regions:
            of_outputs = [attention.padded(_of_region(x, region, region.queries))
                          for x in (self._grad_out_SBNU, self._out_SBNU)]
            statistics = _statistics(self._logsumexp_AS, attention.q_SBND.shape[2], region)
            grads = _backward(of_outputs, attention.operands(k_CBND, v_CBNU, region), statistics, region.is_causal,
                              attention.softmax_scale)
            for total, places, grad in ((self._grad_q_SBND, region.queries, grads[0]),
                                        (grad_k_CBND, region.keys, grads[1]),
                                        (grad_v_CBNU, region.keys, grads[2][..., : attention.value_width])):
                _of_region(total, region, places).add_(grad)
        return grad_k_CBND.to(k_CBND.dtype), grad_v_CBNU.to(v_CBNU.dtype)

    def grad_q(self, dtype: torch.dtype) -> torch.Tensor:
        """The gradient of the queries [S, B, N, D], once all blocks were seen."""
        return self._grad_q_SBND.to(dtype)


def _of_region(x_SBND: torch.Tensor, region: Region, positions: tuple[int, int]) -> torch.Tensor:
    """A region's part as the kernel wants it, [B, N, positions, D], in place."""
    return x_SBND[slice(*positions), slice(*region.sequences)].permute(1, 2, 0, 3)


def _statistics(logsumexp_AS: torch.Tensor, heads: int, region: Region) -> torch.Tensor:
    """Log-sum-exp of a region's queries [B, N, positions], in place."""
    return logsumexp_AS.unflatten(0, (-1, heads))[slice(*region.sequences), :, slice(*region.queries)]


def _forward(operands: tuple[torch.Tensor, ...], is_causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    aten: Any = torch.ops.aten
    q, k, v = operands
    if q.device.type == "cpu":
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    else:
        out, logsumexp = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    return out, logsumexp


def _backward(of_outputs: list[torch.Tensor], operands: tuple[torch.Tensor, ...], logsumexp: torch.Tensor,
              is_causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    aten: Any = torch.ops.aten
    (grad_out, out), (q, k, v) = of_outputs, operands
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, logsumexp.contiguous(), 0.0, is_causal, scale=scale)
    else:
        # Without dropout there are no random numbers to make again, and of sequences of one length no bounds.
        state, none = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, logsumexp.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, state,
            none, scale=scale)
    return tuple(grads)
