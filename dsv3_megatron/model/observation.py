"""What a router and the heads note of a step that is logged. On other steps nobody looks, and nothing is computed.

An observer is set on its module for the time of a step and taken off again (`metrics/instruments.py`). Numbers are
this process's; sums over ranks are the collector's.

Shapes: T tokens of this rank, E experts, K top-k, G groups; S sequence, B micro-batch, H hidden, V vocabulary (v its
part on this tensor-parallel rank), n sampled positions.
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.linear import linear_forward
from dsv3_megatron.parallel.sequence_parts import WHOLE, SequenceParts

NUM_SCORE_BINS = 50


class RouterObserver:
    """Affinities and destinations of the tokens that one router sends.

    Args:
        num_experts: E, the routed experts of a layer.
        num_groups: G; group g holds experts g E / G to (g + 1) E / G - 1, which are on one node.
        device: Device of the router.

    Attributes:
        score_counts_b: fp64, affinities in NUM_SCORE_BINS equal parts of 0..1; of every token to every expert.
        tokens_per_group_G: fp64, tokens that go to a group, each counted once however many of its experts it meets.
        tokens_by_num_groups: fp64 [G + 1], tokens that go to 0, 1, ... G groups.
    """

    def __init__(self, num_experts: int, num_groups: int, device: torch.device) -> None:
        self.num_groups = num_groups
        self.group_size = num_experts // num_groups
        self.score_counts_b = torch.zeros(NUM_SCORE_BINS, dtype=torch.float64, device=device)
        self.tokens_per_group_G = torch.zeros(num_groups, dtype=torch.float64, device=device)
        self.tokens_by_num_groups = torch.zeros(num_groups + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def observe(self, scores_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Add a micro-batch; nothing here waits for the device."""
        self.score_counts_b += torch.histc(scores_TE.float(), NUM_SCORE_BINS, 0.0, 1.0)
        groups = self.num_groups
        is_sent_TG = torch.zeros(len(expert_ids_TK), groups, dtype=torch.float32, device=scores_TE.device)
        is_sent_TG.scatter_(1, expert_ids_TK // self.group_size, 1.0)
        self.tokens_per_group_G += is_sent_TG.sum(0)
        self.tokens_by_num_groups += torch.histc(is_sent_TG.sum(1), groups + 1, -0.5, groups + 0.5)

    def clear(self) -> None:
        """Forget what was observed."""
        for counts in (self.score_counts_b, self.tokens_per_group_G, self.tokens_by_num_groups):
            counts.zero_()


class HeadAgreement:
    """How often an MTP module's most likely token is the main head's, for the same place in the text.

    Depth k at position i and the main head at position i + k both predict token i + k + 1. In speculative decoding
    the first is the draft and the second what verifies it, so this is the acceptance rate of greedy decoding on the
    training text (DeepSeek-V3 report, section 5.4.3). Taken from up to `num_samples` positions of a step's first
    micro-batch, spread evenly; only their logits are computed.

    Args:
        num_depths: MTP modules.
        tp_group: Ranks that share the vocabulary's rows, and the sequence under sequence parallelism.
        cp_group: Ranks that share the sequences, each with a part; None: they are whole.
        device: Device of the heads.
        num_samples: Most positions that are sampled in a step.

    Attributes:
        counts: fp64 [num_depths, 2], positions that agree and positions sampled.
    """

    def __init__(self, num_depths: int, tp_group: torch.distributed.ProcessGroup, device: torch.device,
                 num_samples: int = 128, cp_group: torch.distributed.ProcessGroup | None = None) -> None:
        self.tp_group, self.cp_group = tp_group, cp_group
        self.parts = WHOLE if cp_group is None else SequenceParts(cp_group.size(), cp_group.rank())
        self.num_samples = num_samples
        self.counts = torch.zeros(num_depths, 2, dtype=torch.float64, device=device)
        self._done: set[int] = set()

    @torch.no_grad()
    def observe(self, depth: int, weight_vH: torch.Tensor, main_SBH: torch.Tensor, mtp_SBH: torch.Tensor,
                has_target: torch.Tensor) -> None:
        """Sample a micro-batch, if it is the depth's first of the step. Every rank that shares it calls.

        Args:
            depth: Depth of the MTP module, from 1.
            weight_vH: Rows of the output head.
            main_SBH: Hidden states of the main head, of this rank's part of the sequence.
            mtp_SBH: Hidden states of the MTP module, of this rank's part of the sequence.
            has_target: bool [S] or [B, S], of whole sequences: whether the module's target is in the sequence, and in
                the same document where those are isolated.
        """
        if depth in self._done:
            return
        self._done.add(depth)
        length = has_target.shape[-1]
        rows, positions = has_target.expand(mtp_SBH.shape[1], -1).nonzero(as_tuple=True)
        num_sampled = min(self.num_samples, len(rows))
        sampled = torch.linspace(0, len(rows) - 1, num_sampled, device=rows.device).round().long()
        rows, positions = rows[sampled], positions[sampled]
        drafted = self._most_likely(self._picked(mtp_SBH, positions, rows, length), weight_vH)
        verified = self._most_likely(self._picked(main_SBH, positions + depth, rows, length), weight_vH)
        self.counts[depth - 1, 0] += (drafted == verified).sum()
        self.counts[depth - 1, 1] += num_sampled

    def clear(self) -> None:
        """Forget what was observed; the next micro-batch is a step's first."""
        self.counts.zero_()
        self._done.clear()

    def _picked(self, hidden_SBH: torch.Tensor, positions_n: torch.Tensor, rows_n: torch.Tensor, length: int
                ) -> torch.Tensor:
        """Hidden states [n, H] at positions of sequences of this length, each from the rank that has it."""
        hidden_SBH = self._whole_part(hidden_SBH, length // self.parts.size)
        places_n = self.parts.places(length, rows_n.device)[positions_n]
        picked_nH = hidden_SBH[places_n.clamp(min=0), rows_n].masked_fill((places_n < 0).unsqueeze(1), 0)
        if self.cp_group is not None and self.parts.size > 1:
            torch.distributed.all_reduce(picked_nH, group=self.cp_group)
        return picked_nH

    def _whole_part(self, hidden_SBH: torch.Tensor, length: int) -> torch.Tensor:
        if hidden_SBH.shape[0] == length:
            return hidden_SBH
        whole_SBH = hidden_SBH.new_empty(length, *hidden_SBH.shape[1:])
        torch.distributed.all_gather_into_tensor(whole_SBH, hidden_SBH.contiguous(), group=self.tp_group)
        return whole_SBH

    def _most_likely(self, hidden_nH: torch.Tensor, weight_vH: torch.Tensor) -> torch.Tensor:
        """Token ids, over the vocabulary of all tensor-parallel ranks; on a tie the lowest rank's."""
        scores_n, ids_n = linear_forward(hidden_nH, weight_vH).max(dim=-1)
        ranks = self.tp_group.size()
        if ranks == 1:
            return ids_n
        # One exchange for both; ids are exact in fp64.
        mine = torch.stack([scores_n.double(), (ids_n + self.tp_group.rank() * len(weight_vH)).double()])
        everyones = mine.new_empty(ranks * 2, len(scores_n))
        torch.distributed.all_gather_into_tensor(everyones, mine, group=self.tp_group)
        scores_Rn, ids_Rn = everyones[0::2], everyones[1::2]
        return ids_Rn.gather(0, scores_Rn.argmax(dim=0, keepdim=True)).squeeze(0).long()
