"""Faults that a layout may have, planted in small runs that `dsv3 certify` then takes; what each verdict says.

    python -m tests.distributed.certified_faults FILE      writes the verdicts to a JSON file

Each is a mistake that somebody could make, or has made: what is public of composed parallelisms is named with its
place in the trackers. They are planted in the layout's processes, or, where BOTH says so, in the one process too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from dsv3_megatron.certification.certified_layout import RunToCertify
from dsv3_megatron.certification.certify import Certifier, get_ready_to_fork
from dsv3_megatron.certification.rank_step import StepHooks
from dsv3_megatron.certification.routing_notes import replaced
from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.model.router import DeepSeekRouter, choose_experts
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.parallel.latent_ring import RingAttention
from dsv3_megatron.parallel.sequence_parts import SequenceParts
from dsv3_megatron.runs import learner, step_sums
from dsv3_megatron.runs.trainer import Trainer
from dsv3_megatron.schedule import forward_backward
from tests.distributed.layout_step import FAULTS

TP, PP, EP = (f"--{name}-model-parallel-size 2" for name in ("tensor", "pipeline", "expert"))
ETP, CP, FP8 = "--expert-tensor-parallel-size 2", "--context-parallel-size 2", "--fp8 blockwise"
TWO_MODULES = "--mtp-num-layers 2"


def parameters(trainer: Trainer, pattern: str) -> list[Any]:
    return [parameter for chunk in trainer.chunks for name, parameter in chunk.named_parameters()
            if re.search(pattern, name)]


def is_last(trainer: Trainer) -> bool:
    return trainer.rank == trainer.world_size - 1


class Patch(StepHooks):
    """Something replaced during a step, by `change(trainer)`: triples of an owner, a name and what is put there."""

    def __init__(self, change: Callable[[Trainer], list[tuple[Any, str, Any]]]) -> None:
        self.change, self.stack = change, contextlib.ExitStack()

    def before_step(self, trainer: Trainer) -> None:
        for owner, name, value in self.change(trainer):
            self.stack.enter_context(replaced(owner, name, value))

    def after_step(self, trainer: Trainer) -> None:
        self.stack.close()


class Gradients(StepHooks):
    """Something done to this rank's own gradients, before they are reduced."""

    def __init__(self, change: Callable[[Trainer], None]) -> None:
        self.before_reduction = change  # type: ignore[method-assign]


class Unmarked(StepHooks):
    """Parameters whose gradient is partial on each tensor-parallel rank, which Megatron-Core does not know of."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def before_step(self, trainer: Trainer) -> None:
        for parameter in parameters(trainer, self.pattern):
            parameter.sequence_parallel = False


class Stale(StepHooks):
    """One rank misses the update of its copy of the routers' weights."""

    def before_step(self, trainer: Trainer) -> None:
        self.before = [parameter.detach().clone() for parameter in parameters(trainer, "router.weight")]

    def after_step(self, trainer: Trainer) -> None:
        if is_last(trainer):
            for parameter, before in zip(parameters(trainer, "router.weight"), self.before, strict=True):
                parameter.data.copy_(before)


class WrongEpsilon(StepHooks):
    """AdamW's epsilon is off by 5e-5 of itself, as if it had been kept in a narrow dtype."""

    def before_step(self, trainer: Trainer) -> None:
        for group in trainer.optimizer.param_groups:
            group["eps"] *= 1 + 5e-5


class RoundedCounters(StepHooks):
    """Megatron-LM #7081: experts' tokens counted in the model's dtype."""

    def before_step(self, trainer: Trainer) -> None:
        for _, router in routers(trainer.chunks, trainer.run.model.num_layers):
            router.tokens_per_expert = router.tokens_per_expert.bfloat16()


def times(pattern: str, factor: float, *, on_all: bool = False) -> Gradients:
    def change(trainer: Trainer) -> None:
        for parameter in parameters(trainer, pattern) if on_all or is_last(trainer) else []:
            parameter.main_grad.mul_(factor)

    return Gradients(change)


def over_data_ranks(trainer: Trainer) -> None:
    """Megatron-LM #5916: experts' gradients summed over the layers' replicas, not the experts'."""
    for parameter in parameters(trainer, r"mlp\.experts\."):
        torch.distributed.all_reduce(parameter.main_grad, group=trainer.groups.dp)


def local_bias_counts(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """The loads that are told are whole, those that move the biases are this rank's."""
    own: list[torch.Tensor] = []
    collect, update = step_sums.collect_expert_loads, learner.update_router_biases

    def collecting(chunks: Any, **sizes: Any) -> Any:
        loads_LE, losses_L = collect(chunks, **sizes)
        own.append(loads_LE.clone())
        return loads_LE, losses_L

    return [(step_sums, "collect_expert_loads", collecting),
            (learner, "update_router_biases", lambda chunks, _loads, **rest: update(chunks, own[-1], **rest))]


def weighed_loss(weight: Callable[[Any], float], *, of: str) -> Callable[[Trainer], list[tuple[Any, str, Any]]]:
    """A micro-batch's loss, or its MTP losses, differentiated with another weight; what is reported stays."""
    def change(trainer: Trainer) -> list[tuple[Any, str, Any]]:
        own = trainer._loss

        def loss(batch: Any, losses: Any) -> Any:
            total, count, report = own(batch, losses)
            factor = weight(batch)
            if of == "mtp":
                mtp = trainer.phase.training.mtp_loss_scaling_factor / len(losses.mtp_BS)
                part = sum((loss_BS * 1.0).sum() for loss_BS in losses.mtp_BS) * mtp
                return total + (factor - 1) * part, count, report
            return total * factor, count, report

        return [(trainer, "_loss", loss)]

    return change


def count_alone(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """Gradients divided by the tokens of this rank's pipeline, not of all."""
    groups = trainer._groups_of_gradients
    return [(groups, "dp_cp", trainer.groups.tp), (groups, "dp_cp_gtp_remat", trainer.groups.tp)]


def no_embedding_copies(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """Megatron-Bridge #5380: the stage with the MTP modules is not in the group of the embedding."""
    return [(trainer._groups_of_gradients, "embd", trainer.groups.tp)]


def no_expert_reduction(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    return [(chunk, "expert_parallel_bucket_groups", []) for chunk in trainer.chunks]


def rows_of_first(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    return [(batches, "data_parallel_rank", 0) for batches in trainer.batches]


def heavier_balance(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """Megatron-LM #7452, finding 10: the balance loss weighed with all ranks' tokens where a rank's are wanted."""
    own, factor = forward_backward.weigh_balance_losses, trainer.groups.tp.size()
    return [(forward_backward, "weigh_balance_losses",
             lambda chunks, num_tokens, **rest: own(chunks, num_tokens=factor * num_tokens, **rest))]


def balance_of_dispatch(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """Megatron-LM #2767: the balance loss counts other experts than it is defined with; here those dispatched to."""
    def loss(router: Any, scores_sBE: torch.Tensor) -> torch.Tensor:
        config = router.config
        with torch.no_grad():
            ids = choose_experts(scores_sBE.flatten(0, 1), router.expert_bias, top_k=config.moe_router_topk,
                                 num_groups=config.moe_router_num_groups, group_top_k=config.moe_router_group_topk)
            chosen_BE = torch.zeros_like(scores_sBE).scatter_(-1, ids.view(*scores_sBE.shape[:2], -1), 1.0).sum(0)
            fraction_BE = chosen_BE * (config.num_moe_experts / (config.moe_router_topk * len(scores_sBE)))
        probability_BE = (scores_sBE / scores_sBE.sum(-1, keepdim=True)).mean(0)
        return router.balance_loss_coeff * (fraction_BE * probability_BE).sum()

    return [(DeepSeekRouter, "_balance_loss", loss)]


def border_targets(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """MTP targets moved within a part: those at the end of a chunk are of another place in the text."""
    own = DeepSeekV3Model.mtp_targets

    def targets(model: DeepSeekV3Model, labels_BS: torch.Tensor, documents: Any) -> Any:
        positions_S = model.parts.positions(labels_BS.shape[1])
        for right in (found := own(model, labels_BS, documents)):
            right.labels_BS[:, positions_S] = labels_BS[:, positions_S.roll(-1)]
        return found

    return [(DeepSeekV3Model, "mtp_targets", targets)]


def unmasked_border(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """A document that begins in another rank's part is seen together with those before it."""
    own = SequenceParts.visible
    return [(SequenceParts, "visible", lambda parts, other, length, batch, bounds: own(
        parts, other, length, batch, bounds if other == parts.rank else None))]


def balance_of_parts(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """A balance loss of each part instead of one of the sequence."""
    return [(router, "sequence_group", router.tp_group)
            for _, router in routers(trainer.chunks, trainer.run.model.num_layers)]


def lost_latents(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """The gradient of the latents that were passed does not come home."""
    own = RingAttention.post_home
    return [(RingAttention, "post_home", lambda ring, grad, owner: own(ring, torch.zeros_like(grad), owner))]


def positions_of_parts(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """Rotary positions counted within a part."""
    own = LocalMLASelfAttention._tables
    return [(LocalMLASelfAttention, "_tables", lambda module, x, ids: tuple(
        table[:len(own(module, x, ids)[0])] for table in module.rotary(len(x), x)))]


def other_scales(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """One weight in FP8 with a scale that is a power of two, as it is not defined to have."""
    found = []
    for chunk in trainer.chunks:
        for name, module in chunk.named_modules():
            if name.endswith("decoder.layers.3.self_attention.linear_proj"):
                (precision,), backend = module.fp8
                found.append((module, "fp8", ((dataclasses.replace(precision, scales="power_of_2"),), backend)))
    return found


def half_the_weight(_trainer: Trainer) -> list[tuple[Any, str, Any]]:
    own = learner.sum_losses
    return [(learner, "sum_losses", lambda mask_BS, losses, *, mtp_weight, **rest: own(
        mask_BS, losses, mtp_weight=mtp_weight / len(losses.mtp_BS), **rest))]


def duplicates(judge: Callable[[Trainer, Any], bool | None]) -> Callable[[Trainer], list[tuple[Any, str, Any]]]:
    """What the gradient's norm counts on this rank, where `judge` says so; None: as it is."""
    def change(trainer: Trainer) -> list[tuple[Any, str, Any]]:
        own = tensor_parallel.param_is_not_tensor_parallel_duplicate

        def counted(parameter: Any, *args: Any, **kwargs: Any) -> bool:
            said = judge(trainer, parameter)
            return own(parameter, *args, **kwargs) if said is None else said

        return [(tensor_parallel, "param_is_not_tensor_parallel_duplicate", counted)]

    return change


@dataclass(frozen=True)
class Planted:
    """A fault in a layout.

    Attributes:
        flags: Flags of the layout, with preset tiny.
        make: Makes the hooks.
        named: Pattern of a difference that the verdict must have.
        is_in_both: The one process has it too: only the definition can tell.
        num_ranks: Processes of the layout.
        reduces_early: Gradients are reduced under the passes; most faults change them behind the passes.
    """

    flags: str
    make: Callable[[], StepHooks]
    named: str
    is_in_both: bool = False
    num_ranks: int = 2
    reduces_early: bool = False


BATCH = "--global-batch-size 8 --micro-batch-size 1"
PLANTED: dict[str, Planted] = {
    "experts' gradients not reduced over their replicas": Planted(
        EP, lambda: Patch(no_expert_reduction), r"gradient of decoder\.layers\.1\.mlp\.experts\.\d+\.linear_fc1",
        num_ranks=4),
    "bias update with local counts": Planted("", lambda: Patch(local_bias_counts), "router bias of layer 1"),
    "a norm not marked sequence-parallel": Planted(
        TP, lambda: Unmarked("kv_layernorm.weight"), r"gradient of decoder\.layers\.0\.self_attention\.kv_layernorm"),
    "the final norm not marked (Megatron-LM #1446)": Planted(
        TP, lambda: Unmarked(r"decoder\.final_layernorm"), r"gradient of decoder\.final_layernorm.weight"),
    "MTP losses divided twice": Planted(
        TWO_MODULES, lambda: Patch(half_the_weight), r"gradient of mtp\.layers\.0.*definition", is_in_both=True),
    "gradients divided by one replica's tokens": Planted(
        "", lambda: Patch(count_alone), r"gradient of embedding\.word_embeddings"),
    "the embedding's copies not summed (Megatron-Bridge #5380)": Planted(
        PP, lambda: Patch(no_embedding_copies), r"gradient of embedding\.word_embeddings"),
    "experts' gradients scaled by the expert ranks (pytorch #160285)": Planted(
        EP, lambda: times(r"mlp\.experts\.", 2.0, on_all=True),
        r"gradient of decoder\.layers\.1\.mlp\.experts\.0\..* 2 times the expected"),
    "a micro-batch's gradient lost": Planted(
        "", lambda: Patch(weighed_loss(lambda batch: float(batch.sample_ids_B[0] != 1), of="all")),
        r"gradient of output_layer\.weight"),
    "a micro-batch's gradient added twice (Megatron-LM #6660)": Planted(
        PP, lambda: Patch(weighed_loss(lambda batch: 1.0 + float(batch.sample_ids_B[0] == 1), of="all")),
        r"gradient of output_layer\.weight"),
    "the routers' gradient partial (torchtitan #2387, Megatron-LM #599)": Planted(
        TP, lambda: Unmarked("router.weight"), r"gradient of decoder\.layers\.1\.mlp\.router\.weight"),
    "another replica's rows of data": Planted("", lambda: Patch(rows_of_first), "routing, .* were not routed"),
    "the norm counts replicated parameters twice": Planted(
        TP, lambda: Patch(duplicates(lambda _trainer, _parameter: True)), "gradient norm"),
    "the norm leaves experts out (Megatron-LM #5916)": Planted(
        f"{TP} {EP}", lambda: Patch(duplicates(lambda trainer, parameter: (
            False if trainer.groups.tp.rank() and not getattr(parameter, "allreduce", True) else None))),
        "gradient norm"),
    "the norm leaves a split parameter out (Megatron-LM #7452, finding 8)": Planted(
        TP, lambda: Patch(duplicates(lambda trainer, parameter: (
            False if trainer.groups.tp.rank() and getattr(parameter, "tensor_model_parallel", False) else None))),
        "gradient norm"),
    "experts' gradients summed over other ranks (Megatron-LM #5916)": Planted(
        ETP, lambda: Gradients(over_data_ranks), r"gradient of decoder\.layers\.1\.mlp\.experts\.0\.linear_fc1"),
    "MTP losses divided by local counts (Megatron-LM #7452, finding 3)": Planted(
        "", lambda: Patch(weighed_loss(lambda batch: 11.0 / float(batch.loss_mask_BS.sum()), of="mtp")),
        r"gradient of mtp\.layers\.0\."),
    "the balance loss weighed by all ranks' tokens (Megatron-LM #7452, finding 10)": Planted(
        TP, lambda: Patch(heavier_balance), r"gradient of decoder\.layers\.1\.mlp\.router\.weight"),
    "experts' tokens counted in bf16 (Megatron-LM #7081)": Planted(
        "", RoundedCounters, "expert counts of layer 1"),
    "the balance loss of the dispatched experts (Megatron-LM #2767)": Planted(
        "", lambda: Patch(balance_of_dispatch), r"gradient of decoder\.layers\.\d\.mlp\.router.*definition",
        is_in_both=True),
    "MTP targets moved within a part of the sequence": Planted(
        CP, lambda: Patch(border_targets), r"gradient of mtp\.layers\.0\."),
    "a document that straddles parts sees the one before it": Planted(
        f"{CP} --reset-attention-mask", lambda: Patch(unmasked_border), r"gradient of decoder\.layers\.0\."),
    "a balance loss of each part of the sequence": Planted(
        CP, lambda: Patch(balance_of_parts), r"gradient of decoder\.layers\.\d\.mlp\.router\.weight"),
    "the gradient of passed latents lost": Planted(
        CP, lambda: Patch(lost_latents), r"gradient of decoder\.layers\.0\.self_attention\.linear_kv_down_proj"),
    "positions counted within a part": Planted(
        CP, lambda: Patch(positions_of_parts), r"gradient of decoder\.layers\.0\.self_attention"),
    "a bucket reduced before its last pass": Planted(
        f"{PP} --pipeline-schedule dualpipe", lambda: FAULTS["reduced-early"], r"gradient of decoder\.layers\.\d",
        reduces_early=True),
    "weights used before they are gathered": Planted(
        EP, lambda: FAULTS["weights-not-gathered"], "main loss", reduces_early=True),
    "one replica misses an update": Planted("", Stale, r"parameter decoder\.layers\.1\.mlp\.router\.weight"),
    "AdamW's epsilon off by 0.005%": Planted(
        EP, WrongEpsilon, r"parameter decoder\.layers\.1\.mlp\.router\.weight.*given its gradients"),
    "in FP8, one weight with a scale of another kind": Planted(FP8, lambda: Patch(other_scales), "main loss"),
    "one rank's gradient off by a thousandth": Planted(
        "", lambda: times(r"mlp\.router\.weight", 1.001), r"gradient of decoder\.layers\.1\.mlp\.router\.weight"),
}
NOTHING = {"nothing wrong": "", "nothing wrong in tensor parallelism": f"{TP} {ETP}",
           "nothing wrong in parts of sequences": f"{CP} {TWO_MODULES} --reset-attention-mask",
           "nothing wrong in FP8": f"{TP} {FP8}",
           "nothing wrong in a pipeline": f"{PP} --pipeline-schedule dualpipe"}


def jobs() -> list[RunToCertify]:
    wanted = {name: planted.flags + " --no-overlap-grad-reduce" * (not planted.reduces_early)
              for name, planted in PLANTED.items()} | NOTHING
    found = []
    for name, flags in wanted.items():
        run = parse_command(["--preset", "tiny", *BATCH.split(), *flags.split()]).run
        size = PLANTED[name].num_ranks if name in PLANTED else 2
        found.append(RunToCertify(name, shrink(run, size, size).run, size, num_steps=1))
    return found


def main(file: str) -> int:
    get_ready_to_fork()
    hooks = {name: planted.make() for name, planted in PLANTED.items()}
    both = {name: planted.make() for name, planted in PLANTED.items() if planted.is_in_both}
    verdicts = Certifier(4, hooks=hooks, alone_hooks=both).certify(jobs())
    Path(file).write_text(json.dumps({verdict.job.name: {
        "differences": list(map(str, verdict.differences)), "error": verdict.error} for verdict in verdicts}))
    return 0


if __name__ == "__main__":
    # Hooks have one module's name in every process.
    from tests.distributed import certified_faults

    sys.exit(certified_faults.main(sys.argv[1]))
