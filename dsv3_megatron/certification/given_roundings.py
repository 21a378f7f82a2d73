"""Roundings to FP8 that the order of a sum decides, noted in one run and taken by another.

FP8's next value is 6 to 12% away. A sum that is taken in another order is off by some 1e-7, and where it lies that near
to the middle between two values, it is rounded to the other one. That is no fault. But what follows differs by percents
then, and a few roundings later everything does: two sound runs in FP8 are as far apart as two different ones.

So one run notes the values that lie near a middle, and to which side each went. Another, which computes the same in
another order, takes the side that was noted for such a value, and its own side for all others. A side is only ever
taken for a value that itself lies within `MARGIN` of the middle, so each run is one that FP8 allows, whatever was
noted: a fault cannot hide in what is taken. What is compared then agrees nearly as well as without FP8.

Values are told apart by themselves, not by where they are: by the format, the middle, the largest value of the group
and their distance from the middle. No layout has to be known for that. (The scale would not do: where scales are powers
of two, many groups have the same.) A group that another layout forms of other tokens (weight gradients have a scale for
128 tokens of a channel) has another largest value, and rounds as it does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from dsv3_megatron.certification.routing_notes import replaced
from dsv3_megatron.ops.fp8 import quantize
from dsv3_megatron.ops.fp8.quantize import FORMAT_MAX
from dsv3_megatron.ops.fp8.scale_groups import Group, join_groups, split_into_groups, spread

# Distance from a middle within which the order of a sum may decide, of the largest value that the format has.
MARGIN = 4e-6
# Two runs have the same group where their largest values are within a step of 1e-5 of each other.
_STEPS_PER_OCTAVE = 1 << 16
# Bits of the representation in which a step to the next value is 1, or more where the last bits are always zero.
_UNIT = {"e4m3": 1, "e5m6": 16}

# Format, code of the value above the middle with its sign, and the largest value of the group in steps of 1e-5.
Key = tuple[str, int, int]


@dataclass
class Roundings:
    """Values near a middle, by key: each one's distance from the middle in parts of the largest value, and its side."""

    sides: dict[Key, list[tuple[float, bool]]] = field(default_factory=dict)

    def note(self, key: Key, distance: float, is_up: bool) -> None:
        """Keep a value's side."""
        known = self.sides.setdefault(key, [])
        if (distance, is_up) not in known:
            known.append((distance, is_up))

    def find(self, key: Key, distance: float) -> bool | None:
        """The side of the value that is most like this one; None where there is none."""
        form, code, largest = key
        near = [(abs(noted - distance), is_up) for step in (-1, 0, 1)
                for noted, is_up in self.sides.get((form, code, largest + step), ())]
        return min(near)[1] if near else None

    def add(self, other: Roundings) -> None:
        """Take in what another rank has noted."""
        for key, values in other.sides.items():
            for distance, is_up in values:
                self.note(key, distance, is_up)


# By the name of a pass.
RoundingNotes = dict[str, Roundings]


def merge_roundings(ranks: Iterable[RoundingNotes]) -> RoundingNotes:
    """The notes of all ranks of a run as one."""
    merged: RoundingNotes = {}
    for notes in ranks:
        for name, roundings in notes.items():
            merged.setdefault(name, Roundings()).add(roundings)
    return merged


class RoundingWatch:
    """Notes the roundings of this process that a sum's order decides, and takes those of another run.

    Args:
        given: Notes of another run, of all its ranks; none: nothing is taken.

    Attributes:
        notes: What has been noted.
        num_taken: Roundings that went to another side than this process's own.
    """

    def __init__(self, given: RoundingNotes | None = None) -> None:
        self.given: RoundingNotes = given or {}
        self.notes: RoundingNotes = {}
        self.num_taken = 0
        self._pass = ""

    def begin(self, pass_name: str) -> None:
        """Another pass over data begins."""
        self._pass = pass_name

    @contextlib.contextmanager
    def watched(self) -> Iterator[RoundingWatch]:
        """Roundings are noted and taken until the end of the block."""
        own = quantize.round_scaled
        with replaced(quantize, "round_scaled", lambda scaled, scales, group, form: self._round(
                own, scaled, scales, group, form)):
            yield self

    def _round(self, own: Callable[..., torch.Tensor], scaled: torch.Tensor, scales: torch.Tensor, group: Group,
               form: str) -> torch.Tensor:
        rounded = own(scaled, scales, group, form)
        codes = rounded.view(torch.int8 if form == "e4m3" else torch.int16)
        others = _other_codes(scaled, rounded, codes, form)
        other = others.view(rounded.dtype)
        middle = (rounded.float() + other.float()) / 2
        distance = (scaled - middle) / FORMAT_MAX[form]
        near = (distance.abs() <= MARGIN) & (others != codes)
        if not bool(near.any()):
            return rounded
        groups = split_into_groups(scaled, group)
        largest = scales * groups.abs().amax(dim=(-3, -1))
        spread_largest = join_groups(spread(largest).expand(groups.shape), scaled.shape)
        notes = self.notes.setdefault(self._pass, Roundings())
        given = self.given.get(self._pass)
        places = near.nonzero(as_tuple=True)
        is_up = rounded.float() > other.float()
        columns = (codes[places], others[places], is_up[places], distance[places], spread_largest[places])
        result = codes.clone()
        taken = []
        for index, (code, neighbour, up, apart, most) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            key = form, code if up else neighbour, round(math.log2(most) * _STEPS_PER_OCTAVE)
            side = given.find(key, apart) if given is not None else None
            if side is not None and side != up:
                taken.append(index)
                up = side
            notes.note(key, apart, up)
        if taken:
            chosen = tuple(place[taken] for place in places)
            result[chosen] = others[chosen]
            self.num_taken += len(taken)
        return result.view(rounded.dtype)


def _other_codes(scaled: torch.Tensor, rounded: torch.Tensor, codes: torch.Tensor, form: str) -> torch.Tensor:
    """Codes of the values on the other side of what was rounded: away from zero or towards it, with the same sign."""
    outwards = scaled.abs() > rounded.float().abs()
    step = torch.where(outwards, _UNIT[form], -_UNIT[form]).to(codes.dtype)
    # The largest value has no other above it, and zero none below: a code of NaN or of no meaning, near no middle.
    bits = codes & (0x7F if form == "e4m3" else 0x7FFF)
    is_alone = ~outwards & (bits == 0)
    return torch.where(is_alone, codes, codes + step)
