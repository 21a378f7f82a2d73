"""What a pipeline's executor asks of one stage of the model.

A stage runs in steps: a generator computes until its next communication is posted, yields, and waits for it when it is
resumed. So two micro-batches can take turns, and the communication of the one hides behind the computation of the
other. The turns are strict, one resume each, never by readiness: the order of collectives on a communicator is then
the same on every rank. The backward has the first turn, for it begins with communication (of the combine's gradient)
and the forward with computation (attention).

Shapes: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch

Steps = Generator[None, None, torch.Tensor | None]   # runs until its next communication is posted, then yields


class ChunkRunner(Protocol):
    """One stage of the model as the executor sees it; it keeps what each micro-batch needs between its calls."""

    def forward_steps(self, microbatch: int, input_SBH: torch.Tensor | None) -> Steps:
        """A micro-batch's forward pass.

        Args:
            microbatch: Number of the micro-batch among those of this chunk's direction, from 0.
            input_SBH: The previous stage's output; None on the first stage.

        Returns:
            The stage's output; None on the last stage, whose loss the runner keeps for its own backward.
        """
        ...

    def backward_steps(self, microbatch: int, grad_SBH: torch.Tensor | None, *, defer_weights: bool) -> Steps:
        """A micro-batch's backward pass.

        Args:
            microbatch: Number of the micro-batch, as in `forward_steps`.
            grad_SBH: The gradient of the stage's output; None on the last stage.
            defer_weights: All weight gradients wait for `backward_weight`. Otherwise only those do that no transfer is
                left to hide: the caller hands on the gradient and then calls `backward_weight`, at once.

        Returns:
            The gradient of the stage's input; None on the first stage.
        """
        ...

    def backward_weight(self, microbatch: int) -> None:
        """Compute what `backward_steps` left, and free it; called once after each of its passes."""
        ...
