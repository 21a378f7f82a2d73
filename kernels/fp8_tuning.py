"""Tile sizes of the FP8 GEMM: those measured on this machine, kept in a file, else a guess.

`tools/bench/bench_fp8.py --tune` measures CANDIDATES on DeepSeek-V3's shapes and writes the file; a run only reads it.
It is JSON, keyed by device, experts, N, K and the power of two that M falls under; of products that are added to a
weight's gradient by M, N and the power of two that K, the number of tokens, falls under. The environment variable
DSV3_FP8_TUNING names another place for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.kernels.launch import IS_INTERPRETED

IMPLEMENTATIONS = ("triton", "scaled_mm", "deep_gemm")


@dataclass(frozen=True)
class GemmConfig:
    """One way to run the kernel.

    Attributes:
        block_m: Rows of an output tile.
        block_n: Columns of an output tile.
        stages: Steps of K in flight.
        warps: Warps of a program; 4 make a warp group.
        group_m: Row tiles that are walked together.
        programs_per_processor: Programs that share a multiprocessor: one computes while another promotes.
        specializes_warps: Some warps load and others compute, as far as the compiler can part them; 8 warps only.
    """

    block_m: int = 128
    block_n: int = 128
    stages: int = 4
    warps: int = 8
    group_m: int = 8
    programs_per_processor: int = 1
    specializes_warps: bool = False

    def __str__(self) -> str:
        """The configuration as tables of results have it."""
        return (f"{self.block_m}x{self.block_n} stages={self.stages} warps={self.warps}"
                + " two programs a processor" * (self.programs_per_processor == 2)
                + " parted warps" * self.specializes_warps)


# A step of K is (block_m + block_n) * 128 bytes of shared memory, of which an H100's processor has 227 KB; two fp32
# tiles (the sum and the step's product) must fit its registers.
CANDIDATES = tuple(
    GemmConfig(block_m, block_n, stages, warps)
    for block_m, block_n, warps in ((128, 128, 8), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (64, 256, 8),
                                     (256, 64, 8), (64, 64, 4))
    for stages in (3, 4, 6)
    if stages * (block_m + block_n) * 128 <= 220_000)
# Two programs on a processor, each with less than half of its shared memory; and parted warps, which triton 3.9
# compiles with 8 warps and fails on with 4. Neither has met a GPU.
CANDIDATES += tuple(GemmConfig(64, 128, stages, 4, programs_per_processor=2) for stages in (3, 4))
CANDIDATES += (GemmConfig(128, 64, 4, 4, programs_per_processor=2), GemmConfig(specializes_warps=True))
# Guessed where nothing is measured, and the two that may be better; parted warps last, as a compiler may fail on them.
NAMED_CONFIGURATIONS = (GemmConfig(), GemmConfig(64, 128, 4, 4), GemmConfig(64, 128, 4, 4, programs_per_processor=2),
                        GemmConfig(specializes_warps=True))
_INTERPRETED = GemmConfig(32, 32, 2, 4, 2)


@dataclass(frozen=True)
class Tuned:
    """The fastest that was measured for one shape."""

    implementation: str
    config: GemmConfig


def config_for(rows: int, columns: int, depth: int, *, num_experts: int, adds: bool = False) -> GemmConfig:
    """The kernel's configuration for a product: the measured one, else a guess by the number of output tiles."""
    if IS_INTERPRETED:
        return _INTERPRETED
    tuned = tuned_for(rows, columns, depth, num_experts=num_experts, adds=adds)
    if tuned is not None:
        return tuned.config
    few_tiles = -(-rows // 128) * -(-columns // 128) < 132
    if not few_tiles:
        return GemmConfig()
    # Two such programs fit a processor, but not with a gradient's second scales.
    return GemmConfig(64, 128, 4, 4, programs_per_processor=1 if adds else 2)


def tuned_for(rows: int, columns: int, depth: int, *, num_experts: int, adds: bool = False) -> Tuned | None:
    """What was measured for this shape on this device, or None."""
    return _table().get(shape_key(rows, columns, depth, num_experts, adds=adds))


def shape_key(rows: int, columns: int, depth: int, num_experts: int, *, adds: bool = False) -> str:
    """The file's key: shapes that share it share a configuration. `adds`: to a gradient, K being tokens."""
    if adds:
        return f"add_m{rows}_n{columns}_k{_next_power_of_2(depth)}"
    return f"e{num_experts}_m{_next_power_of_2(rows)}_n{columns}_k{depth}"


def _next_power_of_2(size: int) -> int:
    return 1 << max(size - 1, 1).bit_length()


def tuning_file() -> Path:
    """The file in which measured configurations are kept."""
    named = os.environ.get("DSV3_FP8_TUNING")
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "dsv3_megatron" / "fp8_gemm.json"


def write_tuning(results: dict[str, Tuned], device: str) -> Path:
    """Add measurements of a device to the file; others' stay.

    Args:
        results: Fastest implementations by `shape_key`.
        device: Name of the device, as `torch.cuda.get_device_name` gives it.
    """
    path = tuning_file()
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known.setdefault(device, {}).update({key: dataclasses.asdict(tuned) for key, tuned in results.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(path)
    _table.cache_clear()
    return path


def read_tuning(device: str) -> dict[str, Tuned]:
    """Read what was measured on a device, by `shape_key`.

    Raises:
        ValueError: the file cannot be read as what `write_tuning` writes.
    """
    path = tuning_file()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8")).get(device, {})
        tuned = {key: Tuned(entry["implementation"], GemmConfig(**entry["config"])) for key, entry in entries.items()}
        if any(entry.implementation not in IMPLEMENTATIONS for entry in tuned.values()):
            raise ValueError(f"implementations must be of {', '.join(IMPLEMENTATIONS)}")
        return tuned
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of measured FP8 configurations: {error}; delete it, or measure again "
                         "with tools/bench/bench_fp8.py --tune") from error


@functools.cache
def _table() -> dict[str, Tuned]:
    return read_tuning(torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
