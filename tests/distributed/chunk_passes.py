"""Passes of micro-batches through one stage's chunk, in segments and as one: what `test_chunk.py` compares.

A stage gets random hidden states and a random gradient of its output instead of what its neighbours would send, so that
no rank but those of its expert or tensor group is needed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch
from dsv3_megatron.data.document_ends import document_bounds
from dsv3_megatron.model.build import build_stages, wrap_stages
from dsv3_megatron.model.global_names import whole_parameters
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses
from dsv3_megatron.model.packed_documents import forward_stage
from dsv3_megatron.model.stage.runner import ModelChunk
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.parallel.exchange import Splits, post_all_to_all
from dsv3_megatron.parallel.groups import create_groups
from tests.parity.architectures import GROUPED, MTP_LAMBDA, run_of, variant

SEQ_LENGTH, MICRO_BATCH_SIZE, NUM_MICROBATCHES = 16, 2, 2
EOD = 7
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model's split and precision.

    Attributes:
        name: Of the test.
        num_ranks: Processes.
        parallel: The split.
        precision: "fp32" or "bf16".
        model: Changes of the architecture: one dense and three MoE layers, one MTP module.
        is_isolated: Documents do not see each other, and losses at their ends do not count.
    """

    name: str
    num_ranks: int = 2
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    is_isolated: bool = False

    @property
    def run(self) -> RunConfig:
        """The run of it; its weights are large enough to matter."""
        model = variant("plain", **{"num_layers": 4, "init_method_std": 0.1, **GROUPED, **self.model})
        return run_of(model, self.parallel, seq_length=SEQ_LENGTH, micro_batch_size=MICRO_BATCH_SIZE,
                      global_batch_size=(NUM_MICROBATCHES * MICRO_BATCH_SIZE
                                         * self.parallel.data_parallel_size(self.num_ranks)),
                      train_iters=1, lr_warmup_iters=0, precision=self.precision, reset_attention_mask=self.is_isolated,
                      reset_position_ids=self.is_isolated, eod_mask_loss=self.is_isolated)


@dataclass
class Passes:
    """What micro-batches left on one chunk.

    Attributes:
        outputs: Hidden states, the gradient of the input, sums of losses, by micro-batch.
        gradients: `main_grad` by parameter.
        counts: Tokens for each expert and the balance loss, by layer.
    """

    outputs: Tensors
    gradients: Tensors
    counts: Tensors


def random_batch(run: RunConfig, generator: torch.Generator) -> Batch:
    """A micro-batch of random tokens, of which some do not count."""
    is_isolated = run.data.reset_attention_mask
    shape = (MICRO_BATCH_SIZE, SEQ_LENGTH + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, generator=generator)
    mask = (torch.rand(MICRO_BATCH_SIZE, SEQ_LENGTH, generator=generator) > 0.2).float()
    if is_isolated:
        tokens[torch.rand(shape, generator=generator) < 0.2] = EOD
        mask[tokens[:, :-1] == EOD] = 0.0
    bounds = document_bounds(tokens[:, :-1].numpy(), EOD) if is_isolated else None
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(SEQ_LENGTH).repeat(MICRO_BATCH_SIZE, 1),
                 torch.arange(MICRO_BATCH_SIZE), bounds)


class Stage:
    """One wrapped stage and what it gets of each micro-batch."""

    def __init__(self, run: RunConfig, wrapped: Any, config: Any) -> None:
        self.run, self.wrapped, self.config = run, wrapped, config
        self.module = wrapped.module.module if config.bf16 else wrapped.module
        # Ranks of a tensor-parallel group read the same tokens.
        group = self.module.pg_collection
        generator = torch.Generator().manual_seed(torch.distributed.get_rank() // group.tp.size())
        device = next(wrapped.parameters()).device
        self.batches = [random_batch(run, generator).to(device) for _ in range(NUM_MICROBATCHES)]

        def random(num_depths: int) -> list[torch.Tensor]:
            shape = (num_depths * SEQ_LENGTH // group.tp.size(), MICRO_BATCH_SIZE, run.model.hidden_size)
            return [torch.randn(shape, generator=generator).to(device, config.pipeline_dtype) for _ in self.batches]

        nothing: list[Any] = [None] * NUM_MICROBATCHES
        has_losses, has_modules = self.module.post_process, self.module.mtp_process
        all_depths = 1 + run.model.mtp_num_layers
        self.inputs = nothing if self.module.pre_process else random(
            all_depths if has_losses and not has_modules else 1)
        self.grads = nothing if has_losses else random(all_depths if has_modules else 1)

    def chunk(self, post: Any = post_all_to_all) -> ModelChunk:
        """The stage in pieces."""
        return ModelChunk(self.wrapped, batch_of=self.batches.__getitem__, data=self.run.data,
                          loss_function=lambda batch, losses: sum_losses(batch.loss_mask_BS, losses,
                                                                         mtp_weight=MTP_LAMBDA), post=post)

    def clear(self) -> None:
        """No gradients, no counts."""
        self.wrapped.train()
        self.wrapped.zero_grad_buffer()
        for _, router in routers([self.wrapped], 0):
            router.tokens_per_expert.zero_()
            router.balance_loss_sum.zero_()

    def passes(self, outputs: Tensors) -> Passes:
        """Outputs, with the gradients and counts that are there now."""
        names = {whole.parameter: whole.name.partition(".experts.")[0] for whole in
                 whole_parameters(self.wrapped, self.module.pg_collection)}
        gradients = {f"{names[parameter]} {path.rpartition('.experts.')[2]}": parameter.main_grad.clone()
                     for path, parameter in self.wrapped.named_parameters()}
        counts = {}
        for row, router in routers([self.wrapped], self.run.model.num_layers):
            counts[f"load {row}"] = router.tokens_per_expert.clone()
            counts[f"balance {row}"] = router.balance_loss_sum.clone()
        return Passes(outputs, gradients, counts)


def build(case: Case) -> list[Stage]:
    """This rank's stages."""
    run = case.run
    run.validate(case.num_ranks)
    groups = create_groups(run.parallel, 0)
    stages, config = build_stages(run, groups, precision=case.precision)
    return [Stage(run, wrapped, config) for wrapped in wrap_stages(stages, config, groups)]


def ordinary(stage: Stage) -> Passes:
    """One autograd pass over the whole stage, forward and backward of a micro-batch and then of the next."""
    stage.clear()
    outputs: Tensors = {}
    for number, (batch, given, grad) in enumerate(zip(stage.batches, stage.inputs, stage.grads, strict=True)):
        given = None if given is None else given.clone().requires_grad_()
        stage.module.set_input_tensor(given)
        output = forward_stage(stage.wrapped, batch, stage.run.data)
        if stage.module.post_process:
            loss, _, report = sum_losses(batch.loss_mask_BS, TokenLosses(*output), mtp_weight=MTP_LAMBDA)
            outputs[f"losses {number}"] = report["sums"]
            loss.backward()
        else:
            outputs[f"output {number}"] = output.detach().clone()
            output.backward(grad)
        if given is not None:
            outputs[f"input gradient {number}"] = given.grad
    return stage.passes(outputs)


class Pieces:
    """Runs a chunk's generators and notes what they return."""

    def __init__(self, stage: Stage, post: Any = post_all_to_all) -> None:
        stage.clear()
        self.stage, self.chunk_runner = stage, stage.chunk(post)
        self.outputs: Tensors = {}

    def forward(self, number: int) -> Any:
        output = yield from self.chunk_runner.forward_steps(number, self.stage.inputs[number])
        if output is not None:
            self.outputs[f"output {number}"] = output

    def backward(self, number: int, defer_weights: bool = False) -> Any:
        grad = yield from self.chunk_runner.backward_steps(number, self.stage.grads[number],
                                                           defer_weights=defer_weights)
        if grad is not None:
            self.outputs[f"input gradient {number}"] = grad
        if not defer_weights:
            self.weights(number)

    def run(self, *generators: Any) -> None:
        """Exhaust them in strict alternation."""
        left = list(generators)
        while left:
            for generator in list(left):
                try:
                    next(generator)
                except StopIteration:
                    left.remove(generator)

    def weights(self, number: int) -> None:
        self.chunk_runner.backward_weight(number)

    def result(self) -> Passes:
        num_tokens, reports = self.chunk_runner.take_reports()
        expected = sum(batch.loss_mask_BS.sum() for batch in self.stage.batches) if reports else 0
        assert int(num_tokens) == int(expected)
        return self.stage.passes(self.outputs | {f"losses {n}": report["sums"] for n, report in enumerate(reports)})


def forward_then_backward(stage: Stage) -> Passes:
    """F0 B0 F1 B1."""
    pieces = Pieces(stage)
    for number in range(2):
        pieces.run(pieces.forward(number))
        pieces.run(pieces.backward(number))
    return pieces.result()


def split_backward(stage: Stage) -> Passes:
    """F0 F1 I0 I1 W0 W1; no large weight's gradient is there before its W."""
    pieces = Pieces(stage)
    for number in range(2):
        pieces.run(pieces.forward(number))
    for number in range(2):
        pieces.run(pieces.backward(number, defer_weights=True))
    early = [name for name, grad in stage.passes({}).gradients.items() if grad.any()]
    assert all("norm" in name or "router" in name for name in early), early
    for number in range(2):
        pieces.weights(number)
    return pieces.result()


def overlapped(stage: Stage) -> Passes:
    """F0, F1&B0, B1."""
    pieces = Pieces(stage)
    pieces.run(pieces.forward(0))
    pieces.run(pieces.forward(1), pieces.backward(0))
    pieces.run(pieces.backward(1))
    return pieces.result()


def overlapped_split(stage: Stage) -> Passes:
    """F0, I0&F1, I1, W0, W1: the backward pass first."""
    pieces = Pieces(stage)
    pieces.run(pieces.forward(0))
    pieces.run(pieces.backward(0, defer_weights=True), pieces.forward(1))
    pieces.run(pieces.backward(1, defer_weights=True))
    pieces.weights(0)
    pieces.weights(1)
    return pieces.result()


WAYS: dict[str, Callable[[Stage], Passes]] = {
    way.__name__: way for way in (forward_then_backward, split_backward, overlapped, overlapped_split)}


def run_case(case: Case) -> list[dict[str, Passes]]:
    """Of this rank's chunks: what each way left, "ordinary" among them."""
    return [{"ordinary": ordinary(stage), **{name: way(stage) for name, way in WAYS.items()}}
            for stage in build(case)]


def run_recomputed(case: Case) -> list[dict[str, Passes]]:
    """As `run_case`, where the ways in pieces compute whole layers again in backward."""
    results = []
    for stage in build(case):
        found = {"ordinary": ordinary(stage)}
        stage.config.recompute_granularity = "full"
        results.append(found | {name: way(stage) for name, way in WAYS.items()})
    return results


def run_without_gradients(case: Case) -> list[tuple[Tensors, Tensors]]:
    """Of each chunk: the outputs of an ordinary pass and of one in pieces under `no_grad`, which keeps nothing."""
    results = []
    for stage in build(case):
        expected = {name: value for name, value in ordinary(stage).outputs.items() if "gradient" not in name}
        pieces = Pieces(stage)
        stage.wrapped.eval()
        with torch.no_grad():
            for number in (0, 1, 0, 1):  # a number that comes again is not under way
                pieces.run(pieces.forward(number))
        _, reports = pieces.chunk_runner.take_reports()
        assert all(not router.tokens_per_expert.any() for _, router in routers([stage.wrapped], 0))
        sums = {f"losses {number}": report["sums"] for number, report in enumerate(reports[2:])}
        results.append((expected, pieces.outputs | sums))
    return results


def live_storages(case: Case) -> dict[str, tuple[int, int]]:
    """After each call on a chunk: how many tensors of rows have been exchanged, and how many of them are alive.

    Rows that experts read are not among them while they wait for their weight gradient: what is counted is sent rows
    of the dispatch and of the combine, and gradients on their way back.
    """
    (stage,) = build(case)
    seen: list[weakref.ref] = []

    def post(rows: torch.Tensor, splits: Splits) -> Any:
        if rows.dim() == 2:  # not the gates
            seen.append(weakref.ref(rows.untyped_storage()))
        return post_all_to_all(rows, splits)

    pieces, found = Pieces(stage, post), {}

    def note(call: str, expected: int) -> None:
        deadline = time.monotonic() + 10.0
        while (alive := sum(ref() is not None for ref in seen)) != expected and time.monotonic() < deadline:
            time.sleep(0.01)  # gloo's thread lets go of a transfer a moment after it is done
        found[call] = (len(seen), alive)

    forward = pieces.forward(0)
    next(forward)
    note("under way", 1)
    pieces.run(forward)
    note("forward", 0)
    pieces.run(pieces.backward(0, defer_weights=True))
    note("input", 0)
    pieces.weights(0)
    note("weights", 0)
    return found


def kept_bytes(case: Case) -> tuple[int, int]:
    """What autograd keeps of a forward pass besides parameters: of an ordinary one, and of one in pieces."""
    (stage,) = build(case)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.wrapped.parameters()}
    batch, kept = stage.batches[0], []
    for is_ordinary in (True, False):
        stage.clear()
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()  # alive, for it is kept: no other one has this address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if is_ordinary:
                losses = TokenLosses(*forward_stage(stage.wrapped, batch, stage.run.data))
                whole = sum_losses(batch.loss_mask_BS, losses, mtp_weight=MTP_LAMBDA)
            else:
                pieces = Pieces(stage)
                pieces.run(pieces.forward(0))
        kept.append(sum(size for address, size in sizes.items() if address not in parameters))
    del whole
    return kept[0], kept[1]


def misuse(case: Case) -> list[str]:
    """What a chunk says to calls in a wrong order."""
    (stage,) = build(case)
    pieces, said = Pieces(stage), []

    def refused(call: Callable[[], None]) -> None:
        with pytest.raises(RuntimeError) as caught:
            call()
        said.append(str(caught.value))

    refused(lambda: pieces.run(pieces.backward(1)))
    pieces.run(pieces.forward(0))
    refused(lambda: pieces.run(pieces.forward(0)))
    refused(lambda: pieces.weights(0))
    pieces.run(pieces.backward(0, defer_weights=True))
    refused(lambda: pieces.run(pieces.forward(0)))
    pieces.weights(0)
    refused(lambda: pieces.weights(0))
    pieces.run(pieces.forward(0))
    return said


def run_all(calls: list[tuple[Callable[[Case], Any], Case]]) -> list[Any]:
    """Everything in one launch."""
    from megatron.core import parallel_state

    results = []
    for call, case in calls:
        results.append(call(case))
        parallel_state.destroy_model_parallel()
    return results
