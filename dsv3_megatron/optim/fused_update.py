"""The update of many weights in one launch: where their pieces lie in a GPU's memory, and the keys of their rounding.

A piece is what a parameter's block (`rounding.BLOCK` elements that share a key) has in one weight. Their table is sent
to the GPU when an address has changed, the keys at each step. The kernel is `kernels/weight_update.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.optim.rounding import BLOCK, noise_key, noise_table
from dsv3_megatron.optim.shards import Named
from dsv3_megatron.platform.sending import send_integers

MOMENTS = ("exp_avg", "exp_avg_sq")


def blocks(named: Named) -> Iterator[tuple[int, int, slice]]:
    """Elements of a shard, cut at multiples of BLOCK of the parameter: an element's block is the same whoever owns it.

    Yields the block's number, the offset in the block and the elements of the shard.
    """
    first, last = named.first, named.first + named.end - named.start
    while first < last:
        stop = min(last, (first // BLOCK + 1) * BLOCK)
        start = named.start + first - named.first
        yield first // BLOCK, first % BLOCK, slice(start, start + stop - first)
        first = stop


@dataclass(frozen=True)
class Operands:
    """Tensors of one weight, of as many elements and contiguous: fp32 weight and gradient, two moments.

    Attributes:
        weight: fp32 master weight.
        gradient: fp32 gradient.
        moments: First and second moment, fp32 or bf16.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of the four in the device's memory."""
        return (self.weight.data_ptr(), self.gradient.data_ptr(), self.moments[0].data_ptr(),
                self.moments[1].data_ptr())


@dataclass
class _Table:
    addresses: list[tuple[int, int, int, int]]
    pieces_P6: torch.Tensor
    names: list[tuple[str, int]]  # of each piece: parameter and block
    longest: int


class FusedUpdate:
    """AdamW on weights of one device by one launch for each group of parameters.

    Args:
        names: Parts of parameters that each weight holds.
        is_stochastic: Round bf16 moments stochastically instead of to nearest.
        seed: Seed of the rounding.
    """

    def __init__(self, names: Mapping[torch.Tensor, Sequence[Named]], *, is_stochastic: bool, seed: int) -> None:
        self.names, self.is_stochastic, self.seed = names, is_stochastic, seed
        self._tables: dict[int, _Table] = {}
        self._bits: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, index: int, operands: Sequence[Operands], group: Mapping[str, Any]) -> None:
        """Update the weights of a group.

        Args:
            index: Number of the group, by which its table is kept.
            operands: Weights of the group with their gradients and moments.
            group: lr, betas, eps, weight_decay and step, as torch's parameter groups have them.

        Raises:
            ValueError: A gradient that is not fp32.
        """
        from dsv3_megatron.kernels.weight_update import Settings, update_pieces

        table, device = self._table(index, operands), operands[0].weight.device
        keys = None
        if self.is_stochastic:
            keys = send_integers([[noise_key(self.seed, f"{name}.{moment}", group["step"], block) for moment in MOMENTS]
                                  for name, block in table.names], device)
        beta1, beta2 = group["betas"]
        update_pieces(
            table.pieces_P6, keys, self._random_bits(device),
            Settings(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"]),
            are_narrow=(operands[0].moments[0].dtype == torch.bfloat16, operands[0].moments[1].dtype == torch.bfloat16),
            longest=table.longest)

    def _table(self, index: int, operands: Sequence[Operands]) -> _Table:
        addresses = [each.addresses for each in operands]
        known = self._tables.get(index)
        if known is not None and known.addresses == addresses:
            return known
        rows, names = [], []
        for each, begins in zip(operands, addresses, strict=True):
            if each.gradient.dtype != torch.float32:
                raise ValueError(f"a gradient is {each.gradient.dtype}: this update takes float32; keep gradients in "
                                 "fp32, as the distributed optimizer does")
            sizes = [tensor.element_size() for tensor in (each.weight, each.gradient, *each.moments)]
            for named in self.names[each.weight]:
                for block, offset, part in blocks(named):
                    places = [begin + size * part.start for begin, size in zip(begins, sizes, strict=True)]
                    rows.append([*places, part.stop - part.start, offset])
                    names.append((named.name, block))
        table = _Table(addresses, send_integers(rows, operands[0].weight.device, torch.int64), names,
                       max((row[4] for row in rows), default=0))
        self._tables[index] = table
        return table

    def _random_bits(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if not self.is_stochastic:
            return ()
        if device not in self._bits:
            self._bits[device] = (noise_table(0, device), noise_table(1, device))
        return self._bits[device]
