"""One rank's tokens to its experts and home by node, bit for bit what a row for each expert gives.

Between ranks sums have another order; there is tests/distributed/test_node_dispatch.py.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3_megatron.model.mcore_config import mcore_config
from dsv3_megatron.model.node_dispatcher import NodeDispatcher
from dsv3_megatron.model.token_dispatcher import GatedDispatcher
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.parallel.expert_nodes import ExpertNodes
from dsv3_megatron.parallel.groups import create_groups, destroy_groups, start_process_group
from dsv3_megatron.platform import prepare
from tests.distributed.small_run import small_run

EXPERTS, TOP_K, TOKENS, HIDDEN = 12, 4, 64, 32


@pytest.fixture(scope="module")
def dispatchers() -> Any:
    """Both, by name, for one rank with all experts."""
    start_process_group(prepare())
    run = small_run(num_experts=EXPERTS, moe_router_topk=TOP_K, moe_router_num_groups=4, moe_router_group_topk=2)
    groups, config = create_groups(run.parallel, 1), mcore_config(run, "fp32")
    layer: Any = SimpleNamespace(config=config, num_local_experts=EXPERTS, local_expert_indices=list(range(EXPERTS)))
    yield {"each": GatedDispatcher(EXPERTS, list(range(EXPERTS)), config=config, pg_collection=groups),
           "once": NodeDispatcher(layer, groups, ExpertNodes(1, 1, 0, (groups.ep,)))}
    destroy_groups()


def passed(dispatcher: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows, gates, outputs and all gradients of tokens that go through linear experts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, ids, True)
    probs = (torch.rand(TOKENS, EXPERTS, generator=generator) * routing_map).requires_grad_()
    tokens = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator).to(dtype)
    sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, routing_map, probs))
    rows, counts, gates = dispatcher.dispatch_postprocess(*sent)
    outputs = torch.cat([part @ weights[expert] for expert, part in enumerate(rows.split(counts.tolist()))])
    outputs = (outputs * gates[:, None]).to(dtype)
    outputs.retain_grad()
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(outputs)))
    combined.backward(torch.randn(combined.shape, generator=generator).to(dtype))
    return [rows.detach(), gates.detach(), combined.detach(), outputs.grad, tokens.grad, probs.grad]


@pytest.mark.parametrize("backend", [None, REFERENCE], ids=["as it is", "fp8"])
def test_the_same_bits_as_with_a_row_for_each_expert(dispatchers, backend):
    found = {}
    for name, dispatcher in dispatchers.items():
        dispatcher.backend = backend
        found[name] = passed(dispatcher, torch.float32)
    for each, once in zip(*found.values(), strict=True):
        assert torch.equal(each, once)


def test_sums_in_bf16_are_rounded_once(dispatchers):
    """As near to the fp32 result as outputs in bf16 are."""
    dispatcher = dispatchers["once"]
    dispatcher.backend = None
    found = {dtype: passed(dispatcher, dtype)[2] for dtype in (torch.float32, torch.bfloat16)}
    error = (found[torch.bfloat16].float() - found[torch.float32]).abs().max() / found[torch.float32].abs().max()
    assert found[torch.bfloat16].dtype == torch.bfloat16 and error < 0.02


def test_nothing_of_a_micro_batch_is_left(dispatchers):
    dispatcher = dispatchers["once"]
    tokens = torch.randn(4, 1, HIDDEN, requires_grad=True)
    routing_map = torch.zeros(4, EXPERTS, dtype=torch.bool)
    routing_map[:, :TOP_K] = True
    sent = dispatcher.dispatch_preprocess(tokens, routing_map, torch.rand(4, EXPERTS))
    route = weakref.ref(dispatcher.outward().route)
    rows = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))[0]
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
    assert route() is not None, "backward needs it"
    del rows, sent, combined
    assert route() is None
