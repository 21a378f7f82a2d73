"""What a micro-batch's token losses become: the sum to differentiate, and the sums that a step reports.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.parallel.sequence_parts import WHOLE, SequenceParts
from dsv3_megatron.platform import Device


def sum_losses(loss_mask_BS: torch.Tensor, losses: TokenLosses, *, mtp_weight: float,
               sample_ids_B: torch.Tensor | None = None, parts: SequenceParts = WHOLE
               ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A micro-batch's loss, summed over this rank's tokens of it.

    Args:
        loss_mask_BS: 1 where the next token counts; 0 at an EOD with eod_mask_loss. Of whole sequences.
        losses: Losses of each position of this rank's part. An MTP loss is 0 already where the sequence, or an
            isolated document, ends first.
        mtp_weight: Weight of the MTP losses, lambda.
        sample_ids_B: Reported with the sums, to say where a loss that is not finite came from.
        parts: The split of the sequences.

    Returns:
        The sum to differentiate; the number of tokens to divide by, int32; and the sums to report, fp64:
        tokens, main loss, MTP losses by depth, each before its weight.

    Source: DeepSeek-V3 report, eq. 24-25; an MTP target counts where the token it stands for counts: at position i of
    depth k, where loss_mask[i + k] is 1. So with isolated documents of n tokens with their EOD, depth k has n - k
    targets, of which the last is the first token of the next document, which the main loss predicts from the EOD; with
    eod_mask_loss neither does, and there are n - k - 1.
    """
    losses = TokenLosses(*losses)  # the bf16 wrapper rebuilds tuples without their names
    own_mask_BS = parts.take(loss_mask_BS, 1)
    tokens = own_mask_BS.sum()
    main = (losses.main_BS * own_mask_BS).sum()
    mtp = []
    for depth, losses_BS in enumerate(losses.mtp_BS, start=1):
        target_mask_BS = torch.nn.functional.pad(loss_mask_BS[:, depth:], (0, depth))
        mtp.append((losses_BS * parts.take(target_mask_BS, 1)).sum())
    total = main + (mtp_weight / len(mtp) * torch.stack(mtp).sum() if mtp else 0.0)
    sums = torch.stack([tokens, main.detach(), *(loss.detach() for loss in mtp)]).double()
    return total, tokens.to(torch.int), {"sums": sums, "sample_ids": sample_ids_B}


def sum_reports(collected: list[dict[str, Any]], groups: ProcessGroupCollection, device: Device, *,
                num_mtp_layers: int, num_extras: int = 0) -> torch.Tensor:
    """The sums that `sum_losses` reported, over this rank's micro-batches; to be added up over all ranks.

    Args:
        collected: This rank's reports; none but on the last pipeline stage.
        groups: The run's process groups; tensor-parallel ranks report the same numbers, of which the first's count.
        device: Device of this process.
        num_mtp_layers: MTP losses in a report.
        num_extras: Further sums behind them, of a loss of its own kind.

    Returns:
        fp64 [2 + num_mtp_layers + num_extras], on the device.
    """
    sums = torch.zeros(2 + num_mtp_layers + num_extras, dtype=torch.float64, device=device.torch_device)
    if groups.tp.rank() == 0:
        for report in collected:
            sums += report["sums"]
    return sums


def sum_over_ranks(collected: list[dict[str, Any]], groups: ProcessGroupCollection, device: Device, *,
                   num_mtp_layers: int) -> list[float]:
    """Add up over all ranks what `sum_reports`, with the same arguments, gives on each; every rank calls.

    Returns:
        As many numbers, the same on every rank.
    """
    sums = sum_reports(collected, groups, device, num_mtp_layers=num_mtp_layers)
    torch.distributed.all_reduce(sums)
    return sums.tolist()
