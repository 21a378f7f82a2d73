"""Mean losses of a step or a validation, of which there are none where no token counts. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.guards.spikes import LOSS


@dataclass(frozen=True)
class StepLosses:
    """Mean losses of a step or a validation over all ranks, nats per token.

    Attributes:
        main: Next-token loss; None where no token counts.
        mtp: Losses of the MTP modules, by depth; empty where no token counts.
    """

    main: float | None
    mtp: tuple[float, ...]

    @classmethod
    def of_sums(cls, num_tokens: float, sums: Sequence[float]) -> StepLosses:
        """Means over tokens that count.

        Args:
            num_tokens: Number of tokens that count.
            sums: Sum of the main loss over tokens, and of each MTP loss.
        """
        if not num_tokens:
            return cls(None, ())
        main, *mtp = (value / num_tokens for value in sums)
        return cls(main, tuple(mtp))

    @classmethod
    def mean(cls, losses: Sequence[StepLosses]) -> StepLosses:
        """Mean over batches; those without a token that counts are left out."""
        counted = [(loss.main, *loss.mtp) for loss in losses if loss.main is not None]
        return cls.of_sums(len(counted), [sum(column) for column in zip(*counted, strict=True)])

    def by_name(self, balance_loss: float | None) -> dict[str, float]:
        """All losses of a step, the balance loss among them, by the names they are logged under."""
        named = {} if self.main is None else {LOSS: self.main}
        named |= {f"mtp_{depth} loss": loss for depth, loss in enumerate(self.mtp, start=1)}
        return named if balance_loss is None else named | {"balance loss": balance_loss}
