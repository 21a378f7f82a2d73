r"""Published pipeline bubbles and activation bounds, with what their letters mean here.

The letters, all for one chunk: F the forward, B the full backward, W its weight part, F&B an overlapped pair, and I =
B - W the input part. PP is the number of stages, which is not always P, the number of ranks. The bubble is the time
that a rank stands still between the beginning and the end of the step, transfers taking no time.

1F1B, (PP-1)(F+B), PP = P. The last rank waits PP-1 forwards for its first micro-batch and, after its last backward,
PP-1 backwards for the step to end; between them it never waits.

Interleaved 1F1B, (P-1)(F+B) of its own, smaller chunks, P being the ranks: with V chunks per rank these are 1/V of the
size, so the bubble is 1/V of 1F1B's.

ZB1P, (PP-1)(F+B-2W), PP = P. The last rank waits PP-1 forwards at first. At last it has PP-1 more weight parts to run
than rank 0, where the gradient arrives PP-1 input parts later: it waits (PP-1)(I-W). That takes W <= I, for a rank
cannot wait less than nothing, and W <= F: rank 0 has no weight part yet to run while its first gradient comes back,
so it waits at least (PP-1) I. And at least P micro-batches.

DualPipe, (PP/2-1)(F&B+B-3W), PP = P. Take a rank at the fold; PP/2-1 ranks lie between it and either end. It waits
(PP/2-1) I until its first pair: a forward per rank for its first micro-batch, I - F per rank more for its first
gradient from the far end. It waits (PP/2-1)(F&B-B) where it has run out of forwards (step 6) and the others still run
pairs (step 5), and (PP/2-1)(I-W) at the end, as ZB1P does with half as many ranks. The sum is the formula. It takes
W <= F <= I and max(F, B) <= F&B <= F+B. Outer ranks wait equally long where F&B = F+B; where pairs save time they wait
less, as they run fewer pairs and more single chunks: the formula is the longest wait of a rank.

DualPipeV, (PP/2-1)(F&B+B-3W), PP = 2P: the same, half as many ranks for the same stages; PP/2-1 is P-1. "PP/2 devices"
of the published table is this P. A chunk is a stage, of which there are 2P; the same ranks holding P stages as DualPipe
would have chunks of twice the time, so at equal ranks and model its bubble is (P-1) to DualPipe's 2 (P/2-1) = P-2.
Both take at least 2P micro-batches: fewer leave pairs without their other half, and the rank stands still for longer.

ZB-V has a closed form under its own condition F = I = W, with at least 2P-1 micro-batches: (P-1) F. The published zero
does not count that rank r begins r forwards after rank 0 and ends as much later.

Source: DeepSeek-V3 report, table 2, and the README of the released DualPipe; arXiv 2104.04473; arXiv 2401.10241.
"""

from __future__ import annotations

from dsv3_megatron.config.pipeline import PAIRED
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.timeline import Time


def published_bubble(plan: Plan, *, forward: Time, backward: Time, weight: Time, overlapped: Time) -> Time | None:
    """The longest wait of a rank by the published formula, without transfer times.

    Args:
        plan: Says the schedule, the ranks and the micro-batches.
        forward: F of one chunk, in any unit of time.
        backward: B of one chunk, all of its backward pass.
        weight: W, part of B.
        overlapped: F&B of a pair of chunks.

    Returns:
        The bubble, or None where the formula does not hold: outside the conditions above, and for interleaved 1F1B
        with overlapped pairs, which has none.
    """
    input_part = backward - weight
    ranks = plan.num_ranks
    if plan.is_overlapped:
        return None
    if plan.schedule in ("1f1b", "interleaved"):
        return (ranks - 1) * (forward + backward)
    if plan.schedule == "zb1p":
        holds = weight <= min(forward, input_part) and plan.num_microbatches >= ranks
        return (ranks - 1) * (forward + backward - 2 * weight) if holds else None
    if plan.schedule == "zbv":
        holds = forward == input_part == weight and plan.num_microbatches >= 2 * ranks - 1
        return (ranks - 1) * forward if holds else None
    stages = plan.num_stages  # PP: even, for dualpipe by its rule and for dualpipev by its cut
    holds = (plan.num_microbatches >= 2 * ranks and weight <= forward <= input_part
             and max(forward, backward) <= overlapped <= forward + backward)
    return (stages // 2 - 1) * (overlapped + backward - 3 * weight) if holds else None


def activation_bound(plan: Plan) -> tuple[int, ...]:
    """Most chunks whose activations each rank may hold at once, by rank: the schedule's promise.

    The published PP of 1F1B is rank 0's P (rank r holds P - r), of ZB1P every rank's P. PP+1 of DualPipe and, with PP =
    2P stages, of DualPipeV is every rank's; the one more is the forward of a running pair. ZB-V holds PP = 2P of its
    chunks, the memory of P whole ones. Interleaved 1F1B holds its warm-up forwards and one more, (V-1) P + 2 (P-1-r) +
    1 chunks of 1/V of the size, and two more with pairs.
    """
    ranks, total = plan.num_ranks, plan.num_microbatches * plan.num_chunks
    if plan.schedule == "1f1b":
        return tuple(min(ranks - rank, total) for rank in range(ranks))
    if plan.schedule == "interleaved":
        return tuple(min((plan.num_chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1 + 2 * plan.is_overlapped, total)
                     for rank in range(ranks))
    bound = plan.num_stages + (plan.schedule in PAIRED)
    return (min(bound, total),) * ranks
