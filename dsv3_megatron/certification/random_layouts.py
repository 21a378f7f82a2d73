"""Layouts at random, as the flags that a user would give: over all dimensions that a layout has.

Each is drawn by its own generator, from the seed and its number, until the rules of a run accept it: a layout is the
same whoever asks for it, and however many.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.parallel import CP_COMM_TYPES
from dsv3_megatron.config.pipeline import RULES, microbatches_multiple, stages_per_rank

_ATTEMPTS = 1000


@dataclass(frozen=True)
class _Split:
    """Degrees of a layout that fit one another, and its schedule."""

    world_size: int
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    schedule: str
    virtual: int

    @property
    def stages(self) -> int:
        return self.pp * stages_per_rank(self.schedule, self.virtual)


def random_layouts(count: int, seed: int, max_processes: int, *, splits_sequences: bool = False
                   ) -> Iterator[tuple[int, list[str]]]:
    """Draw layouts that a run can have.

    Args:
        count: Number of layouts.
        seed: Seed of all of them.
        max_processes: Most processes of one.
        splits_sequences: Every layout has context-parallel ranks, and some have YaRN, as long sequences do; such
            layouts are others than those that the same seed gives without it.

    Yields:
        The number of processes, and the flags of the run.

    Raises:
        ConfigError: two ranks are to share a sequence, and only one process may be started.
        RuntimeError: no valid layout was drawn in many attempts.
    """
    if splits_sequences and max_processes < 2:
        raise ConfigError(f"--with context needs at least 2 processes for a layout, and {max_processes} may be "
                          "started; give --processes 2 or more")
    for number in range(count):
        generator = random.Random(f"{seed}/{number}")
        split = _draw_split(generator, max_processes, (2, 2, 4) if splits_sequences else (1, 1, 2, 2, 4))
        for _ in range(_ATTEMPTS):
            flags = _draw_flags(generator, split)
            if splits_sequences:
                flags += generator.choice([[], ["--rope-type", "yarn", "--rotary-scaling-factor", "4"]])
            try:
                shrink(parse_command(flags).run, split.world_size, max_processes)
            except ConfigError:
                continue
            yield split.world_size, flags
            break
        else:
            raise RuntimeError(f"no valid layout in {_ATTEMPTS} attempts for {split}")


def _draw_split(generator: random.Random, max_processes: int, context_sizes: tuple[int, ...]) -> _Split:
    pick = generator.choice
    world_size = pick([size for size in (1, 2, 2, 2, 4, 4, 4, 4, 4, 8) if min(context_sizes) <= size <= max_processes])
    while True:
        tp, pp = pick([1, 2, 4] if world_size > 4 else [1, 1, 2]), pick([1, 2, 2, 4, 4])
        cp = pick(context_sizes)
        ep, etp = pick([1, 2, 2, 4]), pick([1, 1, 2])
        if world_size % (tp * cp * pp) or world_size % (ep * etp * pp):
            continue
        schedule = pick(list(RULES)) if pp > 1 else "1f1b"
        virtual = pick([2, 2, 3]) if schedule == "interleaved" else 1
        return _Split(world_size, tp, cp, pp, ep, etp, schedule, virtual)


def _draw_flags(generator: random.Random, split: _Split) -> list[str]:
    """Flags for one split, which the rules of a run may refuse."""
    pick, chance = generator.choice, generator.random
    pp, schedule, stages = split.pp, split.schedule, split.stages
    words: dict[str, str] = {
        "preset": "tiny", "tensor-model-parallel-size": str(split.tp), "pipeline-model-parallel-size": str(pp),
        "expert-model-parallel-size": str(split.ep), "expert-tensor-parallel-size": str(split.etp)}
    if split.cp > 1:
        words |= {"context-parallel-size": str(split.cp), "cp-comm-type": pick(["p2p", "p2p", *CP_COMM_TYPES])}
    switches: list[str] = []
    modules = pick([0, 1, 1, 2])
    if pp > 1:
        words |= {"pipeline-schedule": schedule, "num-virtual-stages-per-pipeline-rank": str(split.virtual)}
        if schedule == "interleaved" and chance() < 0.5:
            switches.append("--overlap-moe-expert-parallel-comm")
    layers = max(stages, pick([3, 4, 4, 5]))
    if pp > 1 and chance() < 0.6:
        layout = _uneven(generator, stages, modules)
        words["pipeline-model-parallel-layout"] = layout
        layers = layout.count("t")
    dense = pick([0, 1, 1, 2])
    words |= {"num-layers": str(layers), "num-dense-layers": str(min(dense, layers)), "mtp-num-layers": str(modules)}
    words |= _model_words(generator)
    micro_batch_size = pick([1, 1, 2])
    # Fewer than fill the pipeline, and more.
    count = microbatches_multiple(schedule, pp) * pick([1, 2, 3, 4])
    replicas = split.world_size // (split.tp * split.cp * pp)
    words |= {"micro-batch-size": str(micro_batch_size),
              "global-batch-size": str(count * micro_batch_size * replicas)}
    recomputed = pick(["", "", "selective", "modules", "full"])
    if recomputed == "modules":
        chosen = [name for name in ("layernorm", "mla_up_proj", "moe_act") if chance() < 0.5] or ["moe_act"]
        switches += ["--recompute-modules", *chosen]
        recomputed = "selective"
    if recomputed:
        words["recompute-granularity"] = recomputed
    # Where latents are passed, each rank rounds its share of their gradient to FP8 by itself, and what the certificate
    # allows in FP8 is not kept (docs/guides/parallelism.md).
    if split.cp == 1 and chance() < 0.1:
        words["fp8"] = "blockwise"
        if chance() < 0.3:
            words["fp8-dispatch"] = "bf16"
    switches += pick([[], [], ["--eod-mask-loss"],
                      ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"],
                      ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"],
                      ["--reset-attention-mask"]])
    switches += [f"--no-overlap-{what}" for what in ("grad-reduce", "param-gather") if chance() < 0.2]
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    return [*flags, *switches]


def _model_words(generator: random.Random) -> dict[str, str]:
    """Parts of the model that decide which code runs."""
    pick = generator.choice
    words = {"num-shared-experts": pick(["0", "1", "1", "2"]), "q-lora-rank": pick(["64", "64", "none"])}
    groups, kept = pick([(1, 1), (4, 2), (4, 2), (2, 1)])
    words |= {"moe-router-num-groups": str(groups), "moe-router-group-topk": str(kept)}
    words |= {"num-experts": pick(["8", "16"]), "moe-router-topk": pick(["2", "4"])}
    if generator.random() < 0.1:
        words["moe-router-score-function"] = "softmax"
    if generator.random() < 0.1:
        words["moe-aux-loss-coeff"] = "0"
    if generator.random() < 0.1:
        words["clip-grad"] = "0"
    return words


def _uneven(generator: random.Random, stages: int, modules: int) -> str:
    """A split into stages at random: with ends that are bare, or the MTP modules apart from the loss, or neither."""
    has_bare_start = generator.random() < 0.25
    end = generator.choice(["together", "together", "modules alone", "loss apart", "loss and modules apart"])
    if not modules and end != "together":
        end = "loss alone"
    m = "m" * modules
    ways: dict[str, list[str | None]] = {
        "together": [None], "modules alone": [f"{m}L"], "loss alone": ["L"], "loss apart": [None, "L"],
        "loss and modules apart": [m, "L"]}
    tails = ways[end]
    middle = stages - len([tail for tail in tails if tail is not None]) - has_bare_start
    if middle < 1:
        return "E" + "t" * 3 + m + "L"  # no such number of stages: the rules of a run refuse it
    counts = [generator.choice([1, 1, 2, 3] if stages <= 4 else [1, 1, 2]) for _ in range(middle)]
    parts = ["t" * count for count in counts]
    if end == "together":
        parts[-1] += f"{m}L"
    elif end == "loss apart":
        parts[-1] += m
    parts += [tail for tail in tails if tail is not None]
    if has_bare_start:
        parts = ["", *parts]
    parts[0] = "E" + parts[0]
    return "|".join(parts)
