"""One training step under one layout after another, in the processes of a launch: what `test_layouts.py` compares.

A step is the trainer's own, as `dsv3 certify` takes it (`certification/rank_step.py`). Its data are random, its weights
the reference's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv3_megatron.certification.random_samples import RandomSamples
from dsv3_megatron.certification.rank_step import MadeDataTrainer, RankStep, StepHooks, take_step
from dsv3_megatron.certification.routing_notes import replaced
from dsv3_megatron.certification.weight_names import load_reference_weights
from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.router import DeepSeekRouter
from dsv3_megatron.model.stage.buckets import StageBuckets
from dsv3_megatron.runs.trainer import Trainer
from tests.parity.architectures import GROUPED, reference_weights, run_of, variant

SEQ_LENGTH, GLOBAL_BATCH_SIZE = 16, 8
EOD = 7
LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD = 0.05, 0.1, 0.5
# AdamW's first update is g / (|g| + eps): with a small eps the sign of g, also of one that is rounding alone. This one
# is of the size of the clipped gradients, so that the update is smooth in them.
ADAM_EPS = 1e-3


@dataclass(frozen=True)
class Layout:
    """A split of the model over processes.

    Attributes:
        name: Of the test.
        num_ranks: Processes.
        parallel: The split.
        mtp_num_layers: MTP modules of the model.
        num_layers: Of the main model, the first of them dense.
        is_isolated: Documents do not see each other, positions restart, and losses at their ends do not count.
        mask: Which tokens count: "random", or a name in MASKS.
        balance_loss_alpha: Weight of the balance losses; None: the architectures'.
        balance_loss: Name of the balance loss.
        recompute_granularity: What is computed again in backward: "selective" is all that can be by name.
        fault: Name in FAULTS of what is broken on purpose, "" for nothing.
    """

    name: str
    num_ranks: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    mtp_num_layers: int = 1
    num_layers: int = 4
    is_isolated: bool = False
    recompute_granularity: str | None = None
    fault: str = ""
    mask: str = "random"
    balance_loss_alpha: float | None = None
    balance_loss: str = "seq_aux_loss"

    @property
    def num_replicas(self) -> int:
        """Data-parallel size."""
        return self.parallel.data_parallel_size(self.num_ranks)

    @property
    def num_micro_batches(self) -> int:
        """Four for each of one or two pipelines, two for each of four; eight for four ranks, as DualPipe needs."""
        if self.parallel.pipeline_model_parallel_size == 4:
            return 8
        return 2 if self.num_replicas == 4 else 4

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a micro-batch."""
        return GLOBAL_BATCH_SIZE // self.num_micro_batches // self.num_replicas

    @property
    def run(self) -> RunConfig:
        """Four groups of experts."""
        model = variant("plain", num_layers=self.num_layers, mtp_num_layers=self.mtp_num_layers, **GROUPED)
        # A gradient that is reduced under the passes cannot be changed behind them.
        is_changed = self.fault and isinstance(FAULTS[self.fault], ScaledGradient)
        return run_of(
            model, dataclasses.replace(self.parallel, overlap_grad_reduce=not is_changed),
            seq_length=SEQ_LENGTH, micro_batch_size=self.micro_batch_size,
            global_batch_size=GLOBAL_BATCH_SIZE, train_iters=1, lr=LEARNING_RATE, min_lr=LEARNING_RATE,
            lr_warmup_iters=0, lr_decay_style="constant", weight_decay=WEIGHT_DECAY, clip_grad=CLIP_GRAD,
            adam_eps=ADAM_EPS, moe_router_bias_update_rate=1e-3, precision="fp32",
            **({} if self.balance_loss_alpha is None else {"moe_aux_loss_coeff": self.balance_loss_alpha}),
            moe_router_load_balancing_type=self.balance_loss,
            recompute_granularity=self.recompute_granularity, reset_attention_mask=self.is_isolated,
            reset_position_ids=self.is_isolated, eod_mask_loss=self.is_isolated,
            # So that the instruments look; the launch's own folder, in which a run leaves its lock. A layout with a
            # fault has its own: the guards may have something to say there.
            tensorboard_dir=f"{tempfile.gettempdir()}/layouts-{os.environ.get('MASTER_PORT', 'alone')}"
                            + f"-{self.name}" * bool(self.fault))


def _one_sequence_alone() -> torch.Tensor:
    """All tokens of the fourth sequence and none of the others."""
    mask_BS = torch.zeros(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    mask_BS[3] = 1.0
    return mask_BS


# Masks of a step [B, S] by what they let count.
MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "all": lambda: torch.ones(GLOBAL_BATCH_SIZE, SEQ_LENGTH),
    "the first quarter": lambda: (torch.arange(SEQ_LENGTH) < SEQ_LENGTH // 4).float().repeat(GLOBAL_BATCH_SIZE, 1),
    "one sequence": _one_sequence_alone,
}


def random_samples(vocab_size: int, is_isolated: bool = False, mask: str = "random") -> RandomSamples:
    """Samples of a step, the same in every process; with documents of 5 tokens on average where they are isolated."""
    data = DataConfig(reset_attention_mask=is_isolated, reset_position_ids=is_isolated, eod_mask_loss=is_isolated)
    return RandomSamples(GLOBAL_BATCH_SIZE, SEQ_LENGTH, vocab_size, data=data,
                         mask_BS=None if mask == "random" else MASKS[mask]())


class OneStepTrainer(MadeDataTrainer):
    """The trainer on random samples, of which `mask` says what counts; messages go under passes as on a GPU."""

    def __init__(self, run: RunConfig, mask: str = "random") -> None:
        os.environ["DSV3_OVERLAP_ON_CPU"] = "1"
        super().__init__(run, random_samples(run.model.vocab_size, run.data.reset_attention_mask, mask))


def run_layouts(layouts: list[Layout]) -> dict[str, RankStep]:
    """This rank's part of one step under each layout."""
    from megatron.core import parallel_state

    results = {}
    for layout in layouts:
        results[layout.name] = run_step(layout)
        parallel_state.destroy_model_parallel()
    return results


def run_step(layout: Layout) -> RankStep:
    """One step from the reference's weights, broken on purpose where the layout says so."""
    run = layout.run
    run.validate(torch.distributed.get_world_size())
    trainer = OneStepTrainer(run, layout.mask)
    load_reference_weights(trainer.chunks, trainer.groups, reference_weights(run.model), run.model.num_layers)
    trainer.optimizer.reload_model_params()
    return take_step(trainer, FAULTS[layout.fault] if layout.fault else None)


def _parameters(trainer: Trainer, ending: str) -> list[torch.nn.Parameter]:
    found = [parameter for chunk in trainer.chunks for name, parameter in chunk.named_parameters()
             if name.endswith(ending)]
    assert found or trainer.groups.pp.size() > 1
    return found


class ScaledGradient(StepHooks):
    """The last rank's contribution to some parameters counts `factor` times."""

    def __init__(self, ending: str, factor: float) -> None:
        self.ending, self.factor = ending, factor

    def before_reduction(self, trainer: Trainer) -> None:
        if trainer.rank == trainer.world_size - 1:
            for parameter in _parameters(trainer, self.ending):
                parameter.main_grad.mul_(self.factor)


class MiscountedLoad(StepHooks):
    """One token too many on one rank, for one expert."""

    def before_reduction(self, trainer: Trainer) -> None:
        if trainer.rank == trainer.world_size - 1:
            router = next(m for chunk in trainer.chunks for m in chunk.modules() if isinstance(m, DeepSeekRouter))
            router.tokens_per_expert[3] += 1


class StaleParameter(StepHooks):
    """One rank misses the update of its copy of a parameter."""

    def before_step(self, trainer: Trainer) -> None:
        self.before = [parameter.detach().clone() for parameter in _parameters(trainer, "router.weight")]

    def after_step(self, trainer: Trainer) -> None:
        if trainer.rank == trainer.world_size - 1:
            for parameter, before in zip(_parameters(trainer, "router.weight"), self.before, strict=True):
                parameter.data.copy_(before)


class BrokenBuckets(StepHooks):
    """Buckets with other methods, by name: functions of a `StageBuckets` and of the method's arguments."""

    def __init__(self, **methods: Callable[..., None]) -> None:
        self.methods, self.stack = methods, contextlib.ExitStack()

    def before_step(self, trainer: Trainer) -> None:
        for name, method in self.methods.items():
            self.stack.enter_context(replaced(StageBuckets, name, method))

    def after_step(self, trainer: Trainer) -> None:
        self.stack.close()


_begin_step, _pass_forward = StageBuckets.begin_step, StageBuckets.pass_forward


def _gather_behind_the_passes(buckets: StageBuckets, *_args: Any) -> None:
    for place in buckets._groups:
        _pass_forward(buckets, place)


class LeakyStage(StepHooks):
    """The last pipeline stage does not know where documents end."""

    def before_step(self, trainer: Trainer) -> None:
        if trainer.groups.pp.rank() == trainer.groups.pp.size() - 1:
            trainer.run = trainer.run.override(reset_attention_mask=False, reset_position_ids=False)


FAULTS: dict[str, StepHooks] = {
    "stage-leaks": LeakyStage(),
    "router-slightly-off": ScaledGradient("mlp.router.weight", 1.001),
    "experts-lost": ScaledGradient("experts.linear_fc2.weight", 0.0),
    "embedding-copy-lost": ScaledGradient("word_embeddings.weight", 0.0),
    "load-miscounted": MiscountedLoad(),
    "parameter-stale": StaleParameter(),
    # Half of the micro-batches are expected.
    "reduced-early": BrokenBuckets(begin_step=lambda buckets, number: _begin_step(buckets, number // 2)),
    "weights-not-gathered": BrokenBuckets(pass_forward=lambda _buckets, _place: None,
                                          start_gathering=lambda _buckets: None,
                                          end_step=_gather_behind_the_passes),
}
