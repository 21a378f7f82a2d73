"""What a process is to rehearse, and what it found, as plain values that go through JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What a rehearsed rank does, in its order. A first step makes what all later ones find.
BUILDING, FIRST_STEP, STEP, SAVING, RESUMING = "building", "first step", "step", "saving", "resuming"
PHASES = (BUILDING, FIRST_STEP, STEP, SAVING, RESUMING)


@dataclass(frozen=True)
class RankTask:
    """What a process is to rehearse.

    Attributes:
        arguments: The run's flags.
        rank: Global rank.
        world_size: Processes of the run.
        gpus_per_node: GPUs of a node.
        num_microbatches: Micro-batches of the step; None: as few as fill the pipeline.
        num_steps: Steps: 1, or 2 to tell what the first one makes for all later ones.
        saves: Whether a checkpoint is saved, and the run resumed from it.
        imbalance: Rows of the busiest expert-parallel rank over their mean.
        device_bytes: Memory of the GPU, in bytes.
    """

    arguments: tuple[str, ...]
    rank: int
    world_size: int
    gpus_per_node: int = 8
    num_microbatches: int | None = None
    num_steps: int = 1
    saves: bool = False
    imbalance: float = 1.0
    device_bytes: int = 80 << 30


@dataclass
class Memory:
    """Device memory at a peak, in bytes.

    Attributes:
        peak: Bytes of tensors.
        allocated: Bytes of tensors in blocks of 512 bytes.
        components: Bytes by component, named as `live_memory.COMPONENTS`.
        lines: The largest pieces: line, operation, component, bytes.
        at: Line and operation whose result made the peak.
    """

    peak: int = 0
    allocated: int = 0
    components: dict[str, int] = field(default_factory=dict)
    lines: list[tuple[str, str, str, int]] = field(default_factory=list)
    at: str = ""


@dataclass
class PhaseWork:
    """What a rank did in a phase.

    Attributes:
        waits: Times that the host waited: what for, line, number.
        copies: Copies that nobody waited for: way, line, number.
        launches: Operations that start a kernel, by name; some start several.
        assumed: Numbers that the host was given as ones, because a rehearsal does not know them: what read them, line,
            number of them.
    """

    waits: list[tuple[str, str, int]] = field(default_factory=list)
    copies: list[tuple[str, str, int]] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    assumed: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass
class RankResult:
    """What a rehearsed rank did. After an error, as far as it came.

    Attributes:
        rank: Global rank.
        pipeline_rank: Position in the pipeline.
        expert_rank: Position among the expert-parallel ranks.
        seconds: Time of the rehearsal.
        cpu_seconds: Time of the processor that it took.
        built_bytes: Device memory after construction, in bytes.
        peaks: Memory at the peak of each phase, as far as it came.
        work: PhaseWork of each phase.
        saved_bytes: Bytes that this rank writes into a checkpoint; None: none was saved.
        faults: What a GPU or NCCL would refuse: text, line, number.
        failure: The error that ended the rehearsal, with the lines of the library it came through; None: none did.
        failed_in: Phase in which it ended; None: in none.
        group_calls: Calls of new_group.
        groups: Process groups that this rank is in, and those of them in which it is alone.
        calls: Messages between ranks, in order, as `calls_as_json` writes them.
    """

    rank: int
    pipeline_rank: int = 0
    expert_rank: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    built_bytes: int = 0
    peaks: dict[str, Memory] = field(default_factory=dict)
    work: dict[str, PhaseWork] = field(default_factory=dict)
    saved_bytes: int | None = None
    faults: list[tuple[str, str, int]] = field(default_factory=list)
    failure: str | None = None
    failed_in: str | None = None
    group_calls: int = 0
    groups: tuple[int, int] = (0, 0)
    calls: dict[str, Any] = field(default_factory=dict)

    @property
    def step_phase(self) -> str:
        """The last step that was begun; the first one if no other was."""
        return STEP if STEP in self.peaks else FIRST_STEP

    @property
    def step(self) -> Memory:
        """Memory at the peak of the last step that was begun."""
        return self.peaks.get(self.step_phase, Memory())


def result_of_json(content: dict[str, Any]) -> RankResult:
    """The result that a rank's process wrote."""
    return RankResult(**{**content, "peaks": {phase: Memory(**peak) for phase, peak in content["peaks"].items()},
                         "work": {phase: PhaseWork(**work) for phase, work in content["work"].items()}})
