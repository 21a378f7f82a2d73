"""The phases of a run as they are written: how long each is, and what it changes.

A run's `phases` are a list. What a phase does not say carries over from the one before it; before the first one the
run's own fields hold (`lr`, `global_batch_size`, `seq_length`, ...). `recipe.py` makes of them what each step is taken
with. No torch.

A phase may name another layout too, such as more context-parallel ranks for longer sequences; the data-parallel ranks
are those that it leaves. `launches.py` says what becomes of it.

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
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError, InPhases, names_in_phases, require_finite
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.step import StepConfig
from dsv3_megatron.config.values import plain, read_field, require_values

LR_DECAY_STYLES = ("constant", "cosine", "linear")
# Fields of a run that a phase may change, as their sections declare them.
MODEL_FIELDS = names_in_phases(ModelConfig, InPhases.CHANGED)
TRAINING_FIELDS = names_in_phases(StepConfig, InPhases.CHANGED)
DATA_FIELDS = names_in_phases(DataConfig, InPhases.CHANGED)
LAYOUT_FIELDS = names_in_phases(ParallelConfig, InPhases.CHANGED)


@dataclass(frozen=True)
class WrittenPhase:
    """A phase as written, without what it changes of its run: its name, its length, and the ways there.

    Attributes:
        name: Name of the phase, for tables, logs and errors; no other phase has it.
        train_tokens: Length in tokens. The phase ends with the step that reaches them, and the next phase that is given
            in tokens counts from where this one should have ended, so that roundings do not add up. Or else
        train_iters: Length in optimizer steps.
        lr_decay_style: Way to `lr` from the learning rate before the phase, up or down; constant: at once.
        lr_warmup_iters: Steps of linear warm-up from 0, at the phase's start, to the learning rate it starts from.
        lr_decay_iters: Step of the phase at which `lr` is reached; None: its end.
        global_batch_size_increment: Sequences by which the batch grows at a time, on a line in tokens from the batch
            before the phase to `global_batch_size`; None: it is there at once.
    """

    name: str = ""
    train_tokens: int | None = dataclasses.field(default=None, metadata={"most": 10**18})
    train_iters: int | None = None
    lr_decay_style: str = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    global_batch_size_increment: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give the fields that the phase sets, as plain values that `read_phases` reads."""
        given = self.given([field.name for field in dataclasses.fields(self)
                            if getattr(self, field.name) != field.default])
        return {name: plain(value) for name, value in given.items()}

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """The fields among `names` that the phase gives a value, with those values."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def given_at_once(self) -> dict[str, Any]:
        """Fields of a run that have the phase's value from its first step on."""
        gradual = {"lr"} if self.lr_decay_style != "constant" else set()
        if self.global_batch_size_increment is not None:
            gradual.add("global_batch_size")
        return self.given([name for name in (*TRAINING_FIELDS, *DATA_FIELDS, *LAYOUT_FIELDS) if name not in gradual])

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
        if self.lr_decay_style != "constant" and not self.given(["lr"]):
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


def _changes() -> list[tuple[str, str, Any]]:
    """Name, annotation and declaration, of a phase, of each field of a run that phases may change."""
    return [(field.name, f"{str(field.type).removesuffix(' | None')} | None",
             dataclasses.field(default=None, metadata=field.metadata))
            for section in (StepConfig, ModelConfig, DataConfig, ParallelConfig)
            for field in dataclasses.fields(section)
            if field.metadata["in_phases"] is InPhases.CHANGED]


# What each means at the phase's end where the phase goes there step by step, or where a phase reads it in its own way.
_MEANINGS = {
    "lr": "Learning rate at the end of the phase",
    "global_batch_size": "Sequences in a step at the end of the phase",
    "max_position_embeddings": "Longest sequence the model is meant for; where a phase changes YaRN's fields and does "
                               "not give it, the original length times the scaling factor",
}


def _documentation() -> str:
    described = [f"    {name}: {_MEANINGS.get(name) or field.metadata['help'][0].upper() + field.metadata['help'][1:]}."
                 for name, _, field in _changes()]
    own = str(inspect.getdoc(WrittenPhase)).partition("Attributes:\n")[2]
    first = "One phase as written; None: not said. Fields that a run has too have its names and meanings."
    return "\n".join([first, "", "Attributes:", own, *described])


if TYPE_CHECKING:
    class Phase(WrittenPhase):
        """One phase as written, with what it changes of its run."""

        def __init__(self, name: str = "", **fields: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:  # a field that sections let phases change is declared there, and nowhere else
    Phase = dataclasses.make_dataclass("Phase", _changes(), bases=(WrittenPhase,), frozen=True, module=__name__,
                                       namespace={"__doc__": _documentation()})


def check_fields_outside(values: Mapping[str, Any], phases: Sequence[Phase], unused: Sequence[str]) -> None:
    """Refuse fields of a run, given outside its phases, that no step would use.

    Args:
        values: The given fields by name.
        phases: Phases of the run that the fields are given to.
        unused: Names of the fields that phases take the place of.

    Raises:
        ConfigError: one is for runs without phases, or the first phase has another value from its first step on.
    """
    if not phases:
        return
    for name in unused:
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
    known = {field.name: field for field in dataclasses.fields(Phase)}
    values: dict[str, Any] = {}
    with errors_of_phase(str(table.get("name", number))):
        for key, value in table.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
                raise ConfigError(f"{key} is not a field of a phase; {hint}")
            if value is not None:
                values[key] = read_field(known[key], value)
    return Phase(**values)
