"""Tokens to their experts' ranks once for each node, and sums of what the experts give back, node by node.

    out    token -> each node that has one of its experts, to the rank there with this rank's place
           -> each rank of the node that has one
    home   sum over a rank's experts -> sum over a node's ranks, one row a node over the network -> sum over nodes

Each is the other's backward pass. Out go messages, bytes of which a rank on the way reads the experts' ids alone:

    FP8 record or the row as it is | gates, fp32 [K] | global ids of the token's experts, int16 [K]

Home go rows in the run's precision, backward with the gradients of the gates, fp32 [K]. What has gates takes a multiple
of 16 bytes, as `ops/row_bytes.py` has it. Sums are in fp32 and rounded when they travel on.

Shapes: T tokens, R rows that come to a rank, each token once, K top-k, H hidden.

Source: DeepSeek-V3 report, section 3.2.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.row_bytes import ALIGNMENT
from dsv3_megatron.ops.row_sums import add_rows
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, post_all_to_all
from dsv3_megatron.parallel.hops import post_hops
from dsv3_megatron.parallel.route import Leg, Route

ID_DTYPE, GATE_DTYPE = torch.int16, torch.float32
# Makes of a leg's bytes or rows what travels on.
Passing = Callable[[Leg, torch.Tensor], torch.Tensor]


@dataclass
class Outward:
    """Tokens on their way to the experts' ranks; backward their gradients and those of the gates.

    Attributes:
        route: Ways of the tokens.
        ids_TK: int64, global ids of each token's experts, until they have left.
        backend: Packs rows in FP8; None: they travel as they are.
        arrived_ids: int16 [R, K], ids with the rows that came.
    """

    route: Route
    ids_TK: torch.Tensor | None
    backend: ReferenceBackend | None
    arrived_ids: torch.Tensor | None = None

    def start(self, post: PostAllToAll, *tensors: torch.Tensor) -> _Arriving:
        """Send tokens [..., H] and gates [T, K]; rows [R, H] and gates [R, K] will come."""
        x, gates_TK = tensors
        assert self.ids_TK is not None, "tokens leave once"
        self.shape, self.dtype, self.top_k = x.shape, x.dtype, gates_TK.shape[1]
        self.like = x.new_empty(0)
        x_TH = x.reshape(-1, x.shape[-1])
        rows = as_bytes(x_TH) if self.backend is None else self.backend.pack_rows(x_TH.detach())
        message, self.ends = joined(rows, as_bytes(gates_TK.to(GATE_DTYPE)), as_bytes(self.ids_TK.to(ID_DTYPE)))
        self.ids_TK = None
        self.route.settle()

        def pass_on(leg: Leg, came: torch.Tensor) -> torch.Tensor:
            self.route.relay(leg, self._ids(came))
            return came.index_select(0, _relayed(leg))

        return _Arriving(_send_out(self.route, message, pass_on, post), self._unpack)

    def _ids(self, message: torch.Tensor) -> torch.Tensor:
        return columns(message, self.ends[1], self.ends[2], ID_DTYPE)

    def _unpack(self, messages: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        message = _one(messages)
        self.arrived_ids = self._ids(message).contiguous()
        gates_RK = columns(message, self.ends[0], self.ends[1], GATE_DTYPE).contiguous()
        if self.backend is not None:
            records = message[:, :self.ends[0]].contiguous()
            return self.backend.unpack_rows(records, self.shape[-1], self.dtype), gates_RK
        return columns(message, 0, self.ends[0], self.dtype).contiguous(), gates_RK

    def start_backward(self, post: PostAllToAll, *grads: torch.Tensor | None) -> _Arriving:
        """Send the gradients of the rows and gates home; those of the tokens and their gates will come."""
        rows, gates = grads
        width, num_rows = self.shape[-1], self.route.num_rows
        # Every rank sends, also where a value was not used.
        rows = self.like.new_zeros(num_rows, width) if rows is None else rows
        gates = self.like.new_zeros(num_rows, self.top_k, dtype=GATE_DTYPE) if gates is None else gates
        message, (bound, end) = joined(as_bytes(rows), as_bytes(gates))

        def summed(came: torch.Tensor, row_of: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
            return (add_rows(columns(came, 0, bound, self.dtype), row_of, num, self.dtype),
                    add_rows(columns(came, bound, end, GATE_DTYPE), row_of, num, GATE_DTYPE))

        def pass_on(leg: Leg, came: torch.Tensor) -> torch.Tensor:
            return joined(*map(as_bytes, summed(came, _relayed(leg), leg.num_passing)))[0]

        def finish(messages: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            parts = [summed(came, leg.token_of_row, leg.num_tokens)
                     for leg, came in zip(self.route.legs, messages, strict=True)]
            x, gates = (_one(list(tensors)) for tensors in zip(*parts, strict=True))
            return x.view(self.shape), gates

        return _Arriving(_send_home(self.route, message, pass_on, post), finish)


@dataclass
class Homeward:
    """Sums over the experts of a rank on their way to the tokens; backward the tokens' gradients.

    Attributes:
        route: Ways of the tokens.
        backend: Packs gradients in FP8; None: they travel as they are.
    """

    route: Route
    backend: ReferenceBackend | None

    def start(self, post: PostAllToAll, *tensors: torch.Tensor) -> _Arriving:
        """Send rows [R, H]; [T, H] will come."""
        (rows,) = tensors
        self.width, self.dtype, self.like = rows.shape[1], rows.dtype, rows.new_empty(0)

        def pass_on(leg: Leg, came: torch.Tensor) -> torch.Tensor:
            return add_rows(came, _relayed(leg), leg.num_passing, self.dtype)

        def finish(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return (_one([add_rows(came, leg.token_of_row, leg.num_tokens, self.dtype)
                          for leg, came in zip(self.route.legs, rows, strict=True)]),)

        return _Arriving(_send_home(self.route, rows, pass_on, post), finish)

    def start_backward(self, post: PostAllToAll, *grads: torch.Tensor | None) -> _Arriving:
        """Send the gradients of tokens [T, H]; those of the rows [R, H] will come."""
        (grad_TH,) = grads
        grad_TH = self.like.new_zeros(self.route.num_tokens, self.width) if grad_TH is None else grad_TH
        backend = self.backend
        message = grad_TH if backend is None else backend.pack_rows(grad_TH)

        def finish(messages: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            came = _one(messages)
            return (came if backend is None else backend.unpack_rows(came, self.width, self.dtype),)

        return _Arriving(_send_out(self.route, message, lambda leg, came: came.index_select(0, _relayed(leg)), post),
                         finish)


@dataclass
class _Arriving:
    """The rows of every leg under way, and what makes tensors of them when they are there."""

    legs: list[Posted]
    finish: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]

    def wait(self) -> tuple[torch.Tensor, ...]:
        return self.finish([leg.wait() for leg in self.legs])


def _send_out(route: Route, tokens: torch.Tensor, pass_on: Passing, post: PostAllToAll) -> list[Posted]:
    """Copies of tokens' rows, or messages, to the ranks of their experts."""
    return [post_hops(tokens[leg.tokens].index_select(0, leg.token_of_row), leg.hops, partial(pass_on, leg), post)
            for leg in route.legs]


def _send_home(route: Route, rows: torch.Tensor, pass_on: Passing, post: PostAllToAll) -> list[Posted]:
    """Rows of the experts' ranks to those of the tokens."""
    parts = rows.split([leg.num_rows for leg in route.legs])
    return [post_hops(part, leg.homeward, partial(pass_on, leg), post)
            for leg, part in zip(route.legs, parts, strict=True)]


def _relayed(leg: Leg) -> torch.Tensor:
    assert leg.row_of_relayed is not None, "the rows have gone out before"
    return leg.row_of_relayed


def _one(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def travel(carrier: Outward | Homeward, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Send and wait, differentiably, for a layer that runs in one piece."""
    return _Travel.apply(carrier, *tensors)


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Outward | Homeward, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.carrier = carrier
        return carrier.start(post_all_to_all, *tensors).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return None, *ctx.carrier.start_backward(post_all_to_all, *grads).wait()


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Rows as bytes, uint8 [R, bytes of a row], without history."""
    return rows.detach().contiguous().view(torch.uint8)


def joined(*parts: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Bytes [R, bytes of each part] behind each other, filled up to a multiple of 16; and where each part ends."""
    ends = tuple(itertools.accumulate(part.shape[1] for part in parts))
    spare = -ends[-1] % ALIGNMENT
    fill = [parts[0].new_zeros(len(parts[0]), spare)] if spare else []
    return torch.cat([*parts, *fill], dim=1), ends


def columns(message: torch.Tensor, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Read bytes start..end of each row as another dtype; in place where they lie at multiples of its size."""
    size = dtype.itemsize
    if any(place % size for place in (start, end, message.shape[1])) or not message.is_contiguous():
        return message[:, start:end].contiguous().view(dtype)
    return message.view(dtype)[:, start // size:end // size]
