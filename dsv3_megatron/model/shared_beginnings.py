"""Documents of a micro-batch that others go on from: what core attention needs to let those see them.

A prompt with several answers is computed once: the prompt is a document, and each answer is one that goes on from it,
sees it, and does not see the other answers. All that a layer does with a token by itself is done once for the prompt.
Core attention alone looks at other tokens, and gets each answer behind a copy of the prompt's queries, keys and values,
as documents that are by themselves. Its arithmetic is then that of whole documents, by any of its backends and to the
bit; of the copies' results the first one's are taken, for all of them are alike, and the others' need not be there. In
backward the gradients of the copies are summed.

Legend: S positions, B sequences, N heads, D query width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsv3_megatron.ops.attention import DocumentBounds


@dataclass(frozen=True)
class SharedBeginnings:
    """Places of a micro-batch's tokens among its documents by themselves, which have T of them.

    Attributes:
        continued: Number, for each document of each sequence, of the one that it goes on from, or its own.
        bounds: Bounds of the documents by themselves, behind each other in one row, from 0 to T.
        first_queries: Number, for each document by itself, of its first tokens whose results are taken from another.
        sources_T: int64, the place of each of their tokens in the micro-batch, s B + b.
        own_SB: int64 [S B], where each position of the micro-batch is among the T tokens first.
        back_T: int64, of each of the T tokens its place in the micro-batch if it is its position's first, else S B.
        copies: Further copies of beginnings, each with its sequence, its first position and end there, and its first
            token among the T.
    """

    continued: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]
    first_queries: tuple[int, ...]
    sources_T: torch.Tensor
    own_SB: torch.Tensor
    back_T: torch.Tensor
    copies: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, bounds: DocumentBounds, continued: tuple[tuple[int, ...], ...], device: torch.device
           ) -> SharedBeginnings:
        """The places of a micro-batch's tokens.

        Args:
            bounds: Bounds of the documents of each sequence.
            continued: Number, for each document of each sequence, of the one that it goes on from, or its own; an empty
                row where none of a sequence does.
            device: Device of the places.
        """
        num_rows, length = len(bounds), bounds[0][-1]
        continued = tuple(row or tuple(range(len(bounds[number]) - 1)) for number, row in enumerate(continued))
        own_BS = np.full((num_rows, length), -1, dtype=np.int64)
        sources: list[np.ndarray] = []
        copies: list[tuple[int, int, int, int]] = []
        ends, first_queries, total = [0], [], 0
        for row, (starts, before) in enumerate(zip(bounds, continued, strict=True)):
            begun = {beginning for number, beginning in enumerate(before) if beginning != number}
            for number, beginning in enumerate(before):
                if number in begun:
                    continue
                first_queries.append(0)
                for part in (number,) if beginning == number else (beginning, number):
                    start, end = starts[part], starts[part + 1]
                    sources.append(np.arange(start, end) * num_rows + row)
                    if own_BS[row, start] < 0:
                        own_BS[row, start:end] = np.arange(total, total + end - start)
                    else:
                        copies.append((row, start, end, total))
                        first_queries[-1] = end - start
                    total += end - start
                ends.append(total)
        sources_T, own_SB = np.concatenate(sources), own_BS.T.flatten()
        back_T = np.full(len(sources_T), length * num_rows, dtype=np.int64)
        back_T[own_SB] = np.arange(length * num_rows)
        on_device = [torch.from_numpy(places).to(device, non_blocking=True) for places in (sources_T, own_SB, back_T)]
        return cls(continued, tuple(ends), tuple(first_queries), on_device[0], on_device[1], on_device[2],
                   tuple(copies))

    def apart(self, *values_SBND: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values [S, B, N, D] of the micro-batch's positions -> [T, 1, N, D] of the documents by themselves."""
        return tuple(_Apart.apply(values, self) for values in values_SBND)

    def together(self, values_TND: torch.Tensor) -> torch.Tensor:
        """Values [T, 1, N, D] of the documents by themselves -> [S, B, N, D] of the micro-batch's positions."""
        return _Together.apply(values_TND, self)


class _Apart(torch.autograd.Function):
    """Copies rows; their gradients are summed by slices, which costs less than an indexed sum does."""

    @staticmethod
    def forward(ctx: Any, values_SBND: torch.Tensor, shared: SharedBeginnings) -> torch.Tensor:
        ctx.shared, ctx.shape = shared, values_SBND.shape
        return values_SBND.flatten(0, 1).index_select(0, shared.sources_T).unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        shared, grad_TND = ctx.shared, grads[0].squeeze(1)
        grad_SBND = grad_TND.index_select(0, shared.own_SB).view(ctx.shape)
        for row, start, end, first in shared.copies:
            grad_SBND[start:end, row] += grad_TND[first: first + end - start]
        return grad_SBND, None


class _Together(torch.autograd.Function):
    """Takes rows; those that are not taken have a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, values_TND: torch.Tensor, shared: SharedBeginnings) -> torch.Tensor:
        ctx.shared = shared
        rows = values_TND.squeeze(1).index_select(0, shared.own_SB)
        return rows.view(-1, len(shared.continued), *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = grads[0].flatten(0, 1)
        with_zero = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return with_zero.index_select(0, ctx.shared.back_T).unsqueeze(1), None
