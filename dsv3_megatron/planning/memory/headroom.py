"""What a device's memory leaves to a run's tensors: its visible size less what others take, and what fragments waste.

Usage:
    room = Headroom.of(setting)
    room.usable_bytes                  # what the fullest rank may need
    room.describe()                    # "84.9 GB visible, less 4.2 GB headroom (...)"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_megatron.planning.memory.estimate import RankMemory
from dsv3_megatron.planning.time.work import Setting

# Figures of a machine in bytes, and how they are told.
_TAKEN = {"context_bytes": "CUDA context and libraries", "nccl_bytes": "NCCL buffers"}


@dataclass(frozen=True)
class Headroom:
    """Memory of one device that a run's tensors cannot have.

    Attributes:
        visible_bytes: What the driver shows of the device.
        parts: Bytes by what takes them; one part if the headroom was given.
    """

    visible_bytes: float
    parts: Mapping[str, float]

    @classmethod
    def of(cls, setting: Setting) -> Headroom:
        """The headroom that was given, or what the machine's figures say; none on a CPU and without figures."""
        hardware = setting.hardware
        visible = hardware["memory_bytes"]
        if setting.headroom_bytes is not None:
            return cls(visible, {"as given": setting.headroom_bytes})
        parts = {words: hardware[name] for name, words in _TAKEN.items() if hardware.has(name)}
        if hardware.has("fragmentation_share"):
            parts["fragmentation"] = hardware["fragmentation_share"] * (visible - sum(parts.values()))
        return cls(visible, parts)

    @property
    def total_bytes(self) -> float:
        """Bytes of all parts of the headroom together."""
        return sum(self.parts.values())

    @property
    def usable_bytes(self) -> float:
        """Bytes that are left to the run's tensors."""
        return max(0.0, self.visible_bytes - self.total_bytes)

    def describe(self) -> str:
        """Say the headroom and its parts in a line."""
        if not self.total_bytes:
            return f"{self.visible_bytes / 1e9:.1f} GB, no headroom"
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items())
        return (f"{self.visible_bytes / 1e9:.1f} GB visible less {self.total_bytes / 1e9:.1f} GB headroom ({parts}) = "
                f"{self.usable_bytes / 1e9:.1f} GB")


def lacking_memory(memory: tuple[RankMemory, ...], setting: Setting) -> str:
    """Which rank needs more than a device leaves, and how much; empty if all fit."""
    fullest = max(memory, key=lambda rank: rank.peak_bytes)
    usable = Headroom.of(setting).usable_bytes
    if fullest.peak_bytes <= usable:
        return ""
    return f"pipeline rank {fullest.pipeline_rank} needs {fullest.peak_bytes / 1e9:.1f} GB of {usable / 1e9:.1f}"
