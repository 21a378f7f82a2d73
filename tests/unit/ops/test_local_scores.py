"""The vocabulary split over ranks: losses and gradients against the formula in float64 over all of it.

Ranks are threads that take turns, as Triton's interpreter wants it, and meet in a stand-in for all-reduce.
"""

import threading

import pytest
import torch

from dsv3_megatron.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy
from dsv3_megatron.ops.local_scores import is_among, over_ranks


class Ranks:
    """Threads that compute one at a time, and whose all-reduces wait for all of them."""

    def __init__(self, size, monkeypatch):
        self.turn, self.meeting = threading.Lock(), threading.Barrier(size)
        self.given, self.sizes, self.size_, self.own = {}, [], size, threading.local()
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def size(self):
        return self.size_

    def rank(self):
        return self.own.rank

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        assert group is self
        self.given[self.rank()] = tensor.clone()
        if self.rank() == 0:
            self.sizes.append(tensor.numel())
        self._wait()
        stacked = torch.stack([self.given[rank] for rank in range(self.size_)])
        tensor.copy_(stacked.amax(0) if op == torch.distributed.ReduceOp.MAX else stacked.sum(0))
        self._wait()

    def _wait(self):
        self.turn.release()
        self.meeting.wait(30)
        self.turn.acquire()

    def run(self, function):
        results, errors = [None] * self.size_, []

        def body(rank):
            self.own.rank = rank
            with self.turn:
                try:
                    results[rank] = function(rank)
                except BaseException as error:  # noqa: BLE001 -- raised below, by the test's own thread
                    errors.append(error)
                    self.meeting.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size_)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[0]
        return results


WAYS = {
    "fused": {"backend": "fused"},
    "chunked, kept": {"backend": "chunked", "keep_probabilities": True, "chunk_tokens": 5},
    "chunked, recomputed": {"backend": "chunked", "keep_probabilities": False, "chunk_tokens": 5},
}


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["small", "large logits"])
@pytest.mark.parametrize("way", WAYS)
def test_a_split_vocabulary_is_the_whole_one(monkeypatch, way, scale):
    if way == "fused":
        pytest.importorskip("triton", reason="triton is not installed on this platform")
    generator, size, local = torch.Generator().manual_seed(0), 3, 21
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((14, 16), (size * local, 16)))
    hidden *= scale
    targets = torch.randint(0, size * local, (14,), generator=generator)
    targets[:5] = torch.tensor([0, local - 1, local, size * local - 1, -100])  # on the ranks' edges, and ignored
    grad = torch.rand(14, generator=generator)
    grad[7] = 0
    ranks = Ranks(size, monkeypatch)

    def one_rank(rank):
        h = hidden.clone().requires_grad_()
        w = weight[rank * local : (rank + 1) * local].clone().requires_grad_()
        w.main_grad = torch.zeros_like(w)
        losses = linear_cross_entropy(h, w, targets, vocabulary_group=ranks, accumulate_into_main_grad=True,
                                      **WAYS[way])
        losses.backward(grad)
        return losses.detach(), h.grad, w.main_grad

    losses, grads_hidden, grads_weight = zip(*ranks.run(one_rank), strict=True)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    counts = targets != -100
    expected = reference_cross_entropy(h @ w.T, targets.where(counts, 0)) * counts
    expected.backward(grad.double())
    # fp32: logits are rounded in proportion to their size, and exponentials carry that over.
    tolerance = 1e-6 * (h @ w.T).abs().max().item() + 1e-6
    for value in losses:
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=tolerance)
        assert torch.equal(value, losses[0])
    torch.testing.assert_close(sum(grads_hidden).double(), h.grad, rtol=1e-5, atol=20 * tolerance)
    torch.testing.assert_close(torch.cat(grads_weight).double(), w.grad, rtol=1e-5, atol=20 * scale * tolerance)
    assert ranks.sizes == [14, 28]  # two all-reduces, of T and of 2 T numbers


def test_one_rank_meets_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    ranks = Ranks(1, monkeypatch)
    ranks.all_reduce = torch.distributed.all_reduce = None
    hidden, weight = torch.randn(3, 8), torch.randn(5, 8)
    targets = torch.tensor([0, 4, 2])
    assert torch.equal(linear_cross_entropy(hidden, weight, targets, vocabulary_group=ranks),
                       linear_cross_entropy(hidden, weight, targets))
    scores = object()
    assert over_ranks(scores, targets, None) is scores
    assert is_among(torch.tensor([-1, 0, 4, 5]), 5).tolist() == [False, True, True, False]
