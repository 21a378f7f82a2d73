"""One rank of a rehearsal, in a process of its own, from a job's JSON to a result's.

`rank_processes.py` starts it as `python -m dsv3_megatron.rehearsal.rehearsed_rank JOB.json RESULT.json`, with the CUDA
runtime of `device_library.py` preloaded. The Trainer is the run's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.process.parent import end_with_parent
from dsv3_megatron.rehearsal.rehearsed_run import rehearsed_run

# Lines of memory that a result lists.
_NUM_LINES = 24


@dataclass(frozen=True)
class RankTask:
    """What a process is to rehearse.

    Attributes:
        arguments: The run's flags.
        rank: Global rank.
        world_size: Processes of the run.
        gpus_per_node: GPUs of a node.
        num_microbatches: Micro-batches of the step; None: as few as fill the pipeline.
        imbalance: Rows of the busiest expert-parallel rank over their mean.
        device_bytes: Memory of the GPU, in bytes.
    """

    arguments: tuple[str, ...]
    rank: int
    world_size: int
    gpus_per_node: int = 8
    num_microbatches: int | None = None
    imbalance: float = 1.0
    device_bytes: int = 80 << 30


@dataclass
class Memory:
    """Device memory at a peak, in bytes.

    Attributes:
        peak: Bytes of tensors.
        allocated: Bytes of tensors in blocks of 512 bytes.
        components: Bytes by kind: parameters, gradients, optimizer, buffers, FP8 weights, passes.
        lines: The largest pieces: line, operation, component, bytes.
        at: Line and operation whose result made the peak.
    """

    peak: int = 0
    allocated: int = 0
    components: dict[str, int] = field(default_factory=dict)
    lines: list[tuple[str, str, str, int]] = field(default_factory=list)
    at: str = ""


@dataclass
class RankResult:
    """What a rehearsed rank did.

    Attributes:
        rank: Global rank.
        pipeline_rank: Position in the pipeline.
        expert_rank: Position among the expert-parallel ranks.
        seconds: Time of the rehearsal.
        built_bytes: Device memory after construction, in bytes.
        building: Memory at the peak of the construction.
        step: Memory at the peak of a step.
        waits: Times that the host waits in a step: what for, line, number.
        copies: Copies that nobody waits for in a step: way, line, number.
        launches: Operations that start a kernel in a step, by name; some start several.
        faults: What a GPU or NCCL would refuse: text, line, number.
        failure: The error that ended the rehearsal, with the lines of the library it came through; None: none did.
        group_calls: Calls of new_group.
        groups: Process groups that this rank is in, and those of them in which it is alone.
        calls: Messages between ranks, in order, as `calls_as_json` writes them.
    """

    rank: int
    pipeline_rank: int = 0
    expert_rank: int = 0
    seconds: float = 0.0
    built_bytes: int = 0
    building: Memory = field(default_factory=Memory)
    step: Memory = field(default_factory=Memory)
    waits: list[tuple[str, str, int]] = field(default_factory=list)
    copies: list[tuple[str, str, int]] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[str, str, int]] = field(default_factory=list)
    failure: str | None = None
    group_calls: int = 0
    groups: tuple[int, int] = (0, 0)
    calls: dict[str, Any] = field(default_factory=dict)


def result_of_json(content: dict[str, Any]) -> RankResult:
    """The result that a rank's process wrote."""
    return RankResult(**{**content, "building": Memory(**content["building"]), "step": Memory(**content["step"])})


def environment(job: RankTask) -> dict[str, str]:
    """The variables that torchrun would set for this rank, and those that the preloaded runtime reads."""
    nodes = min(job.gpus_per_node, job.world_size)
    return {"RANK": str(job.rank), "WORLD_SIZE": str(job.world_size), "LOCAL_RANK": str(job.rank % nodes),
            "LOCAL_WORLD_SIZE": str(nodes), "MASTER_ADDR": "rehearsal", "MASTER_PORT": "29500",
            "DSV3_REHEARSAL_GPUS": str(nodes), "DSV3_REHEARSAL_BYTES": str(job.device_bytes)}


def rehearse(job: RankTask) -> RankResult:
    """Build the run's Trainer as this rank, and take a step.

    Raises:
        ConfigError: the run cannot be.
    """
    from dsv3_megatron.rehearsal.collective_calls import calls_as_json
    from dsv3_megatron.rehearsal.stand_ins import GroupCount, replaced, replacements
    from dsv3_megatron.rehearsal.watch import Watch, fake_mode

    run = rehearsed_run(parse_command(job.arguments).run, job.world_size, job.num_microbatches)
    watch, groups, result = Watch(), GroupCount(), RankResult(job.rank)
    started = time.perf_counter()
    # Megatron-Core compiles functions as it is imported.
    from dsv3_megatron.platform import prepare

    prepare()
    with ExitStack() as stack:
        stack.enter_context(replaced(replacements(watch, groups, rank=job.rank, world_size=job.world_size,
                                                  imbalance=job.imbalance)))
        stack.enter_context(fake_mode())
        stack.enter_context(watch)
        try:
            _build_and_step(run, watch, result)
        except Exception as error:  # noqa: BLE001 - what a rehearsal is there to find; it is reported
            result.failure = _failure(error)
    result.seconds = time.perf_counter() - started
    result.faults = [(text, line, count) for (text, line), count in watch.faults.most_common()]
    result.waits = [(text, line, count) for (text, line), count in watch.waits.most_common()]
    result.copies = [(text, line, count) for (text, line), count in watch.copies.most_common()]
    result.launches = dict(watch.launches.most_common())
    result.calls = calls_as_json(watch.collectives.calls)
    result.group_calls, result.groups = groups.calls, (groups.joined, groups.alone)
    return result


def _build_and_step(run: Any, watch: Any, result: RankResult) -> None:
    from dsv3_megatron.runs.trainer import Trainer

    memory = watch.memory
    trainer = Trainer(run)
    result.pipeline_rank, result.expert_rank = trainer.groups.pp.rank(), trainer.groups.ep.rank()
    built = memory.now
    result.built_bytes = memory.total_at(built)
    watch.is_counting = watch.collectives.is_of_step = True
    trainer.train_step()
    watch.is_counting = watch.collectives.is_of_step = False
    for component, tensors in _parts(trainer):
        for tensor in tensors:
            memory.name(tensor, component)
    result.building = _memory(memory.peak(0, built))
    result.step = _memory(memory.peak(built, memory.now))


def _parts(trainer: Any) -> Iterator[tuple[str, list[Any]]]:
    """Tensors of each kind that a rank holds between steps; of one that is of two kinds the later one counts."""
    import torch

    from dsv3_megatron.optim.shards import distributed_parts

    states: list[Any] = []
    for part in distributed_parts(trainer.optimizer):
        inner = part.optimizer
        states += [weight for group in inner.param_groups for weight in group["params"]]
        states += [value for state in inner.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)]
    yield "optimizer", states
    yield "buffers", [buffer for chunk in trainer.chunks for buffer in chunk.module.buffers()]
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    yield "gradients", [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    yield "parameters", parameters


def _memory(peak: Any) -> Memory:
    components: dict[str, int] = {}
    for label, size in peak.by_label.items():
        kind = label.component or "passes"
        components[kind] = components.get(kind, 0) + size
    lines = [(label.line, label.operation, label.component or "passes", size)
             for label, size in list(peak.by_label.items())[:_NUM_LINES]]
    return Memory(peak.num_bytes, peak.allocated, components, lines, f"{peak.at.operation} at {peak.at.line}")


def _failure(error: BaseException) -> str:
    """An error with where it came from, the innermost line last."""
    from dsv3_megatron.rehearsal.source_lines import line_of

    lines = [line for frame, number in traceback.walk_tb(error.__traceback__)
             if (line := line_of(frame.f_code, number)) is not None]
    if os.environ.get("DSV3_REHEARSAL_TRACEBACK"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}\n  through {' > '.join(lines[-6:]) or 'no line of the library'}"


def main(arguments: list[str]) -> int:
    """Rehearse what JOB.json says, and write RESULT.json; 2 with the error on stderr if the run cannot be."""
    end_with_parent()
    job, result = arguments
    content = json.loads(Path(job).read_text(encoding="utf-8"))
    wanted = RankTask(**{**content, "arguments": tuple(content["arguments"])})
    os.environ.update(environment(wanted))
    try:
        found = rehearse(wanted)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(result).write_text(json_text(asdict(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
