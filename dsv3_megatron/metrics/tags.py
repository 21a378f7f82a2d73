"""Every tag that a run writes to TensorBoard and trackers, with what it means. This folder's README shows the table.

    python -m dsv3_megatron.metrics.tags          # writes the table into README.md

A test trains and compares the run's tags with this list, both ways. Pure Python.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.config.streams import run_command

README = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- tags -->", "<!-- /tags -->"

# What stands in the place of a placeholder; a word if it is not among these.
_KINDS = dict.fromkeys(("layer", "depth", "group"), "[0-9]+")

# When a tag is written, beyond what its kind says: the name of the condition and how the table puts it.
CONDITIONS = {
    "": "",
    "mtp": "with MTP",
    "groups": "moe_router_num_groups > 1",
    "balance-loss": "moe_aux_loss_coeff > 0",
    "validation": "each validation",
    "average": "each validation, with eval_ema",
    "validation-sets": "each validation, if its sets have names",
    "average-sets": "each validation with eval_ema, if its sets have names",
    "start": "once, at the start",
    "peak": "device's peak known",
    "gpu": "on a GPU",
    "grpo": "with GRPO",
    "grpo-validation": "with GRPO, each validation",
}


@dataclass(frozen=True)
class Tag:
    """One tag, or one for each layer, MTP depth, group, component, phase.

    Attributes:
        name: Name of the tag, with placeholders in braces.
        kind: "scalar", "histogram", "image" or "text".
        unit: Unit of the values, "" where there is none.
        meaning: What the tag says, in a sentence.
        when: A key of CONDITIONS.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    when: str = ""


def _scalar(name: str, unit: str, meaning: str, when: str = "") -> Tag:
    return Tag(name, "scalar", unit, meaning, when)


TAGS: tuple[Tag, ...] = (
    # Losses.
    _scalar("lm loss", "nats/token", "main next-token loss, mean over the step's tokens"),
    _scalar("mtp_{depth} loss", "nats/token", "loss of an MTP depth, before its weight", "mtp"),
    _scalar("seq_load_balancing_loss", "", "balance loss before alpha, mean over the MoE layers; of seq_aux_loss 1 is "
            "perfect balance", "balance-loss"),
    _scalar("mtp_{depth} agreement", "share", "positions where the depth's most likely token is the main head's for "
            "the same place in the text: the acceptance rate of greedy speculative decoding; of 128 positions of a "
            "step's first micro-batch on each replica", "mtp"),
    _scalar("lm loss validation", "nats/token", "main loss on the validation data, the first set of several",
            "validation"),
    _scalar("lm loss validation ppl", "", "its exponential, the perplexity", "validation"),
    _scalar("lm loss validation average", "nats/token", "main loss of the weights' moving average on the validation "
            "data", "average"),
    _scalar("mtp_{depth} loss validation", "nats/token", "MTP loss on the validation data", "validation"),
    _scalar("lm loss validation/{set}", "nats/token", "main loss on a validation set that has a name",
            "validation-sets"),
    _scalar("lm loss validation ppl/{set}", "", "its exponential, the perplexity", "validation-sets"),
    _scalar("mtp_{depth} loss validation/{set}", "nats/token", "MTP loss on such a set", "validation-sets"),
    _scalar("lm loss validation average/{set}", "nats/token", "main loss of the weights' moving average on such a set",
            "average-sets"),
    # The recipe.
    _scalar("learning-rate", "", "of this step"),
    _scalar("batch-size", "sequences", "of this step, over all replicas"),
    _scalar("seq-length", "tokens", "of this step's sequences"),
    _scalar("mtp-weight", "", "lambda: weight of the MTP losses", "mtp"),
    _scalar("bias-update-rate", "", "gamma: step of the routers' balancing biases"),
    _scalar("consumed-tokens", "tokens", "trained on so far"),
    _scalar("consumed-samples", "sequences", "trained on so far"),
    _scalar("skipped-iterations", "steps", "not applied so far"),
    _scalar("spikes", "steps", "flagged so far: loss or gradient norm out of line with the steps before"),
    _scalar("rollbacks", "", "returns to a checkpoint so far"),
    # Gradients.
    _scalar("grad-norm", "", "L2 norm of the whole gradient before clipping"),
    _scalar("grad-norm/{component}", "", "of one component; the squares add to the square of the whole. Everything in "
            "an MTP module is mtp; norms are the main model's, the latents' too"),
    # Speed.
    _scalar("iteration-time", "s", "wall clock of the step"),
    _scalar("tokens-per-second", "tokens/s", "over all devices"),
    _scalar("throughput", "TFLOP/s", "model FLOP/s per device"),
    _scalar("model-flops-per-second", "FLOP/s", "over all devices; recomputation does not count"),
    _scalar("mfu", "share", "of the devices' peak", "peak"),
    _scalar("time/{phase}", "s/step", "mean over ranks and over the steps since the last point. Phases do not overlap: "
            "data is the wait for batches, gradient-reduction sums gradients over ranks, logging is this table's own "
            "cost"),
    _scalar("time-slowest-rank/{phase}", "s/step", "the same of the rank that takes longest in the phase"),
    _scalar("memory/host-peak-resident", "bytes", "of the process that has most, since it began"),
    _scalar("memory/gpu-allocated", "bytes", "likewise, now", "gpu"),
    _scalar("memory/gpu-peak-allocated", "bytes", "likewise, since the process began", "gpu"),
    _scalar("memory/gpu-peak-reserved", "bytes", "likewise, with what torch's allocator holds in reserve", "gpu"),
    # Balance of the experts; the load is that of the whole global batch.
    _scalar("expert-load/max-violation", "", "load of the fullest expert over the mean, minus 1; mean over the layers"),
    _scalar("expert-load/least-load", "", "load of the emptiest expert over the mean; mean over the layers"),
    _scalar("expert-load/entropy", "", "of the load, over log(experts): 1 is balance; mean over the layers"),
    _scalar("expert-load/dead-experts", "share", "experts without a token in the step; mean over the layers"),
    _scalar("expert-load/layer-{layer}/max-violation", "", "of one layer"),
    _scalar("expert-load/layer-{layer}/least-load", "", "of one layer"),
    _scalar("expert-load/layer-{layer}/entropy", "", "of one layer"),
    _scalar("expert-load/layer-{layer}/dead-experts", "share", "of one layer"),
    Tag("expert-load/now", "image", "", "load over its mean, layers x experts"),
    Tag("expert-load/layer-{layer}/over-time", "image", "", "load over its mean, experts x steps since the process "
        "began, at most 256 columns"),
    # Routers.
    _scalar("router-bias/direction", "", "share of the experts whose bias the step raises minus the share whose bias "
            "it lowers; near 1 a few experts are overloaded; mean over the layers"),
    _scalar("router-bias/layer-{layer}/direction", "", "of one layer"),
    Tag("router-bias/layer-{layer}/histogram", "histogram", "", "balancing biases after the step"),
    Tag("router-scores/layer-{layer}", "histogram", "", "affinities of the step's tokens to all experts, in 50 parts "
        "of 0..1"),
    _scalar("expert-groups/layer-{layer}/groups-per-token", "groups", "nodes a token is sent to, mean; more than "
            "moe_router_group_topk for any token ends the run", "groups"),
    _scalar("expert-groups/layer-{layer}/max-violation", "", "tokens of the fullest group over the mean, minus 1",
            "groups"),
    _scalar("expert-groups/most-groups-per-token", "groups", "of any token in any layer", "groups"),
    _scalar("expert-groups/group-{group}", "tokens", "sent to a group in the step, a token once; mean over the layers",
            "groups"),
    Tag("expert-groups/now", "image", "", "tokens per group over their mean, layers x groups", "groups"),
    # GRPO: answers of the model's own. `lm loss` is then the objective with its sign turned.
    _scalar("grpo/reward", "", "weighted reward of an answer, mean over the rollout", "grpo"),
    _scalar("grpo/reward/{rule}", "", "reward by one rule, before its weight", "grpo"),
    _scalar("grpo/length", "tokens", "of an answer with its end token, mean over the rollout", "grpo"),
    _scalar("grpo/unfinished", "share", "answers that were cut at their longest length", "grpo"),
    _scalar("grpo/entropy", "nats/token", "of the distribution that a token of an answer was drawn from", "grpo"),
    _scalar("grpo/no-signal", "share", "groups whose answers all have one reward: they add nothing to the gradient but "
            "the divergence's", "grpo"),
    _scalar("grpo/kl", "nats", "estimate of the divergence from the reference, of answers or of tokens as grpo_level "
            "says", "grpo"),
    _scalar("grpo/clip-fraction", "share", "ratios, of answers or of tokens, that the clipping leaves without a "
            "gradient", "grpo"),
    _scalar("grpo/ratio", "", "mean ratio of the probability now to that at the rollout", "grpo"),
    _scalar("grpo/reward validation", "", "weighted reward of the likeliest answers to prompts that are kept apart",
            "grpo-validation"),
    _scalar("grpo/length validation", "tokens", "of these answers", "grpo-validation"),
    # The run itself.
    Tag("config/text_summary", "text", "", "the resolved configuration, as in config.json", "start"),
    Tag("environment/text_summary", "text", "", "what the run found: device, world size, precision", "start"),
)


_PLAIN = {tag.name: tag for tag in TAGS if "{" not in tag.name}


def _pattern(tag: Tag) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda place: rf"(?P<{place[1]}>{_KINDS.get(place[1], '[^ /]+')})",
                             re.escape(tag.name)))


_PATTERNS = [(_pattern(tag), tag) for tag in TAGS if "{" in tag.name]


def find_tag(written: str) -> tuple[Tag, dict[str, str]]:
    """The tag of the table that a written one is, and what stands in the place of its braces.

    Raises:
        KeyError: the table has no such tag.
    """
    if written in _PLAIN:
        return _PLAIN[written], {}
    for pattern, tag in _PATTERNS:
        found = pattern.fullmatch(written)
        if found:
            return tag, found.groupdict()
    raise KeyError(f"{written!r} is not in the table of tags")


def table() -> str:
    """The tags as a Markdown table, without a newline at its end."""
    lines = ["| Tag | Kind | Unit | Meaning | Written |", "| --- | --- | --- | --- | --- |"]
    for tag in TAGS:
        meaning = tag.meaning.replace("|", "\\|")
        lines.append(f"| `{tag.name}` | {tag.kind} | {tag.unit} | {meaning} | {CONDITIONS[tag.when]} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """A README with the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the README has no place for the table: {_BEGIN} ... {_END}")
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


def main() -> int:
    """Write the table into the README."""
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
