"""What the report says of the recipe: tokens, batch, learning rate, balancing, context extension."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.recipe import PlannedPhase, Recipe
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.step import StepConfig
from dsv3_megatron.papers.claim import REPORT, Claim, Relation

_SCHEDULE = "dsv3 train --preset dsv3-671b --print-schedule"
_HELP = "dsv3 report"
_TRILLION, _KI = 1e12, 1024


@lru_cache(maxsize=1)
def v3_run() -> RunConfig:
    """DeepSeek-V3 as the preset has it, all phases planned."""
    return preset("dsv3-671b")


@lru_cache(maxsize=1)
def _recipe() -> Recipe:
    return v3_run().recipe()


def phase(name: str) -> PlannedPhase:
    """A phase of the recipe by its name."""
    return next(phase for phase in _recipe().phases if phase.name == name)


def pretraining_tokens() -> float:
    """Tokens of the phases before the context extension, as planned."""
    return float(phase("lowest").planned_end_token)


def _tokens_of(*names: str) -> float:
    first, last = phase(names[0]), phase(names[-1])
    before = _recipe().phases[first.index - 1].planned_end_token if first.index else 0
    return float(last.planned_end_token - before)


def _rate(name: str, *, at_end: bool = False) -> float:
    """Learning rate of a phase's first step, or of its last."""
    planned = phase(name)
    place = planned.end if at_end else planned.start
    return planned.learning_rate.at(place.iteration, place.tokens)


def _warmup_steps() -> float:
    """The first step whose rate is the full one, counted out of the recipe."""
    ramp = phase("ramp")
    full = ramp.training.lr
    low, high = 0, ramp.num_steps
    while low < high:
        middle = (low + high) // 2
        tokens = middle * ramp.plateaus[0].global_batch_size * ramp.training.seq_length
        low, high = (low, middle) if ramp.learning_rate.at(middle, tokens) >= full else (middle + 1, high)
    return float(low)


def _middle_of_decay() -> float:
    decay = phase("decay")
    tokens = (decay.start.tokens + decay.planned_end_token) // 2
    return decay.learning_rate.at(decay.start.iteration + 1, tokens)


def _of_training(field: str) -> float:
    return float(getattr(v3_run().training, field))


def _of_step(name: str, field: str) -> float:
    training: StepConfig = phase(name).training
    return float(getattr(training, field))


def _last_token_with(field: str, value: float) -> float:
    """Token up to which a phase's field has a value."""
    return float(max(planned.planned_end_token for planned in _recipe().phases
                     if getattr(planned.training, field) == value))


RECIPE = (
    Claim("tokens of pre-training", REPORT, "4.2", "14.8T", pretraining_tokens, _TRILLION, command=_SCHEDULE),
    Claim("steps of pre-training", REPORT, "4.2", "(not printed)",
          why=f"The report prints neither their number nor how the batch grows. {_SCHEDULE} says this library's."),
    Claim("sequence length", REPORT, "4.2", "4K", lambda: _of_step("ramp", "seq_length"), _KI, command=_SCHEDULE),
    Claim("batch at the beginning, in sequences", REPORT, "4.2", "3072",
          lambda: float(phase("ramp").start.global_batch_size), command=_SCHEDULE),
    Claim("batch after it has grown", REPORT, "4.2", "15360", lambda: _of_step("constant", "global_batch_size"),
          command=_SCHEDULE),
    Claim("tokens in which the batch grows", REPORT, "4.2", "469B", lambda: _tokens_of("ramp"), 1e9, command=_SCHEDULE),
    Claim("steps of the learning rate's warm-up", REPORT, "4.2", "2K", _warmup_steps, 1e3, command=_SCHEDULE),
    Claim("learning rate after the warm-up", REPORT, "4.2", "2.2e-4", lambda: _rate("constant"), command=_SCHEDULE),
    Claim("tokens up to the end of the constant rate", REPORT, "4.2", "10T", lambda: _tokens_of("ramp", "constant"),
          _TRILLION, command=_SCHEDULE),
    Claim("tokens of the cosine decay", REPORT, "4.2", "4.3T", lambda: _tokens_of("decay"), _TRILLION,
          command=_SCHEDULE),
    Claim("learning rate half-way down the cosine", REPORT, "4.2", "1.21e-4", _middle_of_decay, command=_SCHEDULE,
          why="The mean of 2.2e-4 and 2.2e-5, as a cosine has it; the report prints the ends only."),
    Claim("learning rate after the decay", REPORT, "4.2", "2.2e-5", lambda: _rate("decay", at_end=True),
          command=_SCHEDULE),
    Claim("tokens at 2.2e-5", REPORT, "4.2", "333B", lambda: _tokens_of("low"), 1e9, command=_SCHEDULE),
    Claim("learning rate of the last tokens", REPORT, "4.2", "7.3e-6", lambda: _rate("lowest"), command=_SCHEDULE),
    Claim("tokens at 7.3e-6", REPORT, "4.2", "167B", lambda: _tokens_of("lowest"), 1e9, command=_SCHEDULE),
    Claim("AdamW, beta 1", REPORT, "4.2", "0.9", lambda: _of_training("adam_beta1"), command=_HELP),
    Claim("AdamW, beta 2", REPORT, "4.2", "0.95", lambda: _of_training("adam_beta2"), command=_HELP),
    Claim("weight decay", REPORT, "4.2", "0.1", lambda: _of_training("weight_decay"), command=_HELP),
    Claim("gradient clipping", REPORT, "4.2", "1.0", lambda: _of_training("clip_grad"), command=_HELP),
    Claim("bias update speed, gamma", REPORT, "4.2", "0.001", lambda: _of_step("ramp", "moe_router_bias_update_rate"),
          command=_SCHEDULE),
    Claim("tokens with gamma 0.001", REPORT, "4.2", "14.3T",
          lambda: _last_token_with("moe_router_bias_update_rate", 0.001), _TRILLION, command=_SCHEDULE),
    Claim("gamma of the last 500B tokens", REPORT, "4.2", "0.0",
          lambda: _of_step("low", "moe_router_bias_update_rate"), command=_SCHEDULE),
    Claim("tokens with gamma 0", REPORT, "4.2", "500B", lambda: _tokens_of("low", "lowest"), 1e9, command=_SCHEDULE),
    Claim("weight of the balance loss, alpha", REPORT, "4.2", "0.0001", lambda: _of_training("moe_aux_loss_coeff"),
          command=_HELP),
    Claim("weight of the MTP loss, lambda", REPORT, "4.2", "0.3", lambda: _of_step("ramp", "mtp_loss_scaling_factor"),
          command=_SCHEDULE),
    Claim("tokens with lambda 0.3", REPORT, "4.2", "10T", lambda: _last_token_with("mtp_loss_scaling_factor", 0.3),
          _TRILLION, command=_SCHEDULE),
    Claim("lambda of the last 4.8T tokens", REPORT, "4.2", "0.1",
          lambda: _of_step("decay", "mtp_loss_scaling_factor"), command=_SCHEDULE),
    Claim("share of documents with a filled middle (FIM)", REPORT, "4.1", "0.1",
          why="The rate is a flag of the data, not of the run (dsv3 preprocess --fim-rate 0.1, prefix-suffix-middle); "
              "the corpus that would show it is not published."),
)


def _context(name: str, field: str) -> float:
    planned = phase(name)
    owner = planned.model if hasattr(planned.model, field) else planned.training
    return float(getattr(owner, field))


def _softmax_factor() -> float:
    """The factor sqrt(t) on queries and keys each, out of the model's own fields."""
    model = phase("extension-32k").model
    return 0.1 * model.mscale_all_dim * math.log(model.rotary_scaling_factor) + 1


def _extension_claims(length: str, sequences: str) -> tuple[Claim, ...]:
    """What is said of one of the two phases."""
    name = f"extension-{length.lower()}"

    def claim(what: str, said: str, gives: Callable[[], float], unit: float = 1.0) -> Claim:
        return Claim(f"{length} phase: {what}", REPORT, "4.3", said, gives, unit, command=_SCHEDULE)

    return (claim("steps", "1000", lambda: float(phase(name).num_steps)),
            claim("tokens of a sequence", length, lambda: _context(name, "seq_length"), _KI),
            claim("sequences of a batch", sequences, lambda: _context(name, "global_batch_size")),
            claim("learning rate", "7.3e-6", lambda: _context(name, "lr")))


EXTENSION = _extension_claims("32K", "1920") + _extension_claims("128K", "480") + (
    Claim("YaRN, scale s", REPORT, "4.3", "40", lambda: _context("extension-32k", "rotary_scaling_factor"),
          command=_SCHEDULE),
    Claim("YaRN, alpha", REPORT, "4.3", "1", lambda: _context("extension-32k", "beta_slow"), command=_SCHEDULE),
    Claim("YaRN, beta", REPORT, "4.3", "32", lambda: _context("extension-32k", "beta_fast"), command=_SCHEDULE),
    Claim("YaRN, sqrt(t) = 0.1 ln 40 + 1", REPORT, "4.3", "1.3689", _softmax_factor, command=_SCHEDULE,
          why="The report prints the formula. The factor is on the softmax scale twice, as in the published code."),
    Claim("training through the last phase", REPORT, "4.3", "128K",
          lambda: _context("extension-128k", "seq_length"), _KI, Relation.AT_LEAST, _SCHEDULE,
          "That the model answers at this length (figure 8) needs the trained weights."),
)
