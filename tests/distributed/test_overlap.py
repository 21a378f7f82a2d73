"""Gradients that are reduced, and weights that are gathered, under the passes: the same bits, in one order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.certification.rank_step import leave_weights_to_passes, parameter_values
from dsv3_megatron.certification.weight_names import load_reference_weights
from dsv3_megatron.model.stage.buckets import finish_gathering
from dsv3_megatron.runs.trainer import Trainer
from tests.distributed.launch import run_ranks
from tests.distributed.layout_step import Layout, OneStepTrainer
from tests.distributed.test_layouts import split
from tests.nccl_like import ONE_STREAM
from tests.parity.architectures import reference_weights

pytestmark = pytest.mark.distributed

LAYOUTS = [
    Layout("dp4", 4, split()),
    Layout("tp2-zb1p", 4, split(tp=2, pp=2, schedule="zb1p")),
    Layout("interleaved-pairs", 4, split(pp=2, vpp=2, ep=2, pairs=True)),
    Layout("dualpipe", 4, split(pp=4, schedule="dualpipe")),
    Layout("dualpipe-ep2", 4, split(pp=2, ep=2, schedule="dualpipe"), recompute_granularity="full"),
    Layout("dualpipev-ep2", 4, split(pp=2, ep=2, schedule="dualpipev"), mtp_num_layers=2),
]
NUM_STEPS = 2
END = ("end of passes", 0, 0)
Message = tuple[str, int, int]  # what is begun, chunk, elements


@dataclass
class Taken:
    """What a rank saw of some steps: losses, norms and loads, its weights, and the messages that it began."""

    reports: list[Any]
    weights: list[torch.Tensor]
    begun: list[Message]
    groups: dict[tuple[int, int], list[int]]  # ranks by chunk and elements


def run_steps(layouts: list[Layout], precision: str) -> dict[tuple[str, bool], Taken]:
    """Steps of each layout with and without overlap."""
    from megatron.core import parallel_state

    results = {}
    for layout in layouts:
        for overlaps in (True, False):
            parallel = replace(layout.parallel, overlap_grad_reduce=overlaps, overlap_param_gather=overlaps)
            run = replace(layout.run.override(train_iters=NUM_STEPS, precision=precision, tensorboard_dir=None),
                          parallel=parallel)
            run.validate(torch.distributed.get_world_size())
            trainer = OneStepTrainer(run)
            load_reference_weights(trainer.chunks, trainer.groups, reference_weights(run.model), run.model.num_layers)
            trainer.optimizer.reload_model_params()
            results[layout.name, overlaps] = take_steps(trainer)
            parallel_state.destroy_model_parallel()
    return results


def take_steps(trainer: Trainer) -> Taken:
    begun, groups = watch(trainer)
    trainer.are_weights_read = False
    leave_weights_to_passes(trainer)
    reports = []
    for _ in range(NUM_STEPS):
        trainer.batches = trainer._iterate(trainer.data.train, 0)  # the one step's samples again
        report, _signal = trainer.train_step()
        reports.append((report.lm_loss, report.grad_norm, report.balance_loss, report.expert_load))
    finish_gathering(trainer.chunks)
    return Taken(reports, [part.local for part in parameter_values(trainer)], begun, groups)


def watch(trainer: Trainer) -> tuple[list[Message], dict[tuple[int, int], list[int]]]:
    """Note what this rank's buckets begin, and the end of the passes."""
    begun: list[Message] = []
    groups = {}
    finalize = trainer.mcore_config.finalize_model_grads_func
    assert finalize is not None

    def note_end(*args: Any, **kwargs: Any) -> None:
        begun.append(END)
        finalize(*args, **kwargs)

    trainer.mcore_config.finalize_model_grads_func = note_end
    for number, chunk in enumerate(trainer.chunks):
        for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            size = sum(bucket.grad_data.numel() for bucket in bucket_group.buckets)
            ranks = bucket_group.intra_distributed_optimizer_instance_group
            groups[number, size] = torch.distributed.get_process_group_ranks(ranks)
            for name in ("start_grad_sync", "start_param_sync"):
                setattr(bucket_group, name, _noting(begun, (name, number, size), getattr(bucket_group, name)))
    return begun, groups


def _noting(begun: list[Message], message: Message, own: Any) -> Any:
    def note(*args: Any, **kwargs: Any) -> None:
        begun.append(message)
        own(*args, **kwargs)

    return note


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def taken(request: pytest.FixtureRequest) -> list[dict[tuple[str, bool], Taken]]:
    """By rank; on streams that wait for one another as NCCL's do, and on gloo alone."""
    return run_ranks(4, run_steps, LAYOUTS, request.param, backend=ONE_STREAM if request.param == "fp32" else None)


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_bits_are_those_of_messages_behind_the_passes(taken, name):
    for rank in taken:
        under, behind = rank[name, True], rank[name, False]
        assert under.reports == behind.reports and all(loss == loss for loss, *_ in under.reports if loss is not None)
        assert len(under.weights) == len(behind.weights) > 0
        assert all(map(torch.equal, under.weights, behind.weights))


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_messages_are_under_the_passes(taken, name):
    for rank in taken:
        begun = rank[name, True].begun
        ends = [place for place, message in enumerate(begun) if message == END]
        assert len(ends) == NUM_STEPS
        under = [message for message in begun[:ends[0]] if message[0] == "start_grad_sync"]
        behind = {message for message in begun[ends[0]:] if message[0] == "start_grad_sync"} - set(under)
        # Without a pipeline nothing is left to compute behind the embedding's gradient.
        assert len(under) >= 2 and len(behind) == (name == "dp4"), (under, behind)
        gathered = {message[1:] for message in begun[:ends[0]] if message[0] == "start_param_sync"}
        assert gathered == {message[1:] for message in {*under, *behind}}
        # And without overlap all are behind them.
        others = rank[name, False].begun
        assert "start_grad_sync" not in {message[0] for message in others[:others.index(END)]}


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_ranks_of_a_group_begin_the_same_messages_in_one_order(taken, name):
    """Also DualPipe's two ranks with copies of the same stages."""
    orders: dict[tuple[int, ...], list[list[Any]]] = {}
    for rank in taken:
        mine = rank[name, True]
        for group in {tuple(sorted(ranks)) for ranks in mine.groups.values()}:
            orders.setdefault(group, []).append([message for message in mine.begun if message == END or tuple(
                sorted(mine.groups[message[1], message[2]])) == group])
    assert any(len(found) > 1 for found in orders.values())
    for group, found in orders.items():
        assert len(found) == len(group) and all(order == found[0] for order in found), group


class Messages(TorchDispatchMode):
    """Names of the collectives that were issued."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def gather_beside_others(async_ops: bool) -> tuple[list[str], list[list[float]]]:
    """Two gathers in one of Megatron-Core's managers beside another of the same group: messages, and what came."""
    from megatron.core.distributed import param_and_grad_buffer

    group = torch.distributed.group.WORLD
    assert group is not None
    whole = [torch.zeros(2 * size) for size in (3, 4)]
    parts = [buffer.chunk(2)[group.rank()].fill_(group.rank() + 1.0) for buffer in whole]
    other = torch.ones(5)
    before = torch.distributed.all_reduce(other, async_op=True)
    with (Messages() as messages,
          param_and_grad_buffer._coalescing_manager(group, async_ops=async_ops) as handles):
        for buffer, part in zip(whole, parts, strict=True):
            param_and_grad_buffer.dist_all_gather_func(buffer, part, group=group, async_op=async_ops)
    before.wait()
    handles.wait()
    return messages.names, [*(buffer.tolist() for buffer in whole), other.tolist()]


@pytest.mark.parametrize("async_ops", [True, False])
def test_gathers_are_messages_of_their_own_on_gloo(async_ops):
    """gloo's joined all-gather beside another collective of its group frees a record twice (torch 2.15)."""
    for messages, values in run_ranks(2, gather_beside_others, async_ops):
        assert messages == ["_allgather_base_"] * 2
        assert values == [[1.0] * 3 + [2.0] * 3, [1.0] * 4 + [2.0] * 4, [2.0] * 5]
