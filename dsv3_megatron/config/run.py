"""One run: the model, how it is split, how it is trained, where it reads and writes; validated once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.data import LONG_CONVERSATIONS, DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.config.memory import require_moments, require_recompute
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.phases import check_fields_outside, errors_of_phase, validate_phases
from dsv3_megatron.config.policy import PolicyConfig
from dsv3_megatron.config.precision import Fp8Config
from dsv3_megatron.config.recipe import PlannedPhase, Recipe, plan_recipe
from dsv3_megatron.config.training import (
    WITHOUT_PHASES,
    CheckpointConfig,
    LoggingConfig,
    TrainingConfig,
    require_license,
)
from dsv3_megatron.config.values import plain, require_values

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "guards": GuardConfig,
    "fp8": Fp8Config,
    "policy": PolicyConfig,
}
_SECTION_OF = {field.name: section for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)}


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        preset: Name of the preset that the run started from, for the record.
        from_hf: Folder of the model whose `config.json` took the place of the preset's architecture, for the record;
            None: there was none.
    """

    preset: str
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    guards: GuardConfig = GuardConfig()
    fp8: Fp8Config = Fp8Config()
    policy: PolicyConfig = PolicyConfig()
    from_hf: str | None = None

    @property
    def name(self) -> str:
        """What to call the run in titles: its preset, or the model whose architecture it took."""
        return run_name(self.preset, self.from_hf)

    @property
    def keeps_average(self) -> bool:
        """Whether the run keeps fp32 weights beside those that it trains: their moving average, or GRPO's reference."""
        return self.training.ema_decay > 0 or (self.policy.is_on and self.policy.kl_coefficient > 0)

    def override(self, **values: Any) -> RunConfig:
        """A copy in which each named field, whatever its section, has the given value.

        Fields that the first phase has from its first step on get its values, so that they say what the run starts
        with.

        Raises:
            ConfigError: a name that no section has, or a value that the run's phases leave no use for.
        """
        run = self._replaced(values)
        phases = run.training.phases
        check_fields_outside(values, phases, WITHOUT_PHASES)
        return run._replaced(phases[0].given_at_once()) if phases else run

    def _replaced(self, values: Mapping[str, Any]) -> RunConfig:
        changes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            changes.setdefault(section_of(name), {})[name] = value
        replaced: dict[str, Any] = {
            section: dataclasses.replace(getattr(self, section), **fields) for section, fields in changes.items()
        }
        return dataclasses.replace(self, **replaced)

    def validate(self, world_size: int | None = None) -> None:
        """Check every rule, those about the number of processes too if it is given.

        Raises:
            ConfigError: the first rule that is broken, in one message with the way out.
        """
        for section in SECTIONS:
            require_values(getattr(self, section))
        validate_phases(self.training.phases)
        self._validate_training(world_size)
        recipe = self.recipe()
        if self.training.seed + len(recipe.spans) > 2**32:
            raise ConfigError(f"seed={self.training.seed} must not exceed {2**32 - len(recipe.spans)}: each of the "
                              f"run's {len(recipe.spans)} datasets is shuffled by the seed before plus 1, all below "
                              "2^32")
        for phase in recipe.phases if self.training.phases else ():
            # What comes after a stop may need another layout, and what layout it names is checked when it is run.
            is_run = phase.index < recipe.num_phases
            checked = phase if is_run else dataclasses.replace(phase, parallel=self.parallel)
            with errors_of_phase(phase.name):
                self.in_phase(checked)._validate_training(world_size if is_run else None)
                self._validate_ramp(checked, world_size if is_run else None)
                if checked.parallel != self.parallel:
                    self._validate_other_layout(checked)
        self.fp8.validate(self.model, self.parallel, self.training.transformer_impl)
        require_conversations(self.data)
        require_document_attention(self.data, self.training.transformer_impl)
        require_context_parallel(self.parallel, self.training.transformer_impl, self.training.attention_backend)
        require_recompute(self.training, self.model)
        if self.training.transformer_impl == "transformer_engine":
            require_engine_epsilon(self.model)
        if self.checkpoint.save and self.checkpoint.save_interval < 1:
            raise ConfigError(f"save_interval={self.checkpoint.save_interval} must be at least 1")
        if self.checkpoint.resume == "auto" and self.checkpoint.overwrite_run:
            raise ConfigError("overwrite_run removes what resume=auto would go on from, at every start of the run; "
                              "leave out --resume auto to begin anew, or --overwrite-run to go on")
        if self.checkpoint.export_hf and not self.checkpoint.save:
            raise ConfigError(f"export_hf={self.checkpoint.export_hf} needs save: the run's last checkpoint is what is "
                              "exported")
        require_license("export_license", self.checkpoint.export_license)
        if self.checkpoint.max_failed_saves < 0:
            raise ConfigError(f"max_failed_saves={self.checkpoint.max_failed_saves} must not be negative; 0 never ends "
                              "a run for checkpoints that cannot be written")
        if self.checkpoint.pretrained_checkpoint and self.checkpoint.pretrained_checkpoint == self.checkpoint.save:
            raise ConfigError(f"pretrained_checkpoint={self.checkpoint.pretrained_checkpoint} is what the run begins "
                              "with, and save is where its own checkpoints go; give another folder for one of them")
        if self.checkpoint.keep_last < 0:
            raise ConfigError(f"keep_last={self.checkpoint.keep_last} must not be negative; 0 keeps all checkpoints")
        if self.logging.trace_schedule and self.parallel.pipeline_model_parallel_size == 1:
            raise ConfigError(f"trace_schedule={self.logging.trace_schedule} records what pipeline ranks do and needs "
                              "pipeline_model_parallel_size of at least 2; leave it out")
        self.logging.validate()
        self.guards.validate(self.checkpoint)
        self.policy.validate(self.data, self.training, self.parallel, self.guards, fp8=self.fp8.fp8,
                             mtp_num_layers=self.model.mtp_num_layers)

    @property
    def longest_answer(self) -> int:
        """Most positions of a prompt with its answer in a run of GRPO: a sequence's, and the model's context."""
        return min(self.training.seq_length, self.model.max_position_embeddings)

    def _validate_training(self, world_size: int | None) -> None:
        """The rules of model, split and batch, which phases may change."""
        require_values(self.model)
        require_values(self.training)
        self.model.validate()
        self.parallel.validate(self.model, self.training.seq_length)
        if world_size is not None:
            self.parallel.validate_world_size(world_size)
        self.training.validate(self.parallel, world_size)
        require_moments(self.training)
        # Answers share a sequence, and positions restart in each: `longest_answer` keeps them in the context.
        if self.training.seq_length > self.model.max_position_embeddings and not self.policy.is_on:
            raise ConfigError(
                f"seq_length={self.training.seq_length} must not exceed "
                f"max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.model.mtp_num_layers >= self.training.seq_length:
            raise ConfigError(
                f"mtp_num_layers={self.model.mtp_num_layers} must be less than seq_length={self.training.seq_length}: "
                "the module of depth k predicts the token k positions beyond the next, and the last one would have "
                "none to predict")

    def _validate_other_layout(self, phase: PlannedPhase) -> None:
        """The rules of a phase that is run under another layout than the run's own."""
        self.fp8.validate(phase.model, phase.parallel, self.training.transformer_impl)
        require_context_parallel(phase.parallel, self.training.transformer_impl, self.training.attention_backend)
        if not self.checkpoint.save:
            raise ConfigError("the phase has another layout than the run begins with, and goes on from a checkpoint "
                              "under it: give save, a folder, or --stop-after-phase a phase before it")

    def _validate_ramp(self, phase: PlannedPhase, world_size: int | None) -> None:
        """The split has to be able to do every batch of a ramp."""
        sizes = phase.batch_size.sizes()
        for size in sizes[:-1] if world_size is not None else ():
            try:
                dataclasses.replace(phase.training, global_batch_size=size).validate(phase.parallel, world_size)
            except ConfigError as error:
                raise ConfigError(
                    f"the batch goes from {sizes[0]} to global_batch_size={sizes[-1]} in steps of "
                    f"global_batch_size_increment={phase.batch_size.increment}, and on the way {error}") from error

    @property
    def minimum_world_size(self) -> int:
        """Smallest number of processes on which every phase that the run does can be."""
        return math.lcm(*(phase.parallel.minimum_world_size for phase in self.recipe().phases_to_run))

    def recipe(self) -> Recipe:
        """What each step is taken with, from the first to the last; of a valid run.

        Raises:
            ConfigError: a phase does not fit the one before it.
        """
        return plan_recipe(self.model, self.training, self.data, self.parallel)

    def in_phase(self, phase: PlannedPhase) -> RunConfig:
        """The run with the model, batch, sequence length, data and layout of one of its phases.

        Its own recipe is not the run's: what phases before this one changed holds in it from the start.
        """
        return dataclasses.replace(self, model=phase.model, training=phase.training, data=phase.data,
                                   parallel=phase.parallel)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as `load.py` writes and reads them; with phases, without what those leave unused."""
        values: dict[str, Any] = {"preset": self.preset}
        if self.from_hf is not None:
            values["from_hf"] = self.from_hf
        for name in SECTIONS:
            values[name] = {field.name: plain(getattr(getattr(self, name), field.name))
                            for field in dataclasses.fields(SECTIONS[name])}
        values["training"]["phases"] = [phase.as_dict() for phase in self.training.phases]
        for name in WITHOUT_PHASES if self.training.phases else ():
            del values["training"][name]
        return values


def run_name(preset: str, from_hf: str | None) -> str:
    """What to call a run in titles, by `RunConfig`'s fields of these names."""
    if from_hf is None:
        return preset
    path = os.path.abspath(from_hf)
    return os.path.basename(os.path.dirname(path) if path.endswith(".json") else path)


def require_engine_epsilon(model: ModelConfig) -> None:
    """Check that Transformer Engine's modules, whose fused norms have one epsilon, can compute the model.

    Raises:
        ConfigError: the model's latent norms have an epsilon of their own.
    """
    if model.latent_epsilon != model.layernorm_epsilon:
        raise ConfigError(
            f"latent_layernorm_epsilon={model.latent_layernorm_epsilon} cannot differ from layernorm_epsilon="
            f"{model.layernorm_epsilon} with transformer_impl=transformer_engine; set transformer_impl=local")


def require_conversations(data: DataConfig) -> None:
    """Check what a run asks for beside conversations.

    Raises:
        ConfigError: a switch of documents is on beside them, or there are none for a setting that is about them.
    """
    if data.sft and data.document_flags:
        raise ConfigError(f"{data.document_flags[0]}=True cannot go with sft=True: conversations are kept apart in any "
                          "case, and their masks say what counts; leave it out")
    if data.long_conversations not in LONG_CONVERSATIONS:
        raise ConfigError(f"long_conversations={data.long_conversations!r} must be one of "
                          f"{', '.join(LONG_CONVERSATIONS)}")
    if data.long_conversations != "refuse" and not data.sft:
        raise ConfigError(f"long_conversations={data.long_conversations} is about conversations; give sft too, or "
                          "leave it out")


def require_document_attention(data: DataConfig, transformer_impl: str) -> None:
    """Check that the modules a run asks for can keep documents apart where it asks for that.

    Raises:
        ConfigError: Transformer Engine's attention is to keep documents apart.
    """
    if data.has_document_attention and transformer_impl == "transformer_engine":
        names = [name for name in ("sft", *data.document_flags) if name != "eod_mask_loss" and getattr(data, name)]
        flags = " and ".join(f"{name}=True" for name in names)
        raise ConfigError(
            f"{flags} cannot go with transformer_impl=transformer_engine, whose attention knows one document a "
            "sequence; set transformer_impl=local")


def require_context_parallel(parallel: ParallelConfig, transformer_impl: str, attention_backend: str = "auto") -> None:
    """Check that the modules a run asks for can compute with a part of a sequence where the layout splits it.

    Raises:
        ConfigError: Transformer Engine's attention is to do so, or one that cannot attend to blocks is to get them.
    """
    if parallel.context_parallel_size > 1 and transformer_impl == "transformer_engine":
        raise ConfigError(
            f"context_parallel_size={parallel.context_parallel_size} cannot go with transformer_impl="
            "transformer_engine, whose attention is not given latents; set transformer_impl=local")
    if parallel.passes_latents and attention_backend in ("fused", "unfused"):
        raise ConfigError(
            f"attention_backend={attention_backend} cannot attend to blocks of other ranks' tokens, which "
            f"context_parallel_size={parallel.context_parallel_size} with cp_comm_type={parallel.cp_comm_type} has; "
            "set attention_backend=auto, or cp_comm_type=a2a")


def section_of(name: str) -> str:
    """The section of RunConfig that has the field `name`.

    Raises:
        ConfigError: no section has it; the nearest names are given.
    """
    import difflib

    if name not in _SECTION_OF:
        close = difflib.get_close_matches(name, _SECTION_OF, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{name} is not a field of a run{hint}")
    return _SECTION_OF[name]
