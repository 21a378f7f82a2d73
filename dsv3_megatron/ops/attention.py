"""Causal core attention with values narrower than queries and keys, as multi-head latent attention needs it.

`scaled_dot_product_attention` leaves its fused kernels when the value width differs. Forward + backward of
[S=512, B=4, N=8, 96/64] in fp32 on one AVX2 core took 313 ms so, 200 to 223 ms with values padded to 96, and 94 ms with
the blocked version below (138 ms in bf16), which skips the blocks above the diagonal, works on tiles that stay in cache
and computes in fp32. What a GPU runs is chosen in `attention_choices.py`; none of it has been run.

Documents that are packed into one sequence and shall not see each other are attended to one by one: no [S, S] mask is
made, and tiles of scores between documents are not computed. Each sequence of the micro-batch has documents of its own.

Shapes: S sequence, B micro-batch, N heads, D query and key width, U value width, A = B N rows of heads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.ops.attention_choices import KEEP_RESULT, PADDED, AttentionCase, choose_attention
from dsv3_megatron.ops.backend import log_choice, unknown_backend, wide_dtype
from dsv3_megatron.ops.recompute import held, is_recomputed, recomputed, saving
from dsv3_megatron.ops.softmax import softmax_, softmax_and_logsumexp_
from dsv3_megatron.ops.steady_sums import steady_context, steady_scores

BACKENDS = ("auto", "blocked", "engine", "cudnn", "flash3", "flash_padded", "sdpa_padded", "sdpa", "reference")

# Of each sequence: where its documents begin, from 0, and at the end its length.
DocumentBounds = tuple[tuple[int, ...], ...]
# Neighbouring sequences with the same documents, as (first sequence, end), and the (start, end) of these documents.
_Group = tuple[tuple[int, int], tuple[tuple[int, int], ...]]

QUERY_BLOCK = 128
# A tile of scores [heads, QUERY_BLOCK, S] should stay in a core's L2 cache.
TILE_BYTES = 1 << 20
# Probabilities are kept for backward up to this size a call, beyond it they are recomputed.
_KEPT_PROBABILITY_BYTES = 64 << 20


def causal_attention(
    q_SBND: torch.Tensor,
    k_SBND: torch.Tensor,
    v_SBNU: torch.Tensor,
    *,
    softmax_scale: float,
    document_bounds: DocumentBounds | None = None,
    first_queries: tuple[int, ...] | None = None,
    is_steady: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T) v over the positions up to and including each query's own.

    Args:
        q_SBND: Queries, bf16, fp32 or fp64; [S, N, D] is one sequence.
        k_SBND: Keys, of the queries' shape and dtype.
        v_SBNU: Values, of any width.
        softmax_scale: Multiplies the scores.
        document_bounds: One row for each of the B sequences, 0 = b_0 <= b_1 <= ... <= b_n = S: positions b_i to
            b_(i+1) - 1 see each other and nothing else. Plain numbers, so that no layer waits for the device to read
            them. None is one document a sequence.
        first_queries: Number, for each document of a single sequence with `document_bounds`, of its first positions
            whose results are not read: they may be anything, and no gradient comes from them. "blocked" leaves out the
            blocks of queries that have no others; the rest of the arithmetic is the same. None: all are read.
        is_steady: Whether "blocked" sums so that a position's result has the bits that generation gives it
            (`steady_sums.py`); other backends do as ever.
        backend: One of `BACKENDS`, as `attention_choices.py` explains them; "sdpa" leaves the choice to torch. "auto"
            is what is chosen there for a run that sets nothing.

    Returns:
        [S, B, N, U] (or [S, N, U]), contiguous, in v's dtype.

    Raises:
        ValueError: Unknown backend, shapes that do not fit, or bounds that do not run from 0 to S in each sequence.

    Source: DeepSeek-V3 report, section 2.1.1, eq. 10. Its pre-training packs documents without isolating them (section
    4.1).
    """
    if backend not in BACKENDS:
        raise unknown_backend("causal_attention", backend, BACKENDS)
    if backend == "auto":
        case = attention_case(q_SBND.device.type, q_SBND.element_size(), q_SBND.shape[-1], v_SBNU.shape[-1],
                              has_documents=document_bounds is not None)
        backend, reason = choose_attention("auto", case)
        log_choice("causal_attention", backend, reason)
    if q_SBND.shape != k_SBND.shape or k_SBND.shape[:-1] != v_SBNU.shape[:-1]:
        raise ValueError(
            f"causal_attention: shapes q {tuple(q_SBND.shape)}, k {tuple(k_SBND.shape)}, v {tuple(v_SBNU.shape)} "
            "must agree, except v in its last dimension; repeat shared keys per head"
        )
    if q_SBND.dim() == 3:
        packed = (t.unsqueeze(1) for t in (q_SBND, k_SBND, v_SBNU))
        return causal_attention(
            *packed, softmax_scale=softmax_scale, document_bounds=document_bounds, is_steady=is_steady, backend=backend
        ).squeeze(1)
    groups = group_sequences(document_bounds, *q_SBND.shape[:2])
    if backend == "blocked":
        with saving():
            return _BlockedAttention.apply(q_SBND, k_SBND, v_SBNU, softmax_scale, groups, first_queries, is_steady)
    with saving():
        return _attend_by_document(q_SBND, k_SBND, v_SBNU, softmax_scale, groups, backend)


@functools.cache
def attention_case(device: str, value_bytes: int, query_width: int, value_width: int, *, has_documents: bool
                   ) -> AttentionCase:
    """What attention is computed on in this process: its GPU, packages and cuDNN; arguments as in `AttentionCase`."""
    if device != "cuda":
        return AttentionCase("cpu", (0, 0), value_bytes, query_width, value_width, has_documents, frozenset(), 0)
    packages = frozenset(name for name in ("transformer_engine", "flash_attn_interface")
                         if is_installed(name))
    return AttentionCase("cuda", torch.cuda.get_device_capability(), value_bytes, query_width, value_width,
                         has_documents, packages, torch.backends.cudnn.version() or 0)


def _attend_by_document(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float,
                        groups: tuple[_Group, ...], backend: str) -> torch.Tensor:
    attend = _ATTENDS[backend]
    padded_width = q_SBND.shape[-1] if backend in PADDED else v_SBNU.shape[-1]
    columns = []
    for (first, last), documents in groups:
        parts = []
        for start, end in documents:
            q, k, v = (t[start:end, first:last] for t in (q_SBND, k_SBND, v_SBNU))
            parts.append(attend(q, k, v, softmax_scale, padded_width))
        columns.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    whole = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    result = whole.contiguous()
    is_kernels_own = len(columns) == len(groups[0][1]) == 1 and result is whole
    return held(result) if is_kernels_own and backend in KEEP_RESULT else result


def reference_attention(
    q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float, _: int = 0
) -> torch.Tensor:
    """The formula with the whole score matrix, in fp32 or fp64."""
    q, k, v = (t.to(wide_dtype(t.dtype)) for t in (q_SBND, k_SBND, v_SBNU))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * softmax_scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnv->sbnv", probabilities, v).to(v_SBNU.dtype)


def group_sequences(document_bounds: DocumentBounds | None, length: int, batch: int) -> tuple[_Group, ...]:
    """Documents of all sequences: neighbours that are cut alike, and the first position and end of each document.

    Raises:
        ValueError: bounds that do not run from 0 to the length in each of `batch` sequences.
    """
    if document_bounds is None:
        return (((0, batch), ((0, length),)),)
    if len(document_bounds) != batch:
        raise ValueError(
            f"document_bounds has {len(document_bounds)} rows, the micro-batch {batch} sequences; give each its own row"
        )
    for row, bounds in enumerate(document_bounds):
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or list(bounds) != sorted(bounds):
            raise ValueError(
                f"document_bounds[{row}]={list(bounds)} must rise from 0 to the sequence length {length}; drop the "
                "padding"
            )
    groups, first = [], 0
    for bounds, rows in itertools.groupby(document_bounds):
        last = first + len(list(rows))
        documents = tuple((start, end) for start, end in itertools.pairwise(bounds) if end > start)
        groups.append(((first, last), documents))
        first = last
    return tuple(groups)


def _sdpa(
    q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float, padded_width: int
) -> torch.Tensor:
    width = v_SBNU.shape[-1]
    if padded_width > width:
        pad = partial(torch.nn.functional.pad, pad=(0, padded_width - width))
        # What is made again of values that are made again need not be kept either.
        v_SBNU = recomputed(pad, v_SBNU) if is_recomputed(v_SBNU) else pad(v_SBNU)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBND, v_SBNU))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    return out[..., :width].permute(2, 0, 1, 3)


def _sdpa_by(kernel: SDPBackend) -> _Attend:
    def attend(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float,
               padded_width: int) -> torch.Tensor:
        with sdpa_kernel([kernel]):
            return _sdpa(q_SBND, k_SBND, v_SBNU, softmax_scale, padded_width)

    return attend


def _flash3(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float, _: int
            ) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(*(t.transpose(0, 1) for t in (q_SBND, k_SBND, v_SBNU)), softmax_scale=softmax_scale,
                          causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)


def _engine(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float, _: int
            ) -> torch.Tensor:
    attention = _engine_module(q_SBND.shape[2], q_SBND.shape[3], v_SBNU.shape[3], softmax_scale)
    return attention(q_SBND.contiguous(), k_SBND.contiguous(), v_SBNU.contiguous()).view(v_SBNU.shape)


@functools.cache
def _engine_module(heads: int, query_width: int, value_width: int, softmax_scale: float) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, (query_width, value_width), attention_dropout=0.0, qkv_format="sbhd",
                               attn_mask_type="causal", softmax_scale=softmax_scale)


_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int], torch.Tensor]
_ATTENDS: dict[str, _Attend] = {
    "reference": reference_attention, "sdpa": _sdpa, "sdpa_padded": _sdpa, "engine": _engine, "flash3": _flash3,
    "cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION), "flash_padded": _sdpa_by(SDPBackend.FLASH_ATTENTION),
}


def head_major(x_SBND: torch.Tensor) -> torch.Tensor:
    """Turn [S, B, N, D] into contiguous fp32 or fp64 [A, S, D], in one pass."""
    out = torch.empty(
        (*x_SBND.shape[1:3], x_SBND.shape[0], x_SBND.shape[3]), dtype=wide_dtype(x_SBND.dtype), device=x_SBND.device
    )
    return out.copy_(x_SBND.permute(1, 2, 0, 3)).flatten(0, 1)


def _operands(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBNU: torch.Tensor, softmax_scale: float
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled queries, keys and values as products want them."""
    return head_major(q_SBND).mul_(softmax_scale), head_major(k_SBND), head_major(v_SBNU)


def _tiles(heads: int, groups: tuple[_Group, ...], first_queries: tuple[int, ...] | None
           ) -> list[tuple[slice, int, slice]]:
    """(rows of heads, document start, queries) of every tile; its keys run from that start to its last query."""
    tiles = []
    for (first_sequence, last_sequence), documents in groups:
        first_row, last_row = first_sequence * heads, last_sequence * heads
        for number, (start, end) in enumerate(documents):
            unread = 0 if first_queries is None else first_queries[number] // QUERY_BLOCK * QUERY_BLOCK
            rows = max(1, min(last_row - first_row, TILE_BYTES // (4 * QUERY_BLOCK * (end - start))))
            for row in range(first_row, last_row, rows):
                for first in range(start + unread, end, QUERY_BLOCK):
                    queries = slice(first, min(first + QUERY_BLOCK, end))
                    tiles.append((slice(row, min(row + rows, last_row)), start, queries))
    return tiles


def _scores(q: torch.Tensor, k: torch.Tensor, tile: tuple[slice, int, slice], future: torch.Tensor, is_steady: bool
            ) -> torch.Tensor:
    rows, start, queries = tile
    left, right = q[rows, queries], k[rows, start : queries.stop]
    scores = steady_scores(left, right) if is_steady else torch.bmm(left, right.transpose(1, 2))
    size = queries.stop - queries.start
    scores[:, :, -size:].add_(future[:size, :size])
    return scores


def future_mask(like: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers [size, size] to add to scores of neighbouring queries and keys: -inf where a key comes later, else 0."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


class _BlockedAttention(torch.autograd.Function):
    """Attention by tiles of queries, with probabilities kept or, above a size, recomputed from the log-sum-exp.

    Source of the recomputation: Dao et al. 2022, arXiv 2205.14135, section 3.1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SBND: torch.Tensor,
        k_SBND: torch.Tensor,
        v_SBNU: torch.Tensor,
        softmax_scale: float,
        groups: tuple[_Group, ...],
        first_queries: tuple[int, ...] | None,
        is_steady: bool,
    ) -> torch.Tensor:
        inputs = (q_SBND, k_SBND, v_SBNU)
        q, k, v = _operands(*inputs, softmax_scale)
        num_rows, length, width = v.shape
        heads = v_SBNU.shape[2]
        out_SAU = torch.empty((length, num_rows, width), dtype=v.dtype, device=v.device)
        out = out_SAU.transpose(0, 1)
        tiles, future = _tiles(heads, groups, first_queries), future_mask(q, QUERY_BLOCK)
        # Half of each document's square, 4 bytes.
        kept_bytes = sum((last - first) * heads * (end - start) ** 2 * 2
                         for (first, last), documents in groups for start, end in documents)
        keep = kept_bytes <= _KEPT_PROBABILITY_BYTES
        kept: list[torch.Tensor] = []
        for tile in tiles:
            rows, start, queries = tile
            probabilities = _scores(q, k, tile, future, is_steady)
            logsumexp = softmax_and_logsumexp_(probabilities) if not keep else None
            if logsumexp is None:
                softmax_(probabilities)
            if is_steady:
                out[rows, queries] = steady_context(probabilities, v[rows, start : queries.stop])
            else:
                torch.bmm(probabilities, v[rows, start : queries.stop], out=out[rows, queries])
            kept.append(probabilities if logsumexp is None else logsumexp)
        # Inputs that are computed again are brought into this form again.
        ctx.keeps_inputs = all(is_recomputed(tensor) for tensor in inputs)
        ctx.save_for_backward(*(inputs if ctx.keeps_inputs else (q, k, v)), *kept)
        ctx.tiles, ctx.keep, ctx.softmax_scale, ctx.is_steady = tiles, keep, softmax_scale, is_steady
        ctx.batch, ctx.dtypes = v_SBNU.shape[1], (q_SBND.dtype, k_SBND.dtype, v_SBNU.dtype)
        return out_SAU.view(v_SBNU.shape).to(v_SBNU.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        if ctx.keeps_inputs:
            q, k, v = _operands(q, k, v, ctx.softmax_scale)
        grad_out = head_major(grads[0])
        num_rows, length, _ = q.shape
        # Sequence-major results, addressed head-major: what follows wants [S, B, N, D] contiguous.
        grads_SA = [torch.zeros((length, num_rows, t.shape[-1]), dtype=t.dtype, device=t.device) for t in (q, k, v)]
        grad_q, grad_k, grad_v = (t.transpose(0, 1) for t in grads_SA)
        future = future_mask(q, QUERY_BLOCK)
        for tile, saved in zip(ctx.tiles, kept, strict=True):
            rows, start, queries = tile
            keys = slice(start, queries.stop)
            if ctx.keep:
                probabilities = saved
            else:
                probabilities = _scores(q, k, tile, future, ctx.is_steady).sub_(saved.unsqueeze(-1)).exp_()
            grad_tile = grad_out[rows, queries]
            grad_v[rows, keys].baddbmm_(probabilities.transpose(1, 2), grad_tile)
            grad_probabilities = torch.bmm(grad_tile, v[rows, keys].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
            grad_q[rows, queries].baddbmm_(grad_scores, k[rows, keys], alpha=ctx.softmax_scale)
            grad_k[rows, keys].baddbmm_(grad_scores.transpose(1, 2), q[rows, queries])  # q holds the scale
        del grad_out, grad_tile, grad_probabilities, grad_scores, future  # before narrow copies are made
        shaped = [t.view(length, ctx.batch, -1, t.shape[-1]).to(d) for t, d in zip(grads_SA, ctx.dtypes, strict=True)]
        return (*shaped, None, None, None, None)
