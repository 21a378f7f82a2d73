"""What a machine can do, as data: peaks, bandwidths, and how much of them kernels reach, each with its source.

A kernel's time is its operations at the best rate that kernels of its kind reach, plus its output at the memory's
bandwidth: that alone gives published products of very different shapes within a tenth. What is left of each
published product is kept as a factor by shape. Element-wise kernels move bytes at a share of the memory's bandwidth
that differs by kind. `hardware_tables.py` has the numbers.

Usage:
    h800 = find_hardware("h800")
    seconds = h800.product_seconds("fp8", "fprop", groups=1, rows=4096, columns=7168, inner=16384, sm_share=112 / 132)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.output import json_text

UNVERIFIED = "unverified: "

_LARGEST = 1e30  # of a figure in a file: beyond it products of them are not finite


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from. A source that begins with "unverified: " was not confirmed against one."""

    value: float
    source: str


@dataclass(frozen=True)
class ProductPoint:
    """A measured matrix product: [rows, inner] x [inner, columns] for each of `groups`, rows being those of a group.

    Attributes:
        kind: "fp8", "bf16" or "fp32".
        purpose: "fprop", "dgrad" or "wgrad"; the latter sums over tokens, adds to fp32, and `inner` are the tokens.
        groups: Number of groups: 1, or experts.
        rows: Rows of each group's result.
        columns: Columns of each group's result.
        inner: Length of the axis that is summed over.
        ratio: Measured time over `additive_seconds`.
    """

    kind: str
    purpose: str
    groups: int
    rows: int
    columns: int
    inner: int
    ratio: float


@dataclass(frozen=True)
class AttentionPoint:
    """Measured attention: share of the bf16 (on a CPU the fp32) peak at a sequence length; 2 operations a multiply-add.

    The backward's operations are those it does, five products for the forward's two.
    """

    is_backward: bool
    seq_length: int
    share: float


@dataclass(frozen=True)
class Hardware:
    """A machine: identical nodes of identical devices.

    Attributes:
        name: Short name.
        figures: Values by name; FIGURES says which and their units.
        products: Measured products, from which others are judged by shape.
        attention: Measured attention.
        movement: Kind of element-wise kernel -> share of the memory's bandwidth; of "dispatch" and others see FIGURES.
        tables_source: Source of products, attention and movement.
        fp8_scales: What FP8's scales are and where they are multiplied; empty without FP8, or where it is not known.
    """

    name: str
    figures: Mapping[str, Figure]
    products: tuple[ProductPoint, ...]
    attention: tuple[AttentionPoint, ...]
    movement: Mapping[str, Figure]
    tables_source: str
    fp8_scales: str = ""

    def __getitem__(self, name: str) -> float:
        """The value of a figure."""
        return self.figures[name].value

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def has(self, name: str) -> bool:
        """Whether the machine has a figure of this name."""
        return name in self.figures

    def ranks_per_node(self, num_devices: int) -> int:
        """Devices of a node, or of an NVLink domain, that a run has in each: as many in every one.

        A domain of 72 is not always filled: a run of 256 has 64 in each of four.

        Args:
            num_devices: Devices of the whole run.
        """
        size = min(int(self["gpus_per_node"]), num_devices)
        return next(count for count in range(size, 0, -1) if num_devices % count == 0)

    def for_dispatcher(self, name: str, dispatcher: str) -> float:
        """A figure as a dispatcher of tokens has it: a library's own (`flex_NAME`) for "flex", if it is known."""
        own = f"flex_{name}"
        return self[own] if dispatcher == "flex" and own in self.figures else self[name]

    @property
    def is_cpu(self) -> bool:
        """Whether the machine's devices are processes on CPU cores."""
        return "is_cpu" in self.figures

    def peak(self, kind: str) -> float:
        """FLOP/s of dense products.

        Raises:
            ConfigError: the device has no such arithmetic.
        """
        name = f"{kind}_flops"
        if name not in self.figures:
            able = [other.removesuffix("_flops") for other in self.figures if other.endswith("_flops")]
            raise ConfigError(f"hardware={self.name} has no {kind} products; it has {', '.join(sorted(able))}: "
                              + ("leave fp8 at none" if kind == "fp8" else "choose another precision"))
        return self.figures[name].value

    def scaled(self, name: str, factor: float) -> Hardware:
        """A copy with one resource `factor` times as large: a figure, a kind of movement, or a table by its name.

        Names of tables are those of `resources`.

        Raises:
            ValueError: there is no such resource.
        """
        if name in self.figures:
            value = self.figures[name].value * factor
            figure = Figure(min(1.0, value) if name.endswith("_share") else value, self.figures[name].source)
            return dataclasses.replace(self, figures={**self.figures, name: figure})
        if name == "movement":
            shares = {kind: Figure(figure.value * factor, figure.source) for kind, figure in self.movement.items()}
            return dataclasses.replace(self, movement=shares)
        if name.startswith("movement:"):
            kind = name.removeprefix("movement:")
            figure = Figure(self.movement[kind].value * factor, self.movement[kind].source)
            return dataclasses.replace(self, movement={**self.movement, kind: figure})
        if name.startswith("attention:"):
            is_backward = name.endswith("backward")
            points = tuple(dataclasses.replace(point, share=point.share * factor)
                           if point.is_backward == is_backward else point for point in self.attention)
            return dataclasses.replace(self, attention=points)
        raise ValueError(f"{self.name} has no resource {name}; it has {', '.join(self.resources())}")

    def resources(self) -> tuple[str, ...]:
        """Everything that `scaled` takes and that can be more or less."""
        fixed = ("is_cpu", "gpus_per_node", "num_sms", "context_bytes", "nccl_bytes", "fragmentation_share")
        return (*(name for name in self.figures if name not in fixed),
                *(f"movement:{kind}" for kind in self.movement),
                *(("attention:forward", "attention:backward") if self.attention else ()))

    # -- kernels -----------------------------------------------------------------------------------------------

    def product_seconds(self, kind: str, purpose: str, *, groups: int, rows: int, columns: int, inner: int,
                        sm_share: float = 1.0) -> float:
        """Time of a matrix product.

        Args:
            kind: "fp8", "bf16" or "fp32".
            purpose: "fprop", "dgrad" or "wgrad", as in `ProductPoint`.
            groups: Products of equal shape in one kernel.
            rows: Rows of each result.
            columns: Columns of each result.
            inner: Length of the axis that is summed over.
            sm_share: Part of the multiprocessors that it may use.
        """
        self.peak(kind)
        base = additive_seconds(self.figures, kind, purpose, groups, rows, columns, inner, sm_share)
        return base * self.ratio(kind, purpose, groups, rows, columns, inner)

    def ratio(self, kind: str, purpose: str, groups: int, rows: int, columns: int, inner: int) -> float:
        """Measured over the additive estimate, from the measured products that are nearest in shape; 1 without any."""
        key = (kind, purpose, groups, rows, columns, inner)
        if key not in self._ratios:
            self._ratios[key] = self._nearest_ratio(*key)
        return self._ratios[key]

    @cached_property
    def _ratios(self) -> dict[tuple[str, str, int, int, int, int], float]:
        return {}

    def _nearest_ratio(self, kind: str, purpose: str, *sizes: int) -> float:
        points = _points_of(self.products, kind, purpose)
        if not points:
            return 1.0
        total = weights = 0.0
        shape = tuple(map(math.log2, sizes))
        for place, ratio in points:
            distance = math.dist(place, shape)
            if distance < 1e-5:
                return ratio
            weight = distance ** -4
            total, weights = total + weight * ratio, weights + weight
        return total / weights

    def attention_seconds(self, flops: float, *, is_backward: bool, seq_length: int, sm_share: float = 1.0) -> float:
        """Time of core attention.

        Args:
            flops: Operations it does; of the backward all five products.
            is_backward: The backward pass is meant, not the forward.
            seq_length: Tokens that see one another.
            sm_share: Part of the multiprocessors that it may use.
        """
        points = sorted((point.seq_length, point.share) for point in self.attention
                        if point.is_backward == is_backward)
        share = _interpolated(points, seq_length)
        return flops / (self.peak("fp32" if self.is_cpu else "bf16") * share * sm_share)

    def movement_seconds(self, kind: str, num_bytes: float) -> float:
        """Time of an element-wise kernel that reads and writes so many bytes."""
        return num_bytes / (self["memory_bandwidth"] * self.movement[kind].value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `load_hardware` reads them."""
        return dataclasses.asdict(self)


def additive_seconds(figures: Mapping[str, Figure], kind: str, purpose: str, groups: int, rows: int, columns: int,
                     inner: int, sm_share: float = 1.0) -> float:
    """Operations at the best rate of their kind, then the result at the memory's bandwidth."""
    flops = 2 * groups * rows * columns * inner
    # A weight gradient is added to what is there, in fp32.
    width = 8 if purpose == "wgrad" else 4 if kind == "fp32" else 2
    rate = figures[f"{kind}_flops"].value * figures[f"{kind}_best_share"].value * sm_share
    return flops / rate + groups * rows * columns * width / figures["memory_bandwidth"].value


def measured_product(figures: Mapping[str, Figure], kind: str, purpose: str, groups: int, rows: int, columns: int,
                     inner: int, seconds: float, sm_share: float = 1.0) -> ProductPoint:
    """A point of the table from a measured time, on a part of the multiprocessors."""
    base = additive_seconds(figures, kind, purpose, groups, rows, columns, inner, sm_share)
    return ProductPoint(kind, purpose, groups, rows, columns, inner, seconds / base)


@lru_cache(maxsize=1024)
def _points_of(products: tuple[ProductPoint, ...], kind: str, purpose: str
               ) -> tuple[tuple[tuple[float, ...], float], ...]:
    """Logarithms of the shape, and the ratio, of the measured products of a kind; dgrad is as fprop without its own."""
    own = [p for p in products if p.kind == kind and p.purpose == purpose]
    if not own and purpose == "dgrad":
        return _points_of(products, kind, "fprop")
    return tuple((tuple(map(math.log2, (p.groups, p.rows, p.columns, p.inner))), p.ratio) for p in own)


def _interpolated(points: list[tuple[int, float]], seq_length: int) -> float:
    """Linear in the logarithm of the length; the ends hold beyond them."""
    if seq_length <= points[0][0]:
        return points[0][1]
    for (low, low_share), (high, high_share) in zip(points, points[1:], strict=False):
        if seq_length <= high:
            way = math.log(seq_length / low) / math.log(high / low)
            return low_share + way * (high_share - low_share)
    return points[-1][1]


def load_hardware(path: str) -> Hardware:
    """A machine from a JSON file that `--calibrate` or `--measure` wrote.

    Raises:
        ConfigError: no such file, or not such a file.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"hardware={path}: no such file; --save-hardware writes one")
    try:
        content = read_json(file)
        return Hardware(
            name=_text(content["name"]),
            figures=_Figures((name, _read(Figure, figure)) for name, figure in content["figures"].items()),
            products=tuple(_read(ProductPoint, point) for point in content["products"]),
            attention=tuple(_read(AttentionPoint, point) for point in content["attention"]),
            movement=_Figures((kind, _read(Figure, figure)) for kind, figure in content["movement"].items()),
            tables_source=_text(content["tables_source"]), fp8_scales=_text(content.get("fp8_scales", "")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"hardware={path} does not describe a machine ({type(error).__name__}: {error}); it must be "
                          "what --save-hardware writes") from error


class _Figures(dict[str, Figure]):
    """Figures of a file by name; one that is asked for and missing is the file's fault."""

    def __missing__(self, name: str) -> Figure:
        raise ConfigError(f"the machine has no figure {name!r}; its file must be what --save-hardware writes")


def _read[Row](kind: type[Row], entry: dict[str, Any]) -> Row:
    """A row of a machine's tables, of whose values each is of its field's kind and finite."""
    row = kind(**entry)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = getattr(row, item.name)
        kinds = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}[str(item.type)]
        if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{item.name}={value!r} must be a {item.type}")
        if type(value) in (int, float) and not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{item.name}={value:.6g} is beyond {_LARGEST:g}")
    return row


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a text")
    return value


def save_hardware(hardware: Hardware, path: str) -> None:
    """Write a machine as JSON."""
    Path(path).write_text(json_text(hardware.as_dict(), indent=1) + "\n", encoding="utf-8")
