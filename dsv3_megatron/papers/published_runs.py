"""Training runs of DeepSeek-V3 whose speed was published, and what the planner predicts for them.

Nothing of the planner was fitted to them. Each run has the layout that was published, in this library's fields; what
this library has not, such as CUDA graphs over a whole step, is in `other`. Routing is even where the source says that
tokens are spread by force.

Usage:
    for run in PUBLISHED_RUNS:
        predicted = predict(run)
        predicted.tokens_per_second, predicted.distance
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import require_possible
from dsv3_megatron.planning.time.step_time import StepTime, step_time
from dsv3_megatron.planning.time.work import Setting

BRIDGE = "https://github.com/NVIDIA-NeMo/Megatron-Bridge"
_SUMMARY, _ARCHIVE = f"{BRIDGE}/blob/main/docs/performance-summary.md", (
    f"{BRIDGE}/blob/main/docs/performance-summary-archive.md")
_TORCHTITAN = ("https://app.daily.dev/posts/enabling-up-to-41-faster-pre-training-mxfp8-and-deepep-for-deepseek-v3-on-"
               "b200-with-torchtitan-p-xgwnngegk")
COMPANION_ADDRESS = "https://arxiv.org/abs/2505.09343"
# Layers by stage: four each, and one with the MTP module and the losses. Without the module its stage has no m.
_FOURS, _TWOS = "Et*4|(t*4|)*14tmL", "Et|(tt|)*30mL"
_GRAPHS = "CUDA graphs over whole iterations, fused kernels"


@dataclass(frozen=True)
class PublishedRun:
    """A run whose speed was published.

    Attributes:
        name: Program and release.
        address: Page that has the number.
        hardware: Name of the machine in the planner's tables.
        num_gpus: GPUs of the run.
        tokens_per_second: Published tokens a second of one GPU.
        changes: Fields of the preset dsv3-671b that the run has otherwise; None: the planner cannot have the layout.
        is_balanced: Tokens were spread evenly over the experts by force.
        dispatcher: Dispatcher of tokens whose figures hold, where this library could not have it in this layout: it
            hides no "flex" under pairs of passes. Empty: the run's own.
        other: What the run had that is not modelled, or why it is not predicted.
    """

    name: str
    address: str
    hardware: str
    num_gpus: int
    tokens_per_second: float
    changes: Mapping[str, Any] | None = field(hash=False)
    is_balanced: bool = True
    dispatcher: str = "flex"
    other: str = ""

    def layout(self) -> str:
        """Say the layout in a few words."""
        if self.changes is None:
            return "sharded weights (FSDP)"
        run = self.run()
        parallel = run.parallel
        words = [f"PP{parallel.pipeline_model_parallel_size}"]
        if parallel.num_virtual_stages_per_pipeline_rank > 1:
            words.append(f"V{parallel.num_virtual_stages_per_pipeline_rank}")
        if parallel.tensor_model_parallel_size > 1:
            words.append(f"TP{parallel.tensor_model_parallel_size}")
        words += [f"EP{parallel.expert_model_parallel_size}", parallel.schedule]
        if parallel.overlap_moe_expert_parallel_comm:
            words.append("with pairs")
        return " ".join([*words, "FP8" if run.fp8.is_enabled else "BF16"])

    def run(self) -> RunConfig:
        """The run as this library has it, one phase of pre-training.

        Raises:
            ValueError: the planner cannot have the layout.
        """
        if self.changes is None:
            raise ValueError(f"{self.name} on {self.hardware} cannot be planned: {self.other}")
        return preset("dsv3-671b").override(phases=(), stop_after_phase=None, lr_warmup_iters=0, **self.changes)


@dataclass(frozen=True)
class RunPrediction:
    """The planner's answer for a published run; None where it has none."""

    published: PublishedRun
    step: StepTime | None

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted tokens a second of one GPU."""
        return None if self.step is None else self.step.tokens_per_second / self.published.num_gpus

    @property
    def distance(self) -> float | None:
        """Predicted over published speed, less 1."""
        predicted = self.tokens_per_second
        return None if predicted is None else predicted / self.published.tokens_per_second - 1


def predict(published: PublishedRun) -> RunPrediction:
    """Predict the speed of a published run.

    Raises:
        ConfigError: A rule of this library is broken by the layout.
    """
    if published.changes is None:
        return RunPrediction(published, None)
    run = published.run()
    require_possible(run, published.num_gpus)
    if published.dispatcher:
        run = dataclasses.replace(run, parallel=dataclasses.replace(
            run.parallel, moe_token_dispatcher_type=published.dispatcher))
    setting = Setting(find_hardware(published.hardware), published.num_gpus,
                      imbalance=1.0 if published.is_balanced else None)
    return RunPrediction(published, step_time(run, setting, with_transfers=False))


def _layout(pp: int, virtual: int, ep: int, layout: str | None, batch: int, **changes: Any) -> dict[str, Any]:
    """Fields of a run of Megatron-Bridge: interleaved, tokens sent by DeepEP or HybridEP."""
    is_alone = virtual == 1
    recompute = changes.pop("recompute", ("mla_up_proj",))
    fields = {
        "pipeline_model_parallel_size": pp, "num_virtual_stages_per_pipeline_rank": virtual,
        "expert_model_parallel_size": ep, "pipeline_model_parallel_layout": layout,
        "pipeline_schedule": "1f1b" if is_alone else "interleaved", "global_batch_size": batch,
        "fp8": "blockwise",
        "recompute_granularity": "selective" if recompute else None, "recompute_modules": recompute,
    }
    return fields | changes


def _pairs(pp: int, virtual: int, ep: int, layout: str, batch: int, **changes: Any) -> dict[str, Any]:
    return _layout(pp, virtual, ep, layout, batch, overlap_moe_expert_parallel_comm=True, **changes)


def _without_mtp(layout: str) -> dict[str, Any]:
    return {"mtp_num_layers": 0, "pipeline_model_parallel_layout": layout.replace("m", "")}


PUBLISHED_RUNS = (
    PublishedRun(
        "DeepSeek, 2024", COMPANION_ADDRESS, "h800", 2048, 272.80e9 / 86400 / 2048,
        {"pipeline_schedule": "dualpipe", "fp8": "blockwise", "recompute_granularity": "selective",
         "global_batch_size": 15360}, is_balanced=False, dispatcher=""),
    PublishedRun(
        "Megatron-Bridge 25.09", _ARCHIVE, "h100", 1024, 1297,
        _pairs(8, 4, 64, _TWOS, 8192, tensor_model_parallel_size=2),
        other="FP8 with one scale a tensor (with blocks it was 2.4% slower)"),
    PublishedRun(
        "Megatron-Bridge 25.11", _ARCHIVE, "b200", 256, 2139, _layout(16, 1, 8, _FOURS, 2048)),
    PublishedRun(
        "Megatron-Bridge 26.04.01", _ARCHIVE, "b200", 256, 3328, _pairs(8, 2, 32, _FOURS, 4096),
        other="CUDA graphs of attention and routers"),
    PublishedRun(
        "Megatron-Bridge 25.11, BF16", _ARCHIVE, "gb200", 256, 3139,
        _layout(4, 4, 64, None, 4096, fp8="none", **_without_mtp(_FOURS))),
    PublishedRun(
        "Megatron-Bridge 25.11", _ARCHIVE, "gb200", 256, 4018, _layout(8, 4, 32, None, 4096, **_without_mtp(_TWOS)),
        other="CUDA graphs of attention and routers"),
    PublishedRun(
        "Megatron-Bridge 26.08", _SUMMARY, "gb200", 256, 4912, _pairs(4, 4, 64, _FOURS, 4096), other=_GRAPHS),
    PublishedRun(
        "Megatron-Bridge 25.11, BF16", _ARCHIVE, "gb300", 256, 3848,
        _layout(2, 4, 32, None, 4096, fp8="none", mtp_num_layers=0)),
    PublishedRun(
        "Megatron-Bridge 26.08", _SUMMARY, "gb300", 256, 6288, _pairs(2, 8, 32, _FOURS, 4096, recompute=()),
        other=_GRAPHS + ", attention in MXFP8"),
    PublishedRun(
        "torchtitan, BF16, DeepEP", _TORCHTITAN, "b200", 256, 859, None,
        other="weights are sharded over all GPUs (FSDP), which neither this library nor its planner has"),
    PublishedRun(
        "torchtitan, MXFP8 experts", _TORCHTITAN, "b200", 256, 918, None,
        other="as above, and the page does not say whether its tokens a second are of one GPU"),
)
