"""Which pipeline stage holds which layers, the embedding, the MTP modules and the loss.

Pure Python. Stages are numbered in the order a token meets them; `placement.py` says which rank holds which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import MAX_LAYERS, ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.weights import Place, Weight, layer_weights, weights_at

_NOTATION = "E embedding, t transformer layer, m MTP module, L loss, | next stage; x*3 and (xy)*3 repeat"


@dataclass(frozen=True)
class StageLayout:
    """What one pipeline stage holds.

    Attributes:
        stage: Position in the pipeline, from 0.
        layer_ids: Global 0-based ids of its transformer layers, in order.
        has_embedding: The stage turns token ids into hidden states.
        mtp_layer_ids: 0-based depths of its MTP modules; they bring their own copy of the embedding
            where has_embedding is False.
        has_loss: The stage holds the output head and the losses.
    """

    stage: int
    layer_ids: tuple[int, ...]
    has_embedding: bool
    mtp_layer_ids: tuple[int, ...]
    has_loss: bool

    @property
    def num_hidden_outputs(self) -> int:
        """Hidden states that the stage gives to the next one: the main model's, and those of each of its MTP modules.

        They travel as one tensor, one after the other along the sequence, as in Megatron-Core; 0 of the last stage.
        """
        return 0 if self.has_loss else 1 + len(self.mtp_layer_ids)


def stage_layouts(model: ModelConfig, parallel: ParallelConfig) -> list[StageLayout]:
    """Cut the model into `parallel.num_stages` stages, as asked for or balanced by compute.

    Without an explicit layout the largest stage's forward FLOPs are made as small as possible, the
    head and the MTP modules of the last stage counted; every stage gets at least one layer. In an explicit one the
    first stage may hold the embedding alone, the last one the MTP modules and the loss, or the loss alone behind a
    stage with the MTP modules.

    Raises:
        ConfigError: the explicit layout cannot be read, or does not hold exactly the model.
    """
    last = mtp_stage = parallel.num_stages - 1
    if parallel.pipeline_model_parallel_layout is not None:
        counts, mtp_stage = _parse_layout(parallel.pipeline_model_parallel_layout, model, parallel)
    else:
        counts = _balanced_counts(model, parallel.num_stages)
    layouts: list[StageLayout] = []
    first = 0
    for stage, count in enumerate(counts):
        layouts.append(StageLayout(
            stage=stage,
            layer_ids=tuple(range(first, first + count)),
            has_embedding=stage == 0,
            mtp_layer_ids=tuple(range(model.mtp_num_layers)) if stage == mtp_stage else (),
            has_loss=stage == last,
        ))
        first += count
    return layouts


def layout_string(layouts: list[StageLayout]) -> str:
    """Write a layout in Megatron-Core's notation, e.g. `Ett|tt|ttmL`."""
    return "|".join(
        "E" * layout.has_embedding + "t" * len(layout.layer_ids) + "m" * len(layout.mtp_layer_ids)
        + "L" * layout.has_loss
        for layout in layouts
    )


def _layer_costs(model: ModelConfig) -> tuple[list[int], int]:
    """Multiply-adds per token of each layer, and of what follows the last one (head and MTP)."""
    dense, moe = (_multiply_adds(model, layer_weights(model, is_moe=is_moe)) for is_moe in (False, True))
    head = _multiply_adds(model, weights_at(model, Place.HEAD))
    module = _multiply_adds(model, weights_at(model, Place.MTP_BEGIN, Place.MTP_END))
    # An MTP module's layer is of the kind of the main model's last one.
    tail = head + model.mtp_num_layers * (module + (moe if model.num_moe_layers else dense) + head)
    return [dense if i < model.num_dense_layers else moe for i in range(model.num_layers)], tail


def _multiply_adds(model: ModelConfig, weights: tuple[Weight, ...]) -> int:
    """Count multiply-adds of a token: through all matrices, and through the chosen ones of the routed experts."""
    return sum(weight.numel(model) * (model.moe_router_topk if weight.is_expert else 1)
               for weight in weights if weight.is_matrix)


@lru_cache(maxsize=1024)
def _balanced_counts(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers per stage that minimise the costliest stage; ties leave later stages lighter."""
    costs, tail = _layer_costs(model)
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)
    # best[i]: smallest possible maximum over the stages so far when they hold the first i layers
    best: list[float] = [float("inf")] * (total + 1)
    best[0] = 0
    choices: list[list[int]] = []
    for stage in range(num_stages):
        extra = tail if stage == num_stages - 1 else 0
        following: list[float] = [float("inf")] * (total + 1)
        choice = [0] * (total + 1)
        # A later start makes this stage lighter and those before no lighter: the best is where they meet, or just
        # before, and that place moves on with the end.
        start = stage
        for end in range(stage + 1, total - (num_stages - stage - 1) + 1):
            own = prefix[end] + extra
            while start < end - 1 and best[start] < own - prefix[start]:
                start += 1
            here = max(best[start], own - prefix[start])
            before = own - prefix[start - 1] if start > stage else float("inf")
            if before <= here:
                following[end], choice[end] = before, start - 1
            else:
                following[end], choice[end] = here, start
        best = following
        choices.append(choice)
    counts: list[int] = []
    end = total
    for choice in reversed(choices):
        counts.append(end - choice[end])
        end = choice[end]
    return tuple(counts[::-1])


def _repeated(match: re.Match[str]) -> str:
    part, count = match.groups()
    if len(count) > 6 or len(part) * int(count) > MAX_LAYERS:
        raise ConfigError(f"pipeline_model_parallel_layout has {match.group()[:40]}, more than the {MAX_LAYERS} layers "
                          "that a model may have; repeat fewer times")
    return part * int(count)


def _parse_layout(text: str, model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, ...], int]:
    """Layers per stage of an explicit layout, and the stage of the MTP modules: the last one, or the one before it."""
    unrolled = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtmL|])\*(\d+)"):
        unrolled = re.sub(pattern, _repeated, unrolled)
    name = f"pipeline_model_parallel_layout={text!r}"
    wrong = sorted(set(unrolled) - set("EtmL|"))
    if wrong:
        raise ConfigError(f"{name} has {' '.join(wrong)}, which means nothing; the notation is: {_NOTATION}")
    stages = unrolled.split("|")
    if len(stages) != parallel.num_stages:
        raise ConfigError(
            f"{name} has {len(stages)} stages; pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x {parallel.stages_per_rank_field} needs {parallel.num_stages}"
        )
    _check_stages(name, stages, model)
    with_modules = [stage for stage, content in enumerate(stages) if "m" in content]
    if len(with_modules) > 1:
        modules = "m" * model.mtp_num_layers
        raise ConfigError(f"{name} has MTP modules (m) in stages {' and '.join(map(str, with_modules))}; all "
                          f"mtp_num_layers={model.mtp_num_layers} of them are in one stage, as in Megatron-Core: end "
                          f"with '{modules}L' or '{modules}|L'")
    return tuple(content.count("t") for content in stages), with_modules[0] if with_modules else len(stages) - 1


def _check_stages(name: str, stages: list[str], model: ModelConfig) -> None:
    """Check that the stages hold the whole model, once and in its order."""
    whole = "".join(stages)
    layers = whole.count("t")
    if layers != model.num_layers:
        raise ConfigError(f"{name} holds {layers} transformer layers (t); num_layers={model.num_layers}")
    for stage, content in enumerate(stages[:-1]):
        if "t" not in content and "m" not in content and content != "E":
            raise ConfigError(f"{name} leaves stage {stage} without a transformer layer (t); give it at least one: "
                              "only the first stage, with the embedding (E), one with the MTP modules (m), and the "
                              "last may do without")
    if not whole.startswith("E") or whole.count("E") != 1:
        raise ConfigError(f"{name} must begin with the embedding (E) and have it once")
    modules = "m" * model.mtp_num_layers
    if whole != "E" + "t" * layers + modules + "L" or not stages[-1]:
        ends, what = "'L'", "the loss (L), once, in the last stage"
        if modules:
            ends = f"'{modules}L' or '{modules}|L'"
            what = (f"all mtp_num_layers={model.mtp_num_layers} MTP modules (m) after the last transformer layer (t), "
                    "then the loss (L), in the same stage or in one behind it, which is the last")
        raise ConfigError(f"{name} must end with {ends}: {what}")
