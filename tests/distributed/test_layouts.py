"""A training step gives the same losses, gradients, parameters and biases under every layout as in one process.

Every parameter is compared by its global name, each rank's part of it with the same part of the one-process result,
and copies (of replicas, of the embedding on the last stage) with each other.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch

from dsv3_megatron.certification.comparison import FP32, compare_steps, compare_updates
from dsv3_megatron.certification.document_step import document_step
from dsv3_megatron.certification.rank_step import RankStep, whole_tensors
from dsv3_megatron.certification.weight_names import reference_names, whole_from_reference
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.metrics.gradients import COMPONENTS, component_of
from tests.distributed.launch import run_ranks
from tests.distributed.layout_step import (
    EOD,
    GLOBAL_BATCH_SIZE,
    SEQ_LENGTH,
    Layout,
    random_samples,
    run_layouts,
)
from tests.nccl_like import ONE_STREAM
from tests.parity.architectures import BALANCE_LOSS_ALPHA, MTP_LAMBDA, reference_weights
from tests.parity.compare import relative_error

pytestmark = pytest.mark.distributed

# Layouts that take their step in one launch: a minute on two busy cores.
LAUNCH_SIZE = 16


def split(**degrees: Any) -> ParallelConfig:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
             "vpp": "num_virtual_stages_per_pipeline_rank", "ep": "expert_model_parallel_size",
             "etp": "expert_tensor_parallel_size", "layers": "pipeline_model_parallel_layout",
             "schedule": "pipeline_schedule", "pairs": "overlap_moe_expert_parallel_comm",
             "cp": "context_parallel_size", "passing": "cp_comm_type"}
    return ParallelConfig(**{names[name]: value for name, value in degrees.items()})


# Each part of a layout alone or beside one that could disturb it. More mixtures: `dsv3 certify --random 200`.
LAYOUTS = [
    Layout("tp2", 2, split(tp=2)),
    Layout("pp2", 2, split(pp=2)),
    Layout("ep2", 2, split(ep=2)),
    Layout("etp2", 2, split(etp=2)),
    Layout("pp2-interleaved", 2, split(pp=2, vpp=2)),
    Layout("pp2-uneven", 2, split(pp=2, layers="Et|tttmL")),
    Layout("pp2-without-mtp", 2, split(pp=2), mtp_num_layers=0),
    Layout("pp2-two-mtp", 2, split(pp=2), mtp_num_layers=2),
    Layout("tp2-two-mtp", 2, split(tp=2), mtp_num_layers=2),
    Layout("dp4", 4),
    Layout("ep4", 4, split(ep=4)),
    Layout("tp2-ep2-dp2", 4, split(tp=2, ep=2)),
    Layout("tp2-ep4", 4, split(tp=2, ep=4)),
    Layout("pp2-dp2", 4, split(pp=2)),
    Layout("pp2-tp2", 4, split(pp=2, tp=2)),
    Layout("pp2-tp2-ep2", 4, split(pp=2, tp=2, ep=2)),
    Layout("pp2-tp2-etp2", 4, split(pp=2, tp=2, etp=2)),
    Layout("pp2-interleaved-ep2", 4, split(pp=2, vpp=2, ep=2, pairs=True)),
    Layout("pp2-uneven-ep2-two-mtp", 4, split(pp=2, ep=2, layers="Ettt|tmmL"), mtp_num_layers=2),
    Layout("pp4", 4, split(pp=4)),
    Layout("tp2-etp2-ep2", 4, split(tp=2, etp=2, ep=2)),
    # Sequences that are split: what is passed in each way, in a pipeline's pairs, documents that straddle parts.
    Layout("cp2", 2, split(cp=2)),
    Layout("isolated-cp2-all-gather-two-mtp", 2, split(cp=2, passing="all_gather"), mtp_num_layers=2, is_isolated=True),
    Layout("isolated-cp4-two-mtp", 4, split(cp=4), mtp_num_layers=2, is_isolated=True),
    Layout("tp2-cp2-a2a-ep4", 4, split(tp=2, cp=2, ep=4, passing="a2a")),
    Layout("recompute-dualpipe-pp2-cp2-ep2", 4, split(pp=2, cp=2, ep=2, schedule="dualpipe"),
           recompute_granularity="selective"),
    # Schedules: dualpipev and zbv hold four stages on two ranks, eight on four.
    Layout("zb1p-pp2-uneven", 2, split(pp=2, schedule="zb1p", layers="Et|tttmL")),
    Layout("zbv-pp2", 2, split(pp=2, schedule="zbv")),
    Layout("dualpipe-pp2-uneven-two-mtp", 2, split(pp=2, schedule="dualpipe", layers="Ettt|tmmL"), mtp_num_layers=2),
    Layout("dualpipe-pp2-without-mtp", 2, split(pp=2, schedule="dualpipe"), mtp_num_layers=0),
    Layout("dualpipev-pp2", 2, split(pp=2, schedule="dualpipev")),
    Layout("zbv-pp2-ep2", 4, split(pp=2, ep=2, schedule="zbv")),
    Layout("zb1p-pp2-ep2", 4, split(pp=2, ep=2, schedule="zb1p")),
    Layout("dualpipe-pp2-ep2", 4, split(pp=2, ep=2, schedule="dualpipe")),
    Layout("dualpipe-pp2-tp2-ep2", 4, split(pp=2, tp=2, ep=2, schedule="dualpipe")),
    Layout("dualpipev-pp2-ep2-two-mtp", 4, split(pp=2, ep=2, schedule="dualpipev"), mtp_num_layers=2),
    Layout("dualpipev-pp2-tp2-etp2", 4, split(pp=2, tp=2, etp=2, schedule="dualpipev")),
    Layout("zb1p-pp4", 4, split(pp=4, schedule="zb1p")),
    Layout("dualpipe-pp4-uneven", 4, split(pp=4, schedule="dualpipe", layers="Ett|ttt|t|tttmL"), num_layers=9),
    Layout("interleaved-pp4", 4, split(pp=4, vpp=2, pairs=True), num_layers=9),
    Layout("zbv-pp4", 4, split(pp=4, schedule="zbv"), num_layers=9),
    Layout("dualpipev-pp4-uneven", 4, split(pp=4, schedule="dualpipev", layers="Et|tt|t|t|t|t|t|tmL"), num_layers=9),
    # The MTP modules and the loss in a stage of their own.
    Layout("pp2-loss-alone", 2, split(pp=2, layers="Etttt|L"), mtp_num_layers=0),
    Layout("pp2-interleaved-mtp-alone", 2, split(pp=2, vpp=2, layers="Et|tt|t|mL")),
    Layout("zb1p-pp2-mtp-alone-recomputed", 2, split(pp=2, schedule="zb1p", layers="Etttt|mL"),
           recompute_granularity="full"),
    Layout("zbv-pp2-mtp-alone", 2, split(pp=2, schedule="zbv", layers="Et|tt|t|mL")),
    Layout("dualpipe-pp2-two-mtp-alone", 2, split(pp=2, schedule="dualpipe", layers="Etttt|mmL"), mtp_num_layers=2),
    Layout("dualpipev-pp2-mtp-alone", 2, split(pp=2, schedule="dualpipev", layers="Et|tt|t|mL")),
    Layout("dualpipev-pp2-ep2-mtp-alone", 4, split(pp=2, ep=2, schedule="dualpipev", layers="Et|tt|t|mL")),
    Layout("tp2-pp2-mtp-alone", 4, split(tp=2, pp=2, layers="Etttt|mL")),
    # The embedding in a stage of its own.
    Layout("pp2-interleaved-both-ends-alone", 2, split(pp=2, vpp=2, layers="E|tt|tt|mL")),
    Layout("zb1p-pp2-embedding-alone", 2, split(pp=2, schedule="zb1p", layers="E|ttttmL")),
    Layout("dualpipe-pp2-embedding-alone", 2, split(pp=2, schedule="dualpipe", layers="E|ttttmL")),
    Layout("zbv-pp2-both-ends-alone", 2, split(pp=2, schedule="zbv", layers="E|tt|tt|mL")),
    Layout("dualpipev-pp2-both-ends-alone", 2, split(pp=2, schedule="dualpipev", layers="E|tt|tt|mL")),
    # The MTP modules in a stage before that of the loss: alone, with transformer layers, with the whole model.
    Layout("pp2-interleaved-layers-loss-apart", 2, split(pp=2, vpp=2, layers="E|ttt|tm|L")),
    Layout("zb1p-pp2-two-mtp-loss-apart", 2, split(pp=2, schedule="zb1p", layers="Ettttmm|L"), mtp_num_layers=2),
    Layout("dualpipev-pp2-two-mtp-loss-apart", 2, split(pp=2, schedule="dualpipev", layers="Et|tt|tmm|L"),
           mtp_num_layers=2),
    Layout("pp4-embedding-and-loss-apart", 4, split(pp=4, layers="E|tttt|m|L")),
    Layout("zb1p-pp4-two-mtp-loss-apart", 4, split(pp=4, schedule="zb1p", layers="Et|tt|tmm|L"), mtp_num_layers=2),
    Layout("pp4-interleaved-loss-apart", 4, split(pp=4, vpp=2, layers="Ett|tt|t|t|t|tt|m|L"), num_layers=9),
    Layout("zbv-pp4-loss-apart", 4, split(pp=4, schedule="zbv", layers="Ett|tt|t|t|t|tt|m|L"), num_layers=9),
    Layout("dualpipe-pp4-loss-apart", 4, split(pp=4, schedule="dualpipe", layers="Ett|tt|m|L")),
    Layout("dualpipe-pp4-layers-loss-apart", 4, split(pp=4, schedule="dualpipe", layers="E|ttt|tm|L")),
    Layout("dualpipev-pp4-loss-apart", 4, split(pp=4, schedule="dualpipev", layers="Ett|tt|t|t|t|tt|m|L"),
           num_layers=9),
    Layout("zbv-pp2-dp2-loss-apart", 4, split(pp=2, schedule="zbv", layers="Ett|tt|m|L")),
    Layout("dualpipe-pp2-ep2-loss-apart", 4, split(pp=2, ep=2, schedule="dualpipe", layers="Ettttm|L")),
    Layout("dualpipev-pp2-ep2-loss-apart", 4, split(pp=2, ep=2, schedule="dualpipev", layers="Ett|tt|m|L")),
    Layout("pp2-interleaved-ep2-loss-apart", 4, split(pp=2, vpp=2, ep=2, pairs=True, layers="Ett|t|tm|L")),
    Layout("tp2-pp2-two-mtp-loss-apart", 4, split(tp=2, pp=2, layers="Ettttmm|L"), mtp_num_layers=2),
    Layout("dualpipev-pp2-tp2-loss-apart", 4, split(pp=2, tp=2, schedule="dualpipev", layers="Ett|tt|m|L")),
    Layout("recompute-layers-zb1p-pp4-loss-apart", 4, split(pp=4, schedule="zb1p", layers="Ett|tt|m|L"),
           recompute_granularity="full"),
    Layout("isolated-dualpipev-pp2-two-mtp-loss-apart", 2,
           split(pp=2, schedule="dualpipev", layers="Ett|tt|mm|L"), mtp_num_layers=2, is_isolated=True),
    Layout("isolated-pp2-tp2-two-mtp-loss-apart", 4, split(pp=2, tp=2, layers="Ettttmm|L"), mtp_num_layers=2,
           is_isolated=True),
    # Recomputation: with collectives in it, in segments, of whole layers.
    Layout("recompute-tp2", 2, split(tp=2), recompute_granularity="selective"),
    Layout("recompute-layers-pp2-interleaved", 2, split(pp=2, vpp=2), recompute_granularity="full"),
    Layout("recompute-dualpipe-pp2-ep2", 4, split(pp=2, ep=2, schedule="dualpipe"), recompute_granularity="selective"),
    Layout("isolated-dualpipev-pp2", 2, split(pp=2, schedule="dualpipev"), is_isolated=True),
    Layout("isolated-dualpipe-pp2-ep2", 4, split(pp=2, ep=2, schedule="dualpipe"), is_isolated=True),
    # Micro-batches of two sequences without data parallelism, of one with it.
    Layout("isolated-pp2-interleaved", 2, split(pp=2, vpp=2), is_isolated=True),
    Layout("isolated-ep2", 2, split(ep=2), is_isolated=True),
    Layout("isolated-pp2-tp2-ep2-two-mtp", 4, split(pp=2, tp=2, ep=2), mtp_num_layers=2, is_isolated=True),
]
# A fault, the layout it is planted in, and what the comparison must say of it. The many faults that others have had are
# planted in test_certify.py, whose comparison this is.
PLANTED = [
    (Layout("fault-router-off", 2, split(), fault="router-slightly-off"), "gradient of .*router.weight"),
    (Layout("fault-embedding-apart", 4, split(pp=4, schedule="dualpipe", layers="Ett|tt|m|L"),
            fault="embedding-copy-lost"),
     "gradient of embedding.word_embeddings"),
    (Layout("fault-copy", 2, split(pp=2, schedule="dualpipe"), fault="experts-lost"),
     "gradient of .*experts.*linear_fc2.weight"),
    (Layout("fault-load", 2, split(pp=2), fault="load-miscounted"), "expert counts"),
    (Layout("fault-leak", 2, split(pp=2), is_isolated=True, fault="stage-leaks"), "main loss|expert counts"),
    (Layout("fault-not-gathered-dualpipe", 2, split(pp=2, schedule="dualpipe"), fault="weights-not-gathered"),
     "main loss"),
    (Layout("fault-stale", 2, split(ep=2), fault="parameter-stale"), "parameter .*router.weight"),
]
# Layouts of four ranks that also run where operations wait for one another as on NCCL.
ON_STREAMS = ["pp4", "dualpipe-pp4-uneven", "pp2-tp2-ep2", "dualpipe-pp2-ep2", "dualpipev-pp2-ep2-two-mtp",
              "recompute-dualpipe-pp2-cp2-ep2"]


# MTP modules, and whether documents are isolated.
ONE_PROCESS = [(0, False), (1, False), (2, False), (1, True), (2, True)]


def one_process_name(depth: int, is_isolated: bool, num_layers: int = 4) -> str:
    return f"one-process-{depth}-mtp-{num_layers}" + "-isolated" * is_isolated


class Steps(dict[str, list[RankStep]]):
    """Results by layout and rank; layouts of a number of processes share launches, started when one is asked for."""

    def __missing__(self, name: str) -> list[RankStep]:
        single = [Layout(one_process_name(depth, is_isolated), 1, mtp_num_layers=depth, is_isolated=is_isolated)
                  for depth, is_isolated in ONE_PROCESS]
        single.append(Layout(one_process_name(1, False, 9), 1, num_layers=9))
        wanted = single + LAYOUTS + [layout for layout, _ in PLANTED]
        (num_ranks,) = {layout.num_ranks for layout in wanted if layout.name == name}
        for layouts in itertools.batched((layout for layout in wanted if layout.num_ranks == num_ranks), LAUNCH_SIZE):
            if any(layout.name == name for layout in layouts):
                results = run_ranks(num_ranks, run_layouts, list(layouts), timeout_s=240)
                self |= {layout.name: [result[layout.name] for result in results] for layout in layouts}
        return self[name]


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


def one_process(steps: dict[str, list[RankStep]], layout: Layout) -> RankStep:
    return steps[one_process_name(layout.mtp_num_layers, layout.is_isolated, layout.num_layers)][0]


def compare(training: TrainingConfig, expected: RankStep, ranks: list[RankStep], initial: dict[str, torch.Tensor]
            ) -> dict[str, float]:
    """Check a layout's first step against one process's, and its update against AdamW given its gradients.

    Args:
        training: Settings of the optimizer.
        initial: Parameters before the step.

    Returns:
        The largest relative errors, by kind.
    """
    result = compare_steps(expected, ranks, "step 1", FP32)
    result.add(compare_updates(training, initial, [], ranks, "step 1", FP32))
    assert not result.differences, "\n".join(map(str, result.differences))
    check_measurements(expected, ranks, whole_tensors([rank.gradients for rank in ranks]))
    return result.largest


def check_measurements(expected: RankStep, ranks: list[RankStep], gradients: dict[str, torch.Tensor]) -> None:
    """Check what the instruments of a step saw: each token once, each gradient once, the same on every rank."""
    wanted = expected.report.measurements
    assert wanted is not None
    for rank in ranks:
        seen = rank.report.measurements
        assert seen is not None
        assert set(seen.routers) == set(rank.report.expert_load), "layers with a router"
        for layer, router in seen.routers.items():
            other = wanted.routers[layer]
            assert router.tokens_per_group == other.tokens_per_group, f"tokens per group of layer {layer}"
            assert router.tokens_by_num_groups == other.tokens_by_num_groups, f"groups per token of layer {layer}"
            assert router.bias == other.bias, f"bias of layer {layer}"
            # A score that rounds otherwise may fall into the next bin.
            assert sum(router.score_counts) == sum(other.score_counts)
            moved = sum(abs(a - b) for a, b in zip(router.score_counts, other.score_counts, strict=True)) // 2
            assert moved <= 3, f"scores of layer {layer}: {moved} in another bin"
        squares = dict.fromkeys(COMPONENTS, 0.0)
        for name, gradient in gradients.items():
            squares[component_of(name)] += gradient.double().square().sum().item()
        for component, norm in seen.grad_norms.items():
            assert norm == pytest.approx(squares[component] ** 0.5, rel=FP32.gradient), f"norm of {component}"
        assert math.hypot(*seen.grad_norms.values()) == pytest.approx(rank.report.grad_norm, rel=1e-6)
        assert seen.part_seconds == ranks[0].report.measurements.part_seconds


def initial_parameters(layout: Layout, names: list[str]) -> dict[str, torch.Tensor]:
    model = layout.run.model
    weights = reference_weights(model)
    return {name: whole_from_reference(name, weights, model.num_layers).float() for name in names}


def check_layout(steps: dict[str, list[RankStep]], layout: Layout) -> dict[str, float]:
    expected = one_process(steps, layout)
    initial = initial_parameters(layout, [part.name for part in expected.values])
    return compare(layout.run.training, expected, steps[layout.name], initial)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_equals_one_process(steps, layout):
    ranks = steps[layout.name]
    assert len(ranks) == layout.num_ranks
    assert all(rank.sequence_parallel == (layout.parallel.tensor_model_parallel_size > 1) for rank in ranks)
    copies = layout.parallel.num_model_copies
    assert all(rank.num_micro_batches == layout.num_micro_batches // copies for rank in ranks)
    print(layout.name, check_layout(steps, layout))
    seen, expected = (found[0].report.measurements.head_agreement for found in (
        ranks, steps[one_process_name(layout.mtp_num_layers, layout.is_isolated, layout.num_layers)]))
    assert len(seen) == layout.mtp_num_layers and None not in seen
    if layout.parallel.num_model_copies == 1 and layout.micro_batch_size == Layout("one process", 1).micro_batch_size:
        assert seen == expected, "the same first micro-batch"


def test_the_parts_of_a_step_are_most_of_its_time(steps):
    """Of the layouts' median: on a busy machine any one process may stand still between two parts."""
    shares = []
    for layout in LAYOUTS:
        for rank in steps[layout.name]:
            seconds = rank.report.measurements.slowest_part_seconds
            shares.append(sum(part for name, part in seconds.items() if name != "logging") / rank.report.step_time_s)
    assert statistics.median(shares) > 0.5


@pytest.fixture(scope="module")
def on_streams() -> dict[str, list[RankStep]]:
    """Steps on the backend that keeps NCCL's rules, by layout and rank."""
    layouts = [layout for layout in LAYOUTS if layout.name in ON_STREAMS]
    results = run_ranks(4, run_layouts, layouts, backend=ONE_STREAM)
    return {layout.name: [result[layout.name] for result in results] for layout in layouts}


@pytest.mark.parametrize("name", ON_STREAMS)
def test_equals_one_process_on_streams(steps, on_streams, name):
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    expected = one_process(steps, layout)
    initial = initial_parameters(layout, [part.name for part in expected.values])
    compare(layout.run.training, expected, on_streams[name], initial)


@pytest.mark.parametrize(("layout", "message"), PLANTED, ids=lambda value: getattr(value, "fault", None))
def test_planted_fault_is_found(steps, layout, message):
    with pytest.raises(AssertionError, match=message):
        check_layout(steps, layout)


@pytest.mark.parametrize(("depth", "is_isolated"), ONE_PROCESS)
def test_one_process_equals_the_reference(steps, depth, is_isolated):
    """Micro-batches, loss mask and token count of the trainer's step against every document alone, in float64.

    A document is a whole sequence where documents are not isolated.
    """
    layout = Layout("", 1, mtp_num_layers=depth, is_isolated=is_isolated)
    model, step = layout.run.model, one_process(steps, layout)
    weights = {name: weight.requires_grad_("bias" not in name) for name, weight in reference_weights(model).items()}
    samples = random_samples(model.vocab_size, is_isolated)
    bounds = tuple((0, *(s for s in range(1, SEQ_LENGTH) if is_isolated and row[s - 1] == EOD), SEQ_LENGTH)
                   for row in samples.tokens)
    assert len(set(bounds)) == (GLOBAL_BATCH_SIZE if is_isolated else 1)
    expected = document_step(weights, model, samples.tokens[:, :-1], samples.tokens[:, 1:], samples.mask, bounds,
                             mtp_weight=MTP_LAMBDA, balance_loss_alpha=BALANCE_LOSS_ALPHA)
    count = samples.mask.sum()
    (expected.total / count).backward()

    assert relative_error(torch.tensor(step.report.lm_loss), expected.main / count) < FP32.loss
    for ours, theirs in zip(step.report.mtp_losses, expected.mtp, strict=True):
        assert relative_error(torch.tensor(ours), theirs / count) < FP32.loss
    balance = sum(expected.balance.values()) / BALANCE_LOSS_ALPHA / GLOBAL_BATCH_SIZE / len(expected.balance)
    assert relative_error(torch.tensor(step.report.balance_loss), balance) < FP32.loss
    for row, expert_ids_BSK in expected.experts.items():
        counts = torch.bincount(expert_ids_BSK.flatten(), minlength=model.num_experts)
        assert step.report.expert_load[row] == counts.tolist()
    gradients = whole_tensors([step.gradients])
    reference = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    assert {part for name in gradients for part in reference_names(name, model.num_layers)} == set(reference)
    for name, gradient in gradients.items():
        error = relative_error(gradient, whole_from_reference(name, reference, model.num_layers))
        assert error < FP32.gradient, (name, error)
    total = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    assert relative_error(torch.tensor(step.report.grad_norm), total) < FP32.gradient


def test_the_step_is_one_that_matters(steps):
    """The clipping acts, every parameter moves, and biases move from where they were."""
    step = steps[one_process_name(1, False)][0]
    assert step.report.grad_norm > 1.0
    layout = Layout("", 1)
    initial = initial_parameters(layout, [part.name for part in step.values])
    for part in step.values:
        assert relative_error(part.local, initial[part.name]) > 1e-3, part.name
    for row, bias in step.biases.items():
        moved = bias - reference_weights(layout.run.model)[f"model.layers.{row}.mlp.gate.e_score_correction_bias"]
        assert 0.9e-3 < moved.abs().max() < 1.1e-3
