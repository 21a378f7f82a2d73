"""The instruments in several processes: heads that share a vocabulary, and a router that breaks the node limit.

That every layout sees the same routers and gradients as one process is in `test_layouts.py`, that a run writes every
tag in `test_trainer.py`.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import pytest
import torch

from dsv3_megatron.certification.weight_names import load_reference_weights
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.metrics.measurements import NodeLimitError
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.optim.router_bias import routers
from tests.distributed.launch import run_ranks
from tests.distributed.layout_step import GLOBAL_BATCH_SIZE, SEQ_LENGTH, Layout, OneStepTrainer
from tests.parity.architectures import reference_weights

pytestmark = pytest.mark.distributed

TP2, PP2, DP2 = (
    Layout("tp2", 2, ParallelConfig(tensor_model_parallel_size=2), mtp_num_layers=2),
    Layout("pp2", 2, ParallelConfig(pipeline_model_parallel_size=2), mtp_num_layers=2),
    Layout("dp2", 2, mtp_num_layers=2))


class HiddenStates:
    """What the heads of the last stage get in the first micro-batch, whole sequences: of the main model, by depth."""

    def __init__(self, trainer: OneStepTrainer) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self.weight: torch.Tensor | None = None
        self.group = trainer.groups.tp
        for chunk in trainer.chunks:
            for module in chunk.modules():
                if isinstance(module, DeepSeekV3Model) and module.post_process:
                    self.weight = self.gathered(module.output_layer.weight.detach().clone())
                    norms = [module.decoder.final_layernorm, *(layer.final_layernorm for layer in module.mtp.layers)]
                    for depth, norm in enumerate(norms):
                        norm.register_forward_hook(partial(self.note, depth))

    def note(self, depth: int, _module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        if depth not in self.found:
            self.found[depth] = self.gathered(output.detach())

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Parts of all tensor-parallel ranks, one below the other."""
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)


def agreement_and_expectation(layout: Layout) -> tuple[tuple[float | None, ...], list[list[int]] | None]:
    """What the instruments say of a step, and [agreeing, all] of each depth from whole logits, where this rank can."""
    from megatron.core import parallel_state

    layout.run.validate(torch.distributed.get_world_size())
    trainer = OneStepTrainer(layout.run)
    load_reference_weights(trainer.chunks, trainer.groups, reference_weights(layout.run.model),
                           layout.run.model.num_layers)
    hidden = HiddenStates(trainer)
    report, _ = trainer.train_step()
    parallel_state.destroy_model_parallel()
    assert report.measurements is not None
    if hidden.weight is None:
        return report.measurements.head_agreement, None
    main_SBV, *mtp_SBV = (hidden.found[depth] @ hidden.weight.T for depth in (0, 1, 2))
    counts = []
    for depth, logits_SBV in enumerate(mtp_SBV, start=1):
        same = logits_SBV[:-depth].argmax(-1) == main_SBV[depth:].argmax(-1)
        assert same.numel() <= 128, "every position is sampled"
        counts.append([int(same.sum()), same.numel()])
    return report.measurements.head_agreement, counts


def agreements() -> list[Any]:
    return [agreement_and_expectation(layout) for layout in (TP2, PP2, DP2)]


def test_agreement_equals_whole_logits() -> None:
    """The same on every rank, of both replicas' first micro-batches, and with sequence and vocabulary split."""
    by_rank = run_ranks(2, agreements)
    for index, layout in enumerate((TP2, PP2, DP2)):
        seen = [rank[index] for rank in by_rank]
        assert seen[0][0] == seen[1][0]
        expected = [counts for _, counts in seen if counts is not None]
        assert len(expected) == (1 if layout is PP2 else 2)
        if layout is not DP2:
            expected = expected[:1]
        for depth, share in enumerate(seen[0][0]):
            agreeing, sampled = (sum(counts[depth][i] for counts in expected) for i in (0, 1))
            assert share == agreeing / sampled, (layout.name, depth)
            assert sampled == len(expected) * layout.micro_batch_size * (SEQ_LENGTH - depth - 1)


def break_the_node_limit(group_mask: str) -> str:
    """A step in which one rank's router forgets the limit; the error's text, "" without one."""
    from megatron.core import parallel_state

    layout = Layout("ep2", 2, ParallelConfig(expert_model_parallel_size=2))
    run = layout.run.override(moe_router_group_mask=group_mask)
    trainer = OneStepTrainer(run)
    if trainer.rank == 1:
        for _, router in routers(trainer.chunks, run.model.num_layers):
            # Dropped groups rank with 0: above some of a kept group's affinities plus this bias, below others.
            router.options = dataclasses.replace(router.options, group_mask="zero")
            router.expert_bias.fill_(-0.5)
    try:
        trainer.train_step()
    except NodeLimitError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return ""


def limits() -> list[str]:
    return [break_the_node_limit(group_mask) for group_mask in ("exclude", "zero")]


def test_every_rank_learns_of_a_broken_node_limit() -> None:
    first, second = run_ranks(2, limits)
    tokens = GLOBAL_BATCH_SIZE * SEQ_LENGTH
    assert first[0] == second[0]
    found = re.match(rf"layer 1: (\d+) of {tokens} tokens went to more than moe_router_group_topk=2 groups", first[0])
    assert found and 0 < int(found.group(1)) <= tokens // 2, first[0]
    assert first[1] == second[1] == "", "the mask that may break it is not held to it"
