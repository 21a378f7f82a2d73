"""The kernels of the head and its loss against the formula in float64, and what they write, counted store by store."""

import collections

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.kernels import head_loss
from dsv3_megatron.kernels.head_loss_tiles import INTERPRETED_TILES, HeadLossTiles, fused_bytes, gradient_columns
from dsv3_megatron.ops.fused_head_loss import fused_gradients, fused_scores

# Tokens, hidden, vocabulary: tiles of 16 tokens, 32 columns and steps of 16 that divide them, or do not.
SHAPES = [(32, 32, 64), (37, 24, 77), (1, 16, 31)]


def _case(tokens, hidden, vocabulary, dtype=torch.bfloat16, scale=1.0):
    generator = torch.Generator().manual_seed(tokens)
    h, w = (torch.randn(shape, generator=generator) for shape in ((tokens, hidden), (vocabulary, hidden)))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return (h * scale).to(dtype), w.to(dtype), targets, torch.rand(tokens, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(shape, dtype):
    h, w, targets, _ = _case(*shape, dtype)
    logits = h.double() @ w.double().T
    largest, sums, target_logits = head_loss.head_scores(h, w, targets)
    torch.testing.assert_close(largest.double(), logits.amax(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close((largest + sums.log()).double(), logits.logsumexp(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(target_logits.double(), logits.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_all_and_of_some_columns(shape, dtype):
    h, w, targets, grad = _case(*shape, dtype)
    logits = h.double() @ w.double().T
    expected = (logits.softmax(1) - torch.nn.functional.one_hot(targets, w.shape[0])) * grad.double()[:, None]
    largest, sums, _ = head_loss.head_scores(h, w, targets)
    for first, last in ((0, w.shape[0]), (0, 1), (7, 30), (w.shape[0] - 1, w.shape[0])):
        out = torch.full((h.shape[0], last - first), 7.0)
        head_loss.logit_gradients(h, w, targets, largest, sums.log(), grad, first, out)
        torch.testing.assert_close(out.double(), expected[:, first:last], rtol=1e-5, atol=1e-6)


def test_gradients_are_rounded_to_bf16_not_cut_off():
    h, w, targets, grad = _case(37, 24, 77)
    largest, sums, _ = head_loss.head_scores(h, w, targets)
    wide, narrow = torch.empty(37, 77), torch.empty(37, 77, dtype=torch.bfloat16)
    for out in (wide, narrow):
        head_loss.logit_gradients(h, w, targets, largest, sums.log(), grad, 0, out)
    assert torch.equal(narrow, wide.bfloat16())


def test_a_target_that_is_not_here_is_left_to_others():
    h, w, targets, grad = _case(20, 16, 40)
    targets[:3] = torch.tensor([-1, 40, 41])
    largest, sums, target_logits = head_loss.head_scores(h, w, targets)
    assert target_logits[:3].tolist() == [0, 0, 0]
    out = torch.empty(20, 40)
    head_loss.logit_gradients(h, w, targets, largest, sums.log(), grad, 0, out)
    softmax = (h.double() @ w.double().T).softmax(1)[:3]
    torch.testing.assert_close(out[:3].double(), softmax * grad[:3, None].double(), rtol=1e-5, atol=1e-6)
    assert fused_scores(h, w, targets).margins[:3].tolist() == [0, 0, 0]


def test_very_large_logits():
    h, w, targets, _ = _case(20, 16, 40, scale=1e4)
    logits = h.double() @ w.double().T
    expected = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    scores = fused_scores(h, w, targets)
    assert logits.abs().max() > 1e5
    # What is left is the rounding of the logits themselves.
    torch.testing.assert_close(scores.losses().double(), expected, rtol=1e-6, atol=1e-6 * logits.abs().max().item())
    assert fused_scores(h, w, logits.argmax(1)).losses().ge(0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
def test_a_nan_is_seen():
    h, w, targets, _ = _case(20, 16, 40)
    h[3, 5] = float("nan")
    losses = fused_scores(h, w, targets).losses()
    assert losses.isnan().tolist() == [token == 3 for token in range(20)]


def test_no_tokens():
    h, w, targets, grad = _case(0, 16, 40)
    assert fused_scores(h, w, targets).losses().shape == (0,)
    hidden, weight = fused_gradients(h, w, targets, grad, grad, grad, None, needs_hidden=True, needs_weight=True)
    assert hidden.shape == (0, 16) and not weight.any()


def test_rows_that_tma_cannot_address():
    h, w, targets, _ = _case(20, 12, 40)
    with pytest.raises(ValueError, match=r"hidden states \(20, 12\) .* multiples of 16 bytes; take backend='chunked'"):
        head_loss.head_scores(h, w, targets)


class _Stored:
    """Bytes that kernels load and store, by the tensor they belong to: a watch on the interpreter's memory."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import interpreter_builder as builder

        self.loads, self.stores = collections.Counter(), collections.Counter()
        self.tensors = {}
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(ptrs, mask, *args, **kwargs):
            self._count(self.loads, ptrs, mask)
            return load(ptrs, mask, *args, **kwargs)

        def counted_store(ptrs, value, mask, *args, **kwargs):
            self._count(self.stores, ptrs, mask)
            return store(ptrs, value, mask, *args, **kwargs)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def _count(self, counter, ptrs, mask):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        counter[size] += int(np.broadcast_to(mask.data, ptrs.data.shape).sum()) * size


class _Products(TorchDispatchMode):
    """Matrix products that torch is asked for, as (sum that is added to, left, right)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "mm" in name:
            self.seen.append((args[0] if "addmm" in name else None, *args[-2:]))
        return function(*args, **(kwargs or {}))


def test_what_a_logit_costs_is_what_the_kernels_store(monkeypatch):
    tokens, hidden, vocabulary = 20, 16, 130
    h, w, targets, grad = _case(tokens, hidden, vocabulary)
    counted = fused_bytes(tokens, hidden, vocabulary, tiles=INTERPRETED_TILES)
    seen = _Stored(monkeypatch)
    scores = fused_scores(h, w, targets)
    partial_sums = 2 * 4 * tokens * -(-vocabulary // INTERPRETED_TILES.block_v)
    assert dict(seen.stores) == {4: partial_sums + 4 * tokens}  # and the target's logits
    seen.stores.clear()
    with _Products() as products:
        fused_gradients(h, w, targets, scores.largest, scores.sums.log(), grad, None, needs_hidden=True,
                        needs_weight=True)
    assert dict(seen.stores) == {2: 2 * tokens * vocabulary}
    # Each product reads the gradients that it is given, and the sums of the hidden gradient once there are some.
    read = sum(left.numel() * 2 for _, left, _ in products.seen)
    assert (counted.partial_sums, counted.gradients) == (2 * partial_sums, seen.stores[2] + read)
    of_hidden = [total for total, _, right in products.seen if right.shape[1] == hidden and right.shape[0] != tokens]
    passes = sum(1 if total is None else 2 for total in of_hidden)
    assert counted.hidden_gradient == (4 * passes + 4 + 2) * tokens * hidden and len(of_hidden) > 1


def test_bytes_a_logit_at_v3s_size():
    """By hand: 2 written and twice 2 read, partial sums of 16 bytes in 256 columns, and the hidden gradient's sums."""
    tokens, hidden, vocabulary = 4096, 7168, 129280
    counted, logits = fused_bytes(tokens, hidden, vocabulary), tokens * vocabulary
    assert gradient_columns(vocabulary, hidden, 256) == 16384
    assert counted.gradients == 6 * logits and counted.partial_sums / logits == pytest.approx(16 / 256, rel=1e-3)
    assert counted.hidden_gradient / logits == pytest.approx((15 * 4 + 6) * hidden / vocabulary, rel=1e-9)
    assert 6 < counted.of_logits / logits < 10
    assert counted.main_gradient / logits == 8 * hidden / tokens
    for ranks in (1, 2, 4, 8, 16):
        for local_tokens in (1024, 4096, 32768):
            part = fused_bytes(local_tokens, hidden, vocabulary // ranks)
            assert 6 < part.of_logits / (local_tokens * vocabulary // ranks) < 10, (ranks, local_tokens)


def test_tiles_fit_hopper():
    tiles = HeadLossTiles()
    assert tiles.stages * (tiles.block_t + tiles.block_v) * tiles.block_h * 2 < 232448
