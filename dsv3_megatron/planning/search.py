"""Every way to split a run over a machine: those that work ranked by step time, those that do not with their reason.

Three sieves, each cheaper than the next: the configuration's own rules; a lower bound of the step time (a rank's work,
and the passes of the stages before it that it has to wait for); memory. What is left is simulated, the lowest bound
first, until no bound is below the last place of the ranking.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from dsv3_megatron.config.fields import ConfigError, all_divisors
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import PAIRED, SCHEDULES, SPLIT_BACKWARD
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import RECOMPUTE_GRANULARITIES
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.planning.flags import differing_flags
from dsv3_megatron.planning.memory.estimate import RankMemory, estimate_memory
from dsv3_megatron.planning.memory.headroom import lacking_memory
from dsv3_megatron.planning.time.operations import WorkPart
from dsv3_megatron.planning.time.step_time import StepTime, least_update, step_seconds, step_time
from dsv3_megatron.planning.time.work import Imbalance, Setting, StageWork, WorkTable, end_key

RULE, MEMORY, SLOWER = "rule", "memory", "slower"
_MICRO_BATCH_SIZES = (1, 2, 4, 8)
# Tokens of a part of a sequence: less is what pre-training takes whole, more is for those who do not split at all.
_PARTS = range(4096, 16384 + 1)
_WAYS_TO_SPLIT = ("p2p", "a2a")
_MOST_VIRTUAL_STAGES = 4


@dataclass(frozen=True)
class Layout:
    """What a search varies. `describe` is how the command prints it."""

    pp: int
    tp: int
    ep: int
    schedule: str
    virtual_stages: int
    micro_batch_size: int
    recompute: str | None
    cp: int = 1
    cp_comm: str = "p2p"

    def describe(self) -> str:
        """Describe the layout in a few words."""
        stages = f" V{self.virtual_stages}" if self.virtual_stages > 1 else ""
        tensor = f" TP{self.tp}" if self.tp > 1 else ""
        context = f" CP{self.cp} {self.cp_comm}" if self.cp > 1 else ""
        return (f"PP{self.pp}{tensor}{context} EP{self.ep} {self.schedule}{stages} micro-batch {self.micro_batch_size} "
                f"recompute {self.recompute or 'none'}")

    def apply(self, run: RunConfig) -> RunConfig:
        """The run under this layout."""
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.virtual_stages,
            pipeline_schedule="auto" if self.pp == 1 else self.schedule, expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=1, context_parallel_size=self.cp, cp_comm_type=self.cp_comm)
        modules = run.training.recompute_modules if self.recompute == "selective" else ()
        training = dataclasses.replace(run.training, micro_batch_size=self.micro_batch_size,
                                       recompute_granularity=self.recompute, recompute_modules=modules)
        return dataclasses.replace(run, parallel=parallel, training=training)


@dataclass(frozen=True)
class Found:
    """A layout that works; `flags` give it to the run that the search was for."""

    layout: Layout
    step: StepTime
    memory: tuple[RankMemory, ...]
    flags: str

    @property
    def peak_bytes(self) -> int:
        """Peak memory, in bytes, of the rank that needs most."""
        return max(rank.peak_bytes for rank in self.memory)


@dataclass(frozen=True)
class Rejected:
    """A layout that does not, or all layouts that share what is named.

    Attributes:
        layout: The layout in words.
        count: Number of layouts that are meant.
        kind: RULE, MEMORY or SLOWER.
        reason: The rule that is broken, the rank that lacks memory, or the bound.
    """

    layout: str
    count: int
    kind: str
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: The best layouts, the fastest first.
        rejected: All other layouts, each with its reason.
        num_layouts: All layouts that were looked at.
        num_simulated: Layouts whose schedule was simulated.
        seconds: Time that the search took.
    """

    ranked: tuple[Found, ...]
    rejected: tuple[Rejected, ...]
    num_layouts: int
    num_simulated: int
    seconds: float

    def rejected_by_kind(self) -> dict[str, int]:
        """Numbers of layouts by why they were rejected."""
        counts: Counter[str] = Counter()
        for rejected in self.rejected:
            counts[rejected.kind] += rejected.count
        return dict(counts)

    def why_none(self) -> str:
        """The reason, if nothing was found, that comes nearest to a way out."""
        lacking = [r for r in self.rejected if r.kind == MEMORY]
        if lacking:
            return (f"all {sum(r.count for r in lacking)} layouts that the rules allow need more memory; "
                    + lacking[0].reason)
        broken = Counter(r.reason for r in self.rejected if r.count == 1) or Counter(r.reason for r in self.rejected)
        return broken.most_common(1)[0][0] if broken else "there is no layout"


def search(run: RunConfig, setting: Setting, *, num_best: int = 10) -> SearchResult:
    """Rank the layouts of a run of one phase.

    Args:
        run: A run of one phase, as `run_cost.only_phase` makes it; its own layout, micro-batch and recomputation are
            not looked at.
        setting: The machine; memory is that of its devices.
        num_best: Places of the ranking.
    """
    started = time.perf_counter()
    rejected: list[Rejected] = []
    candidates = [(layout, layout.apply(run)) for layout in _layouts(run, setting, rejected)]
    num_layouts = len(candidates) + sum(group.count for group in rejected)
    possible = []
    for layout, candidate in candidates:
        problem = _problem(candidate, setting.num_devices)
        if problem:
            rejected.append(Rejected(layout.describe(), 1, RULE, problem))
        else:
            possible.append((layout, candidate))
    bounds = _Bounds(setting)
    bounded = sorted(((bounds.of(candidate, layout), layout, candidate) for layout, candidate in possible),
                     key=lambda item: item[0])
    best: list[tuple[float, Layout, RunConfig, tuple[RankMemory, ...]]] = []
    num_simulated = 0
    for bound, layout, candidate in bounded:
        if len(best) == num_best and bound >= best[-1][0]:
            rejected.append(Rejected(layout.describe(), 1, SLOWER, f"takes at least {bound:.2f} s a step"))
            continue
        memory = estimate_memory(candidate, setting.num_devices, **setting.memory_terms(candidate))
        lacking = lacking_memory(memory, setting)
        if lacking:
            rejected.append(Rejected(layout.describe(), 1, MEMORY, f"{layout.describe()}: {lacking}"))
            continue
        num_simulated += 1
        best.append((step_seconds(candidate, setting), layout, candidate, memory))
        best.sort(key=lambda item: item[0])
        if len(best) > num_best:
            seconds, slowest, *_ = best.pop()
            rejected.append(Rejected(slowest.describe(), 1, SLOWER, f"takes {seconds:.2f} s a step"))
    ranked = tuple(Found(layout, step_time(candidate, setting, with_transfers=False), memory,
                         differing_flags(run, candidate))
                   for _, layout, candidate, memory in best)
    return SearchResult(ranked, tuple(rejected), num_layouts, num_simulated, time.perf_counter() - started)


def _problem(candidate: RunConfig, num_devices: int) -> str:
    """The rule of batch and schedule that a layout breaks; empty if none."""
    try:
        candidate.parallel.validate(candidate.model, candidate.training.seq_length)
        candidate.training.validate(candidate.parallel, num_devices)
    except ConfigError as error:
        return str(error)
    return ""


def _layouts(run: RunConfig, setting: Setting, rejected: list[Rejected]) -> Iterator[Layout]:
    """All that are worth a look at their own rules; degrees that no schedule could have are rejected together."""
    model, training, num_devices = run.model, run.training, setting.num_devices
    schedules = [("1f1b", 1), *(("interleaved", number) for number in range(2, _MOST_VIRTUAL_STAGES + 1)),
                 *((name, 1) for name in SCHEDULES if name not in ("1f1b", "interleaved"))]
    granularities = (None, *RECOMPUTE_GRANULARITIES)
    tiled: set[int] = set()  # tensor-parallel degrees whose parts FP8 can take
    splits = [(tp, cp, _way_to_split(run, setting, tp, cp)) for tp in (1, 2, 4, 8) if num_devices % tp == 0
              for cp in _splits(run, num_devices)]
    for pp in (number for number in all_divisors(num_devices) if number <= model.num_layers):
        own = [(name, stages) for name, stages in schedules if pp > 1 or name == "1f1b"]
        for tp, cp, way in splits:
            # Who splits a sequence has no use for two at a time.
            sizes = [size for size in (_MICRO_BATCH_SIZES if cp == 1 else (1,))
                     if training.global_batch_size % size == 0]
            for ep in (number for number in all_divisors(model.num_experts) if number <= num_devices):
                count = len(own) * len(sizes) * len(granularities)
                parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                                          expert_model_parallel_size=ep, context_parallel_size=cp, cp_comm_type=way,
                                          moe_token_dispatcher_type=run.parallel.moe_token_dispatcher_type,
                                          ranks_per_node=run.parallel.ranks_per_node)
                try:
                    parallel.validate(model, training.seq_length)
                    parallel.validate_world_size(num_devices)
                    parallel.token_dispatcher(setting.hardware.ranks_per_node(num_devices))
                    if tp not in tiled:
                        run.fp8.validate(model, parallel, training.transformer_impl)
                        tiled.add(tp)
                except ConfigError as error:
                    named = f"PP{pp} TP{tp}" + (f" CP{cp} {way}" if cp > 1 else "")
                    rejected.append(Rejected(f"{named} EP{ep}, all schedules", count, RULE, str(error)))
                    continue
                for name, stages in own:
                    for size in sizes:
                        for granularity in granularities:
                            yield Layout(pp, tp, ep, name, stages, size, granularity, cp, way)


def _splits(run: RunConfig, num_devices: int) -> list[int]:
    """Numbers of ranks that may share a sequence: none but one, such as have parts worth it, and the run's own."""
    length = run.training.seq_length
    powers = (1 << power for power in range(1, length.bit_length()))
    sizes = {1, run.parallel.context_parallel_size, *(size for size in powers if length // size in _PARTS)}
    return [size for size in sorted(sizes) if num_devices % size == 0]


def _way_to_split(run: RunConfig, setting: Setting, tp: int, cp: int) -> str:
    """How so many ranks share a sequence in least time, by the time of a layer; the first where it does not matter."""

    def seconds(way: str) -> float:
        parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, cp_comm_type=way)
        try:
            parallel.validate(run.model, run.training.seq_length)
        except ConfigError:
            return math.inf
        training = dataclasses.replace(run.training, micro_batch_size=1)
        work = WorkTable(dataclasses.replace(run, parallel=parallel, training=training), setting).layer(0)
        return sum(part.alone for part in work.alone.values())

    return _WAYS_TO_SPLIT[0] if cp == 1 else min(_WAYS_TO_SPLIT, key=seconds)


@dataclass(frozen=True)
class _Seconds:
    """F + I + W of a layer or of a stage's ends, and F of compute.

    Attributes:
        alone: Seconds with the all-to-all waited for.
        compute: Seconds without the all-to-all.
        shared: Compute beside communication.
        forward: Seconds of the forward pass (F) alone.
    """

    alone: float
    compute: float
    shared: float
    forward: float

    @classmethod
    def of(cls, work: StageWork) -> _Seconds:
        works = work.alone.values()
        return cls(sum(one.alone for one in works), sum(one.compute for one in works),
                   sum(one.compute for one in work.shared.values()),
                   work.alone[WorkPart.FORWARD].compute)

    @classmethod
    def between(cls, low: _Seconds, high: _Seconds, way: float) -> _Seconds:
        """So far on the way from one to the other."""
        rest = 1 - way
        return cls(rest * low.alone + way * high.alone, rest * low.compute + way * high.compute,
                   rest * low.shared + way * high.shared, rest * low.forward + way * high.forward)

    def __add__(self, other: _Seconds) -> _Seconds:
        return _Seconds(self.alone + other.alone, self.compute + other.compute, self.shared + other.shared,
                        self.forward + other.forward)

    def times(self, factor: float) -> _Seconds:
        """Multiply all of the times by a factor."""
        return _Seconds(self.alone * factor, self.compute * factor, self.shared * factor, self.forward * factor)


# A stage, what decides about its ends, and of each kind of layer the model's first, one of the stage's, and how many.
_Contents = tuple[StageLayout, tuple[object, ...], tuple[tuple[int, int, int], ...]]
_NOTHING = _Seconds(0.0, 0.0, 0.0, 0.0)
_IMBALANCES = (1.0, 1.2)


class _Bounds:
    """Lower bounds of step times: no rank does its work, nor waits for the stages before it, in less.

    Times of layers and of stages' ends depend on few of a layout's degrees, and are kept by them, for two imbalances of
    the routed rows; between and beyond they are taken as linear. What is computed again where weight gradients wait is
    left out.

    Args:
        setting: The machine.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._pieces: dict[object, tuple[_Seconds, _Seconds]] = {}
        self._tables: dict[object, tuple[WorkTable, WorkTable]] = {}
        self._stage_contents: dict[int, list[_Contents]] = {}

    def of(self, run: RunConfig, layout: Layout) -> float:
        """The lower bound of one run's step time, in seconds.

        Of DualPipe's and DualPipeV's passes at most 3H - 1 forwards, and as many backwards, are not in pairs, H being
        the ranks before the fold; those are counted as if without any all-to-all.
        """
        parallel, setting = run.parallel, self.setting
        hides = parallel.schedule in PAIRED and setting.overlaps_pairs
        # In pairs the imbalance of a pair; else of a layer.
        imbalance = Imbalance.of(run, setting)
        way = ((imbalance.pair if hides else imbalance.layer) - _IMBALANCES[0]) / (_IMBALANCES[1] - _IMBALANCES[0])
        stages = self._stages(run, layout, way)
        # A rank waits for the forwards before it; the ranks before it wait for its last backward, unless its weight
        # parts may come after they have what they wait for.
        is_split = parallel.schedule in SPLIT_BACKWARD
        before = [0.0, *itertools.accumulate(stage.forward if is_split else stage.compute for stage in stages)]
        total = run.training.num_microbatches(parallel.data_parallel_size(setting.num_devices))
        each = total // parallel.num_model_copies
        single = 3 * parallel.pipeline_model_parallel_size // parallel.num_model_copies - 1
        longest = 0.0
        for places in placement(parallel):
            held = sum((stages[place.stage] for place in places), _NOTHING)
            if hides:
                alone = min(each, single / len(places))  # passes of each stage, in the mean
                busy = alone * held.compute + (each - alone) * max(held.compute, held.shared)
            else:
                busy = each * held.alone
            longest = max(longest, before[min(place.stage for place in places)] + busy)
        return longest + least_update(run, setting)

    def _stages(self, run: RunConfig, layout: Layout, way: float) -> list[_Seconds]:
        key = (layout.tp, layout.cp, layout.cp_comm, layout.ep, layout.micro_batch_size, layout.recompute)
        if key not in self._tables:
            low, high = (WorkTable(run, dataclasses.replace(self.setting, imbalance=imbalance), splits_backward=False)
                         for imbalance in _IMBALANCES)
            self._tables[key] = low, high
        tables = self._tables[key]
        known: dict[object, _Seconds] = {}

        def piece(name: object, of: Callable[[WorkTable], StageWork]) -> _Seconds:
            if name not in known:
                if (key, name) not in self._pieces:
                    work = of(tables[0])
                    low = high = _Seconds.of(work)
                    if work.has_exchange:
                        high = _Seconds.of(of(tables[1]))
                    self._pieces[key, name] = low, high
                known[name] = _Seconds.between(*self._pieces[key, name], way)
            return known[name]

        stages = []
        for stage, end, counts in self._contents(run, tables[0]):
            total = piece(end, partial(_end_of, stage))
            for kind, index, count in counts:
                total += piece(kind, partial(_layer_of, index)).times(count)
            stages.append(total)
        return stages

    def _contents(self, run: RunConfig, table: WorkTable) -> list[_Contents]:
        """Contents of each stage: itself, its ends, and of each kind of layer (the kind, one of them, how many)."""
        size = run.parallel.num_stages
        if size not in self._stage_contents:
            first: dict[int, int] = {}  # of each kind the first layer of the model, which stands for it
            for index, linears in enumerate(table.linears):
                first.setdefault(id(linears), index)
            self._stage_contents[size] = []
            for stage in stage_layouts(run.model, run.parallel):
                kinds = {id(table.linears[index]): index for index in stage.layer_ids}
                counts = Counter(id(table.linears[index]) for index in stage.layer_ids)
                self._stage_contents[size].append((stage, end_key(run.model, stage), tuple(
                    (first[kind], kinds[kind], count) for kind, count in counts.items())))
        return self._stage_contents[size]


def _end_of(stage: StageLayout, table: WorkTable) -> StageWork:
    return table.end(stage)


def _layer_of(index: int, table: WorkTable) -> StageWork:
    return table.layer(index)
