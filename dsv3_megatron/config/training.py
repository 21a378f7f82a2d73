"""How long is trained, and how: schedule, optimizer, precision, checkpoints, logs; what a step takes is in `step.py`.

Plain frozen data, no torch. Flags that exist in Megatron-LM keep its spelling and meaning.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from dsv3_megatron.config.fields import (
    ConfigError,
    InPhases,
    all_divisors,
    names_in_phases,
    nearest,
    option,
    require_finite,
)
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.phases import LR_DECAY_STYLES, Phase, read_phases
from dsv3_megatron.config.pipeline import microbatches_problem, nearest_microbatches
from dsv3_megatron.config.router_functions import BALANCE_LOSSES
from dsv3_megatron.config.step import StepConfig
from dsv3_megatron.config.values import hold_tuples

MOMENT_DTYPES = ("fp32", "bf16")
MOMENT_ROUNDINGS = ("stochastic", "nearest")
RECOMPUTE_GRANULARITIES = ("selective", "full")
PRECISIONS = ("auto", "bf16", "fp32")
TRANSFORMER_IMPLS = ("auto", "local", "transformer_engine")
VERIFY_FILES = ("read", "all", "none")
# What a start goes on from: what `load` names, or `save` if there is something in it.
RESUME = ("load", "auto")
ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused", "local")


@dataclass(frozen=True)
class TrainingConfig(StepConfig):
    """Batch, length of the run, optimizer and losses. Source: DeepSeek-V3 report, section 4.2.

    With `phases`, the fields that a phase has too hold before the first one, and those of WITHOUT_PHASES are not used:
    they are what they are by default.
    """

    train_iters: int = option(1000, in_phases=InPhases.REPLACED, help="optimizer steps of the whole run")
    phases: tuple[Phase, ...] = option(
        (), read=read_phases, help="file with phases (TOML, YAML or JSON), which take the place of --train-iters and "
        "the learning rate's flags; none: no phases")
    stop_after_phase: str | None = option(
        None, help="phase after which the run saves and ends, to go on under another layout; none: the last")
    min_lr: float = option(2.2e-5, in_phases=InPhases.REPLACED, help="learning rate at the end of the decay")
    lr_warmup_iters: int = option(0, in_phases=InPhases.REPLACED, help="steps of linear warm-up from 0")
    lr_decay_style: str = option(
        "cosine", choices=LR_DECAY_STYLES, in_phases=InPhases.REPLACED, help="shape of the decay after the warm-up")
    lr_decay_iters: int | None = option(
        None, in_phases=InPhases.REPLACED, help="step at which min_lr is reached; none: train_iters")
    adam_beta1: float = option(0.9, help="AdamW: decay of the first moment")
    adam_beta2: float = option(0.95, help="AdamW: decay of the second moment")
    adam_eps: float = option(1e-8, help="AdamW: epsilon (the report gives none)")
    weight_decay: float = option(0.1, help="AdamW: decay of matrices; norms' weights are not decayed")
    exp_avg_dtype: str = option("fp32", choices=MOMENT_DTYPES, help="AdamW: storage of the first moment")
    exp_avg_sq_dtype: str = option("fp32", choices=MOMENT_DTYPES, help="AdamW: storage of the second moment")
    moment_rounding: str = option("stochastic", choices=MOMENT_ROUNDINGS, help="AdamW: how bf16 moments are rounded")
    ema_decay: float = option(0.0, help="decay of the weights' average in CPU memory, a step; 0: none is kept (the "
                              "report gives none; the dsv3 presets have 0.999)")
    eval_ema: bool = option(False, help="validate the weights' average too")
    clip_grad: float = option(1.0, help="largest global gradient norm; 0: no clipping")
    moe_aux_loss_coeff: float = option(1e-4, help="alpha: weight of the balance loss")
    moe_router_load_balancing_type: str = option(
        "seq_aux_loss", choices=BALANCE_LOSSES, help="the balance loss that alpha weighs, of each sequence by itself; "
        "seq_aux_loss: the report's")
    precision: str = option("auto", choices=PRECISIONS,
                            help="of weights and activations; auto: bf16 where the device computes it fast")
    transformer_impl: str = option("auto", choices=TRANSFORMER_IMPLS,
                                   help="modules to build from; auto: transformer_engine where installed with CUDA")
    attention_backend: str = option("auto", choices=ATTENTION_BACKENDS,
                                    help="core attention: fused (Transformer Engine's or cuDNN's), flash "
                                         "(FlashAttention), unfused (the matrix of scores in memory), local (this "
                                         "library's own); auto: the first that is possible, on a CPU local")
    recompute_granularity: str | None = option(None, choices=(*RECOMPUTE_GRANULARITIES,), help="computed again in "
                                               "backward: selective (by name) or full (whole layers); none: all kept")
    recompute_modules: tuple[str, ...] = option(
        (), nargs="*", help="with selective: layernorm, mla_up_proj, moe_act; none given: all three, as in the report")
    seed: int = option(1234, most=2**32 - 1, help="of weights and data order")
    eval_interval: int = option(100, help="steps between validations; 0: never")
    eval_iters: int = option(10, help="global batches in one validation")

    def __post_init__(self) -> None:
        hold_tuples(self)
        for field in dataclasses.fields(self) if self.phases else ():
            if field.name in WITHOUT_PHASES:
                object.__setattr__(self, field.name, field.default)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.seq_length

    def precision_on(self, *, is_cpu: bool) -> str:
        """The precision, "bf16" or "fp32", on a device of which only the kind is known, as in a plan.

        "auto" is bf16 on a GPU and fp32 on a CPU. A process that runs asks its own device, which may be a CPU that is
        fast in bf16 (`platform.resolve_precision`).
        """
        if self.precision != "auto":
            return self.precision
        return "fp32" if is_cpu else "bf16"

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Forward passes of one replica in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)

    def validate(self, parallel: ParallelConfig, world_size: int | None) -> None:
        """Check the rules of the batch and the schedule; `world_size` None skips what needs it.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        require_finite(self)
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "train_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "moe_router_bias_update_rate",
                     "moe_aux_loss_coeff", "mtp_loss_scaling_factor", "lr_warmup_iters", "eval_interval", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.adam_eps <= 0:
            raise ConfigError(f"adam_eps={self.adam_eps} must be greater than 0")
        if self.eval_interval and self.eval_iters < 1:
            raise ConfigError(f"eval_iters={self.eval_iters} must be at least 1; eval_interval=0 turns validation off")
        if not self.phases:
            self._validate_decay()
        for name, allowed in (("precision", PRECISIONS), ("transformer_impl", TRANSFORMER_IMPLS),
                              ("attention_backend", ATTENTION_BACKENDS),
                              ("lr_decay_style", LR_DECAY_STYLES),
                              ("moe_router_load_balancing_type", BALANCE_LOSSES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.attention_backend == "local" and self.transformer_impl == "transformer_engine":
            raise ConfigError("attention_backend=local is this library's own attention, in local modules, not "
                              "transformer_impl=transformer_engine; set transformer_impl=local, or another backend")
        if world_size is not None:
            self._validate_batch(parallel, world_size)

    def _validate_decay(self) -> None:
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr={self.min_lr} must not exceed lr={self.lr}")
        decay_iters = self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters
        if decay_iters < 1:
            raise ConfigError(f"lr_decay_iters={decay_iters} must be at least 1; leave it out for train_iters")
        if self.lr_warmup_iters > decay_iters:
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must not exceed the "
                              f"{decay_iters} steps of lr_decay_iters (train_iters by default); make the warm-up "
                              f"shorter (--lr-warmup-iters {decay_iters // 10}) or the run longer")

    def _validate_batch(self, parallel: ParallelConfig, world_size: int) -> None:
        replicas = parallel.data_parallel_size(world_size)
        if self.global_batch_size % (self.micro_batch_size * replicas):
            way_out = f"try a global_batch_size that is a multiple of {self.micro_batch_size * replicas}"
            if self.global_batch_size % replicas == 0:
                smaller = nearest(all_divisors(self.global_batch_size // replicas), near=self.micro_batch_size,
                                  is_accepted=lambda size: self._makes_microbatches(parallel, replicas, size))
                way_out += f", or a micro_batch_size of {smaller}" if smaller else ""
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} x data_parallel_size={replicas} (world_size={world_size} "
                f"over {parallel.model_parallel_size} model-parallel ranks) must divide "
                f"global_batch_size={self.global_batch_size}; {way_out}"
            )
        self._validate_microbatches(parallel, replicas)

    def _makes_microbatches(self, parallel: ParallelConfig, replicas: int, micro_batch_size: int) -> bool:
        """Whether the schedule could do a step in micro-batches of another size."""
        try:
            dataclasses.replace(self, micro_batch_size=micro_batch_size)._validate_microbatches(parallel, replicas)
        except ConfigError:
            return False
        return True

    def _validate_microbatches(self, parallel: ParallelConfig, replicas: int) -> None:
        """The schedule's rule on the number of micro-batches."""
        ranks, microbatches = parallel.pipeline_model_parallel_size, self.num_microbatches(replicas)
        if ranks == 1:
            return
        problem = microbatches_problem(parallel.schedule, ranks, microbatches, "pipeline_schedule")
        if not problem:
            return
        possible = nearest_microbatches(parallel.schedule, ranks, microbatches)
        choices = " or ".join(str(number * self.micro_batch_size * replicas) for number in possible)
        without = (", or num_virtual_stages_per_pipeline_rank=1"
                   if parallel.pipeline_schedule == "auto" and parallel.schedule == "interleaved" else "")
        raise ConfigError(
            f"global_batch_size={self.global_batch_size} over micro_batch_size={self.micro_batch_size} x "
            f"data_parallel_size={replicas} does not fit the schedule: {problem}; try global_batch_size={choices}"
            f"{without}")


# Fields of a run that describe one phase, of the whole run, where no phases are given.
WITHOUT_PHASES = names_in_phases(TrainingConfig, InPhases.REPLACED)


def require_license(name: str, value: str) -> None:
    """Check that a licence is one word as the hub writes it: it stands in the first lines of a model card as it is.

    Args:
        name: The setting or the flag, for the message.
        value: The licence.

    Raises:
        ConfigError: the value is something else.
    """
    if not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*", value):
        raise ConfigError(f"{name}={value!r} must be the hub's name of a licence, in lower case: apache-2.0, mit, "
                          "cc-by-4.0, other, unknown")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved when, and what a run starts from."""

    save: str | None = option(None, help="folder for checkpoints; none: nothing is saved")
    load: str | None = option(None, help="folder to start from; resumes its newest checkpoint, or starts fresh where "
                              "it is empty or missing")
    resume: str = option("load", choices=RESUME, help="auto: go on from --save's newest checkpoint if there is one, "
                         "and otherwise from what --load names, or begin; load: --load alone decides")
    pretrained_checkpoint: str | None = option(
        None, help="folder of a run's checkpoints, or of a Hugging Face model, whose weights the run begins with where "
        "--load finds no checkpoint of its own; its optimizer, schedule and data are left behind")
    override_opt_param_scheduler: bool = option(False, help="go on by this command line's schedule, though it would "
                                                "have taken other steps up to the checkpoint")
    use_checkpoint_opt_param_scheduler: bool = option(False, help="go on with the checkpoint's learning rates, or its "
                                                      "phases if either has any, instead of this command line's")
    exit_on_missing_checkpoint: bool = option(False, help="end instead where --load finds no checkpoint")
    overwrite_run: bool = option(False, help="remove what another run left in the folders of --save and "
                                 "--tensorboard-dir; without it such a folder is refused")
    allow_data_change: bool = option(False, help="resume on other data than the checkpoint's, or in another order: "
                                     "they are read from their first sample")
    verify_files: str = option("read", choices=VERIFY_FILES, help="what of checkpoints and data is compared "
                               "with its checksums: what is read, all files before any is used, or none")
    save_interval: int = option(500, help="steps between checkpoints; one is always written at the end")
    async_save: bool = option(True, help="train on while a process writes a checkpoint from a copy in host memory; "
                              "where that cannot be, training waits")
    max_failed_saves: int = option(16, help="checkpoints in a row that may fail to be written before the run ends; "
                                   "0: any number")
    keep_last: int = option(3, help="checkpoints kept; 0: all of them")
    export_hf: str | None = option(None, help="folder for the trained model in Hugging Face's layout, made at the end")
    export_without_mtp: bool = option(False, help="leave the MTP modules out of the export: some programs refuse them")
    export_license: str = option("unknown", help="the hub's name of a licence, for the export's model card")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes about itself."""

    tensorboard_dir: str | None = option(None, help="folder for TensorBoard logs and the resolved configuration")
    log_interval: int = option(10, help="steps between log lines and scalars")
    picture_interval: int = option(10, help="logged steps between heat maps and histograms")
    trace_schedule: str | None = option(None, help="file for what each pipeline rank does when in a step, for "
                                        "chrome://tracing, ui.perfetto.dev and dsv3 draw-schedule")
    wandb_project: str | None = option(None, help="project of Weights & Biases that gets what --tensorboard-dir gets")
    wandb_exp_name: str | None = option(None, help="name of the run there; none: preset and identity of the run")
    wandb_save_dir: str | None = option(None, help="folder for its own folder, wandb; none: --tensorboard-dir")
    wandb_entity: str | None = option(None, help="user or team there; none: the default of whoever is logged in")
    mlflow_experiment: str | None = option(None, help="MLflow experiment that gets what --tensorboard-dir gets; "
                                           "MLFLOW_TRACKING_URI says where")
    prometheus_file: str | None = option(None, help="file, ending in .prom, for the newest value of each tag, for "
                                         "node exporter's textfile collector")

    def validate(self) -> None:
        """Check how often is logged, and that trackers have a folder of logs beside them.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        for name in ("log_interval", "picture_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in TRACKERS:
            if getattr(self, name) and not self.tensorboard_dir:
                raise ConfigError(f"{name}={getattr(self, name)} needs tensorboard_dir: a tracker gets what goes to "
                                  "that folder, which keeps what the tracker may miss; give --tensorboard-dir DIR")
        for name in ("wandb_exp_name", "wandb_save_dir", "wandb_entity"):
            if getattr(self, name) and not self.wandb_project:
                raise ConfigError(f"{name}={getattr(self, name)} is about Weights & Biases; give wandb_project too, or "
                                  "leave it out")
        if self.prometheus_file and not self.prometheus_file.endswith(".prom"):
            raise ConfigError(f"prometheus_file={self.prometheus_file} must end in .prom: node exporter's textfile "
                              "collector reads no other file")


# Settings that ask for a tracker beside TensorBoard.
TRACKERS = ("wandb_project", "mlflow_experiment", "prometheus_file")
# Settings of a run that writes nothing about itself.
NO_LOGS: dict[str, None] = dict.fromkeys((
    "tensorboard_dir", "trace_schedule", "wandb_exp_name", "wandb_save_dir", "wandb_entity", *TRACKERS))
