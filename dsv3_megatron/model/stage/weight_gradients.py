"""Weight gradients that wait: the backward pass of a micro-batch in two parts, one for inputs and one for weights.

A pipeline's previous stage waits for the gradient of its output, nobody waits for weight gradients before the optimizer
step. Schedules of the zero-bubble family compute them later, where a rank would idle or a transfer is under way.

Each micro-batch on a stage has its own `WeightGradients`. While one of its segments runs forward, that object is bound,
and the modules with large weights (linears, grouped experts, the output head) note it in their autograd nodes: what two
interleaved micro-batches defer cannot get mixed up. The weights of norms and of the router's gate stay in the input
part: their gradients cost a pass over what is being read anyway, or a product a hundredth of the experts'.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv 2401.10241; DeepSeek-V3 report, section 3.2.1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.ops.linear import DeferredWeightGrad, WeightGradDeferral

_BOUND: ContextVar[WeightGradDeferral | None] = ContextVar("weight_gradients", default=None)


class WeightGradients:
    """Weight gradients of one micro-batch on one stage.

    Called with the computation of one, it keeps it, or runs it at once where nothing is to wait.

    Attributes:
        is_long: What waits does so through other passes, and is brought into its narrowest form.
    """

    def __init__(self) -> None:
        self.is_long = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_deferring = False

    def __call__(self, work: Callable[[], None]) -> None:
        """Keep or run the computation of a weight gradient."""
        if self._is_deferring:
            if self.is_long and isinstance(work, DeferredWeightGrad):
                work.narrow()
            self._waiting.append(work)
        else:
            work()

    def then(self, call: Callable[[], None]) -> None:
        """Call this when all that wait now are computed, with them."""
        self._waiting.append(call)

    def __len__(self) -> int:
        """Number of computations that wait."""
        return len(self._waiting)

    @contextmanager
    def bound(self, *, is_deferring: bool = False) -> Iterator[None]:
        """Modules called in here hand their weight gradients to this object; in backward, also recomputed modules.

        Args:
            is_deferring: Weight gradients of a backward pass in here wait for `compute`.
        """
        token, before = _BOUND.set(self), self._is_deferring
        self._is_deferring = is_deferring
        try:
            yield
        finally:
            _BOUND.reset(token)
            self._is_deferring = before

    def compute(self) -> None:
        """Compute all that wait, in the order in which they came, each freed as it is done."""
        while self._waiting:
            self._waiting.popleft()()


def weight_grad_deferral() -> WeightGradDeferral | None:
    """What a module hands its weight gradients to: the `WeightGradients` bound here, None if there is none.

    A function that runs a module again in backward should ask in its forward and bind that: on CUDA, backward passes
    run in threads of autograd's own, where nothing is bound. Without, its weight gradients do not wait, that is all.
    """
    return _BOUND.get()


@contextmanager
def weight_grads_at_once() -> Iterator[None]:
    """Modules called in here hand their weight gradients to nothing: they do not wait."""
    token = _BOUND.set(None)
    try:
        yield
    finally:
        _BOUND.reset(token)


def delay_engine_weight_gradients(config: TransformerConfig) -> None:
    """Make the Transformer Engine modules to be built from `config` leave their weight gradients to `backward_dw`.

    Set after the configuration has been checked: Megatron-Core ties the option to its own overlapped schedule. Then
    only a `ModelChunk` may run the backward pass, since nothing else calls `backward_dw`. Not run on a GPU yet.
    """
    config.delay_wgrad_compute = True


def delaying_modules(*modules: torch.nn.Module | None) -> list[Any]:
    """Transformer Engine modules in these whose weight gradients wait for their `backward_dw`.

    Such a module keeps its own queue of micro-batches, first in first out. If weights are computed in another order of
    micro-batches than inputs were, it takes the oldest: the sum over the step is the same.
    """
    return [part for module in modules if module is not None for part in module.modules()
            if getattr(part, "need_backward_dw", bool)()]
