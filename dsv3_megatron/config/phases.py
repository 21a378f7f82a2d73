"""The phases of a run as they are written: how long each is, and what it changes.

A run's `phases` are a list. What a phase does not say carries over from the one before it; before the first one the
run's own fields hold (`lr`, `global_batch_size`, `seq_length`, ...). `recipe.py` makes of them what each step is taken
with. No torch.

In TOML:

    lr = 2.2e-4                                 # before the first phase
    global_batch_size = 3072

    [[phases]]
    name = "ramp"
    train_tokens = 469e9                        # or train_iters
    lr_warmup_iters = 2000
    global_batch_size = 15360                   # reached at the end of the phase,
    global_batch_size_increment = 1024          # in steps of this many sequences; without it: from the first step

    [[phases]]
    name = "decay"
    train_tokens = 4.3e12
    lr = 2.2e-5                                 # reached at the end of the phase,
    lr_decay_style = "cosine"                   # this way; without it: from the first step
    mtp_loss_scaling_factor = 0.1
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.fields import ConfigError, require_finite
from dsv3_megatron.config.values import read_value, require_values

LR_DECAY_STYLES = ("constant", "cosine", "linear")
# Fields of a run that describe one phase, of the whole run, where no phases are given.
WITHOUT_PHASES = ("train_iters", "min_lr", "lr_warmup_iters", "lr_decay_style", "lr_decay_iters")
# Fields of a run that a phase may change.
MODEL_FIELDS = ("rope_type", "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                "mscale", "mscale_all_dim", "max_position_embeddings")
TRAINING_FIELDS = ("seq_length", "micro_batch_size", "global_batch_size", "lr", "mtp_loss_scaling_factor",
                   "moe_router_bias_update_rate")
DATA_FIELDS = ("data_path", "valid_data_path")


@dataclass(frozen=True)
class Phase:
    """One phase as written; None: not said. Fields that a run has too have its names and meanings.

    Attributes:
        name: The phase's own name, for tables, logs and errors; no other phase has it.
        train_tokens: Length in tokens. The phase ends with the step that reaches them, and the next phase that is given
            in tokens counts from where this one should have ended, so that roundings do not add up. Or else
        train_iters: Length in optimizer steps.
        lr: Learning rate at its end.
        lr_decay_style: The way there from the learning rate before it, up or down; constant: at once.
        lr_warmup_iters: Steps of linear warm-up from 0, at its start, to the learning rate that it starts from.
        lr_decay_iters: Step of the phase at which `lr` is reached; None: its end.
        global_batch_size: Sequences in a step at its end.
        global_batch_size_increment: The batch goes there from the one before it linearly in tokens, by so many
            sequences at a time; None: at once.
        micro_batch_size: Sequences in one forward pass.
        seq_length: Tokens in a sequence.
        mtp_loss_scaling_factor: Weight of the MTP losses, lambda.
        moe_router_bias_update_rate: Step of the routers' biases, gamma.
        rope_type: "rope" or "yarn".
        rotary_scaling_factor: YaRN's s.
        original_max_position_embeddings: YaRN: context length before the extension.
        beta_fast: YaRN's rotations over the original context beyond which a frequency is kept.
        beta_slow: YaRN's rotations over the original context below which a frequency is divided by s.
        mscale: YaRN: numerator of the multiplier of cosines and sines.
        mscale_all_dim: YaRN: denominator of that multiplier, and base of the softmax scale's exponent.
        max_position_embeddings: Longest sequence the model is meant for; not said by a phase that changes YaRN's
            fields: original length times scaling factor.
        data_path: Training data, in the form of the run's field of this name.
        valid_data_path: Validation data, in the form of the run's field of this name.
    """

    name: str = ""
    train_tokens: int | None = dataclasses.field(default=None, metadata={"most": 10**18})
    train_iters: int | None = None
    lr: float | None = None
    lr_decay_style: str = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    global_batch_size: int | None = None
    global_batch_size_increment: int | None = None
    micro_batch_size: int | None = None
    seq_length: int | None = None
    mtp_loss_scaling_factor: float | None = None
    moe_router_bias_update_rate: float | None = None
    rope_type: str | None = None
    rotary_scaling_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    max_position_embeddings: int | None = None
    data_path: tuple[str, ...] | None = None
    valid_data_path: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give the fields that the phase sets, as plain values that `read_phases` reads."""
        return self.given([field.name for field in dataclasses.fields(self)
                           if getattr(self, field.name) != field.default])

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """The fields among `names` that the phase gives a value, with the values as a run has them."""
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def given_at_once(self) -> dict[str, Any]:
        """Fields of a run that have the phase's value from its first step on."""
        gradual = {"lr"} if self.lr_decay_style != "constant" else set()
        if self.global_batch_size_increment is not None:
            gradual.add("global_batch_size")
        return self.given([name for name in (*TRAINING_FIELDS, *DATA_FIELDS) if name not in gradual])

    def validate(self) -> None:
        """Check what can be said of the phase alone; the rest is checked where it is seen in its run (`recipe.py`).

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        require_values(self)
        require_finite(self)
        if (self.train_tokens is None) == (self.train_iters is None):
            both = "" if self.train_tokens is None else f"train_tokens={self.train_tokens}, {self.train_iters=}: "
            raise ConfigError(f"{both.replace('self.', '')}a phase has one length: give it train_tokens or train_iters")
        for name in ("train_tokens", "train_iters", "lr_decay_iters", "global_batch_size",
                     "global_batch_size_increment", "micro_batch_size", "seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        for name in ("lr", "lr_warmup_iters"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value} must not be negative")
        if self.lr_decay_style not in LR_DECAY_STYLES:
            raise ConfigError(f"lr_decay_style={self.lr_decay_style!r} must be one of {', '.join(LR_DECAY_STYLES)}")
        if self.lr_decay_style != "constant" and self.lr is None:
            raise ConfigError(f"lr_decay_style={self.lr_decay_style} leads to the lr at the end of the phase, which is "
                              "not given; give lr")
        if self.lr_decay_iters is not None and self.lr_decay_style == "constant":
            raise ConfigError(f"lr_decay_iters={self.lr_decay_iters} has no effect with lr_decay_style=constant; leave "
                              "it out, or set lr_decay_style to cosine or linear")
        steps = self.lr_decay_iters or self.train_iters
        if steps is not None and self.lr_warmup_iters > steps:
            length = "lr_decay_iters" if self.lr_decay_iters else "train_iters"
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must not exceed {length}={steps}")
        if self.global_batch_size_increment is not None:
            missing = [name for name in ("global_batch_size", "train_tokens") if getattr(self, name) is None]
            if missing:
                raise ConfigError(
                    f"global_batch_size_increment={self.global_batch_size_increment} ramps the batch up to "
                    f"global_batch_size over the phase's train_tokens; give {' and '.join(missing)}")


def check_fields_outside(values: Mapping[str, Any], phases: Sequence[Phase]) -> None:
    """Refuse fields of a run, given outside its phases, that no step would use.

    Args:
        values: The given fields by name.
        phases: Phases of the run that the fields are given to.

    Raises:
        ConfigError: one is for runs without phases, or the first phase has another value from its first step on.
    """
    if not phases:
        return
    for name in WITHOUT_PHASES:
        if name in values:
            raise ConfigError(
                f"{name}={values[name]} cannot go with phases, which say how long the run is and how its learning rate "
                "changes; leave it out, or give --phases none (phases = [] in a file) for a run without phases")
    for name, value in phases[0].given_at_once().items():
        if name in values and values[name] != value:
            raise ConfigError(f"{name}={values[name]} has no effect: phase {phases[0].name!r}, the first, has {name}="
                              f"{value} from its first step on; change it there, or leave it out here")


def validate_phases(phases: Sequence[Phase]) -> None:
    """Check the names of phases, and each phase alone.

    Raises:
        ConfigError: names the phase.
    """
    early = phases[0].given(MODEL_FIELDS) if phases else {}
    if early:
        fields = ", ".join(f"{name}={value}" for name, value in early.items())
        raise ConfigError(f"phase {phases[0].name!r}: {fields}: nothing comes before the first phase that it could "
                          "change; give it to the run, outside its phases")
    for number, phase in enumerate(phases, start=1):
        if not phase.name:
            raise ConfigError(f"phase {number} of {len(phases)} has no name; give each phase one")
        with errors_of_phase(phase.name):
            phase.validate()
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{names.count(name)} phases are called {name!r}; give each a name of its own")


@contextmanager
def errors_of_phase(name: str) -> Iterator[None]:
    """Say in a ConfigError which phase it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"phase {name!r}: {error}") from error


def read_phases(value: Any) -> tuple[Phase, ...]:
    """Phases out of what a file holds under `phases`: a list of tables; phases that are made already stay.

    Raises:
        ConfigError: the value is no such list, or a table has a field that phases have not, or a value of the wrong
            type.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict | Phase) for item in value):
        raise ConfigError(f"phases={value!r} must be a list of tables, one a phase ([[phases]] in TOML)")
    return tuple(item if isinstance(item, Phase) else _read_phase(item, number)
                 for number, item in enumerate(value, start=1))


def _read_phase(table: dict[Any, Any], number: int) -> Phase:
    known = {field.name: str(field.type) for field in dataclasses.fields(Phase)}
    values: dict[str, Any] = {}
    with errors_of_phase(str(table.get("name", number))):
        for key, value in table.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
                raise ConfigError(f"{key} is not a field of a phase; {hint}")
            if value is not None:
                values[key] = read_value(key, value, known[key])
    return Phase(**values)
