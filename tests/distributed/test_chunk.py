"""A stage in pieces leaves the same as one autograd pass over it: outputs, every gradient, expert loads, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from tests.distributed.chunk_passes import (
    WAYS,
    Case,
    Passes,
    kept_bytes,
    live_storages,
    misuse,
    run_all,
    run_case,
    run_recomputed,
    run_without_gradients,
)
from tests.distributed.launch import run_ranks
from tests.parity.compare import relative_error

pytestmark = pytest.mark.distributed


def split(**degrees: Any) -> ParallelConfig:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
             "vpp": "num_virtual_stages_per_pipeline_rank", "ep": "expert_model_parallel_size",
             "etp": "expert_tensor_parallel_size", "layers": "pipeline_model_parallel_layout",
             "schedule": "pipeline_schedule"}
    return ParallelConfig(**{names[name]: value for name, value in degrees.items()})


TWO_MTP, NO_SHARED, NO_MTP = {"mtp_num_layers": 2}, {"num_shared_experts": 0}, {"mtp_num_layers": 0}
# Interleaved stages of one layer: a rank has the first and a middle one, the other a middle one and the last.
CASES = [
    Case("ep1"),
    Case("ep1-bf16", precision="bf16"),
    Case("ep1-isolated-two-mtp", is_isolated=True, model=TWO_MTP),
    Case("ep2", parallel=split(ep=2)),
    Case("ep2-bf16", parallel=split(ep=2), precision="bf16"),
    Case("ep2-isolated-two-mtp", parallel=split(ep=2), is_isolated=True, model=TWO_MTP),
    Case("ep2-no-shared-no-mtp", parallel=split(ep=2), model=NO_SHARED | NO_MTP),
    Case("pp2-interleaved", parallel=split(pp=2, vpp=2)),
    # One rank has the first stage and the MTP modules, the other the losses; folded, the other way round.
    Case("pp2-interleaved-loss-apart", parallel=split(pp=2, vpp=2, layers="Ett|t|tm|L")),
    Case("zbv-pp2-loss-apart-isolated-two-mtp", parallel=split(pp=2, schedule="zbv", layers="Ett|tt|mm|L"),
         is_isolated=True, model=TWO_MTP),
    Case("tp2", parallel=split(tp=2)),
    Case("tp2-ep2", parallel=split(tp=2, ep=2)),
    Case("tp2-etp2", parallel=split(tp=2, etp=2)),
    Case("pp2-interleaved-ep2", 4, split(pp=2, vpp=2, ep=2)),
    Case("pp2-ep2-loss-apart-two-mtp", 4, split(pp=2, ep=2, layers="Ettttmm|L"), model=TWO_MTP),
    Case("pp2-tp2-loss-apart-two-mtp", 4, split(pp=2, tp=2, layers="Ettttmm|L"), model=TWO_MTP),
    Case("pp2-interleaved-ep2-bf16", 4, split(pp=2, vpp=2, ep=2), "bf16"),
    Case("tp2-etp2-ep2", 4, split(tp=2, etp=2, ep=2)),
]
EP2 = Case("", parallel=split(ep=2))
# Relative to each tensor's largest entry. Segments add the gradients of a value with three users, and the two of the
# embedding under MTP, in another order; all else is bitwise the same.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    """By case, what each rank found; one launch for each number of processes."""
    found: dict[str, list[Any]] = {}
    for num_ranks in (2, 4):
        calls: list[Any] = [(run_case, case) for case in CASES if case.num_ranks == num_ranks]
        if num_ranks == 2:
            extra = (run_without_gradients, run_recomputed, live_storages, kept_bytes, misuse)
            calls += [(call, EP2) for call in extra]
        ranks = run_ranks(num_ranks, run_all, calls)
        for index, (call, case) in enumerate(calls):
            found[case.name or call.__name__] = [rank[index] for rank in ranks]
    return found


def largest_errors(got: Passes, expected: Passes) -> dict[str, float]:
    """By what is compared."""
    errors = {}
    for kind in ("outputs", "gradients", "counts"):
        ours, theirs = getattr(got, kind), getattr(expected, kind)
        assert set(ours) == set(theirs), kind
        errors |= {f"{kind}: {name}": relative_error(value, theirs[name]) for name, value in ours.items()}
    return errors


def is_used_twice(name: str) -> bool:
    return "embedding" in name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pieces_equal_one_pass(results, case):
    for rank in results[case.name]:
        for chunk in rank:
            expected = chunk["ordinary"]
            assert all(value.abs().max() > 0 for value in expected.gradients.values())
            errors = largest_errors(chunk["forward_then_backward"], expected)
            worst = max(errors, key=errors.__getitem__)
            print(case.name, worst, errors[worst])
            assert errors[worst] <= TOLERANCE[case.precision], (worst, errors[worst])
            assert all(error == 0 for name, error in errors.items() if name.startswith("counts"))
            # Without experts elsewhere the order of sums is the same, and with them where nobody else reads the norm.
            if case.parallel.expert_model_parallel_size == 1 or case.model.get("num_shared_experts") == 0:
                wrong = {name: error for name, error in errors.items() if error and not is_used_twice(name)}
                assert not wrong, wrong


@pytest.mark.parametrize("way", [way for way in WAYS if way != "forward_then_backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_order_of_pieces_gives_the_same_bits(results, case, way):
    for rank in results[case.name]:
        for chunk in rank:
            errors = largest_errors(chunk[way], chunk["forward_then_backward"])
            assert not any(errors.values()), {name: error for name, error in errors.items() if error}


def test_the_comparison_sees_a_lost_gradient(results):
    (chunk,) = results["ep2"][0]
    broken = {name: value.clone() for name, value in chunk["ordinary"].gradients.items()}
    next(value for name, value in broken.items() if "kv_up_proj" in name)[3].zero_()
    errors = largest_errors(Passes(chunk["ordinary"].outputs, broken, chunk["ordinary"].counts), chunk["ordinary"])
    assert max(errors.values()) > 1e-3


def test_recomputed_layers(results):
    """Nothing is counted twice, and weight gradients of what is computed again wait too (`split_backward` checks)."""
    for (chunk,) in results["run_recomputed"]:
        for way in WAYS:
            errors = largest_errors(chunk[way], chunk["ordinary"])
            assert not any(error for name, error in errors.items() if not is_used_twice(name)), way


def test_without_gradients(results):
    for rank in results["run_without_gradients"]:
        for expected, got in rank:
            assert set(got) == set(expected)
            for name, value in expected.items():
                assert torch.equal(value, got[name]), name


def test_rows_are_freed(results):
    """Three MoE layers and an MTP module, each with a dispatch and a combine."""
    for found in results["live_storages"]:
        assert found == {"under way": (1, 1), "forward": (8, 0), "input": (16, 0), "weights": (16, 0)}


def test_pieces_keep_no_more_than_one_pass(results):
    for one_pass, pieces in results["kept_bytes"]:
        assert 0 < pieces <= one_pass


def test_calls_in_a_wrong_order(results):
    for said in results["misuse"]:
        assert said == [
            "microbatch=1 has no forward pass on this chunk to go back through; under way are []",
            "microbatch=0 is under way on this chunk; run its backward pass, weights included, before its number is "
            "used again",
            "microbatch=0 has no weight gradients that wait on this chunk; there are those of []",
            "microbatch=0 is under way on this chunk; run its backward pass, weights included, before its number is "
            "used again",
            "microbatch=0 has no weight gradients that wait on this chunk; there are those of []",
        ]
