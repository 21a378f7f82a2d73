"""The tape against plain autograd, and what hides behind what, in virtual time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3_megatron.model.stage.tape import Tape
from dsv3_megatron.model.stage.weight_gradients import WeightGradients, delaying_modules, weight_grad_deferral
from dsv3_megatron.ops.linear import DeferredWeightGrad, linear
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.schedule.execute import take_turns
from tools.bench.timed_segments import Channel, Costs, TimedStage, VirtualClock

SPLITS = Splits((2, 1), (2, 1), None)  # type: ignore[arg-type]


class Loopback:
    """A transfer to oneself, with the rows in another order; there and back they are as before."""

    def __init__(self, rows: torch.Tensor, _splits: Splits) -> None:
        self.rows = rows.flip(0)

    def wait(self) -> torch.Tensor:
        return self.rows


def exhaust(generator: Any) -> Any:
    (result,) = take_turns([generator])
    return result


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def as_segments(tape: Tape, x: torch.Tensor, w: list[torch.Tensor]) -> Any:
    """Values with one, two and no users; a table that is looked up without an input; an exchange."""
    def product(index: int) -> Any:
        return lambda rows: linear(rows, w[index], defer_weight_grad=weight_grad_deferral())

    given = tape.value(x)
    (looked_up,) = tape.run(lambda: w[2][[0, 3, 3]])
    first, unused = tape.run(lambda a: (product(0)(a), a.exp()), given)
    (moved,) = yield from tape.exchange(first, splits=SPLITS)
    (second,) = tape.run(lambda a, b: product(1)(a.sin()) + b, moved, looked_up)
    (total,) = tape.run(lambda a, b, c: (a * b).sum() + c.sum(), second, first, looked_up)
    assert not unused.tensor.requires_grad
    return given, total


def expected_gradients(x: torch.Tensor, w: list[torch.Tensor]) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    looked_up = w[2][[0, 3, 3]]
    first = x @ w[0].T
    second = first.flip(0).sin() @ w[1].T + looked_up
    return list(torch.autograd.grad((second * first).sum() + looked_up.sum(), [x, *w]))


@pytest.mark.parametrize("defer", [True, False])
def test_equals_autograd(defer):
    x, w = torch.randn(3, 4, dtype=torch.float64), weights()
    tape = Tape(is_recording=True, post=Loopback)
    given, total = exhaust(as_segments(tape, x, w))
    total.slot.add(torch.ones((), dtype=torch.float64))
    exhaust(tape.backward(defer_weights=defer))
    # Not deferred, the first segment's (the table's) are left all the same: the gradient is sent before.
    assert len(tape.weights) == (3 if defer else 1)
    assert [weight.grad is None for weight in w] == [defer, defer, True]
    tape.weights.compute()
    for got, wanted in zip([given.slot.take(), *(weight.grad for weight in w)], expected_gradients(x, w), strict=True):
        torch.testing.assert_close(got, wanted)
    assert given.slot.take() is None and len(tape.weights) == 0


def test_without_recording_nothing_is_kept():
    w = weights()
    tape = Tape(is_recording=False, post=Loopback)
    given, total = exhaust(as_segments(tape, torch.ones(3, 4, dtype=torch.float64), w))
    assert given.slot is None and total.slot is None and not total.tensor.requires_grad
    assert exhaust(tape.backward(defer_weights=False)) is None and all(weight.grad is None for weight in w)


def test_an_output_lives_as_long_as_somebody_needs_it():
    tape = Tape(is_recording=True)
    (saved, unsaved) = tape.run(lambda x: ((y := x.exp()), y + 1.0), tape.value(torch.ones(5)))
    refs = [StorageWeakRef(value.tensor.untyped_storage()) for value in (saved, unsaved)]
    slots = saved.slot, unsaved.slot
    del saved, unsaved
    assert [ref.expired() for ref in refs] == [False, True]  # exp keeps its result
    slots[1].add(torch.ones(5))
    exhaust(tape.backward(defer_weights=False))
    assert refs[0].expired()


def test_an_exchange_without_a_user_here_takes_part():
    """Another rank may use what was sent: the way back must not be left out."""
    seen = []

    def post(rows: torch.Tensor, splits: Splits) -> Loopback:
        seen.append((rows, splits))
        return Loopback(rows.new_ones(sum(splits.received), 2), splits)

    splits = Splits((2, 1), (3, 4), None)  # type: ignore[arg-type]
    tape = Tape(is_recording=True, post=post)
    (value,) = tape.run(torch.exp, tape.value(torch.ones(3, 2)))
    exhaust(tape.exchange(value, splits=splits))
    exhaust(tape.backward(defer_weights=False))
    rows, back = seen[1]
    assert rows.shape == (7, 2) and not rows.any() and (back.sent, back.received) == ((3, 4), (2, 1))


def test_what_travelled_is_gone_when_the_segment_before_goes_back():
    """Rows that travel in FP8 come as records, which nobody needs once they are widened."""
    transfers = []

    def post(rows: torch.Tensor, splits: Splits) -> Loopback:
        transfer = Loopback(rows, splits)
        transfers.append(weakref.ref(transfer))
        return transfer

    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append([transfer() is None for transfer in transfers])
            return grads[0]

    tape = Tape(is_recording=True, post=post)
    (first,) = tape.run(Looks.apply, tape.value(torch.ones(3, 4)))
    (moved,) = exhaust(tape.exchange(first, splits=SPLITS))
    moved.slot.add(torch.ones(3, 4))
    exhaust(tape.backward(defer_weights=False))
    assert seen == [[True, True]]


def test_bindings_do_not_outlast_their_segment():
    first, second = WeightGradients(), WeightGradients()
    done = []
    with first.bound(is_deferring=True):
        with second.bound():
            assert weight_grad_deferral() is second
            second(lambda: done.append("at once"))
        assert weight_grad_deferral() is first
        first(lambda: done.append("later"))
        assert done == ["at once"] and len(first) == 1
    assert weight_grad_deferral() is None
    first.compute()
    assert done == ["at once", "later"] and len(first) == 0


@pytest.mark.parametrize("is_long", [False, True])
def test_what_waits_for_a_call_of_its_own_is_narrowed(is_long):
    """Weight gradients that are computed behind the next transfer are not worth a narrower form."""
    done = []

    class Deferring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.defer = weight_grad_deferral()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            ctx.defer(DeferredWeightGrad(done.append, "wide", narrowed=lambda held: ("narrow",)))
            return grads[0]

    tape = Tape(is_recording=True, post=Loopback)
    (moved,) = exhaust(tape.exchange(*tape.run(Deferring.apply, tape.value(torch.ones(3, 4))), splits=SPLITS))
    moved.slot.add(torch.ones(3, 4))
    exhaust(tape.backward(defer_weights=is_long))
    tape.weights.compute()
    assert done == ["narrow" if is_long else "wide"]


def test_recomputed_modules_defer_too():
    """A checkpointed part runs again in backward; its weight gradients wait with the others."""
    w, x = weights()[0], torch.randn(3, 4, dtype=torch.float64)
    tape = Tape(is_recording=True)

    def function(rows: torch.Tensor) -> torch.Tensor:
        def part(a: torch.Tensor) -> torch.Tensor:
            return linear(a.exp(), w, defer_weight_grad=weight_grad_deferral())
        return torch.utils.checkpoint.checkpoint(part, rows, use_reentrant=True).sin()

    (output,) = tape.run(function, tape.value(x))
    output.slot.add(torch.ones_like(output.tensor))
    exhaust(tape.backward(defer_weights=True))
    assert w.grad is None and len(tape.weights) == 1
    tape.weights.compute()
    torch.testing.assert_close(w.grad, torch.autograd.grad((x.exp() @ w.T).sin().sum(), w)[0])


class EngineLike(torch.nn.Linear):
    """Keeps its weight gradients in a queue until `backward_dw`, as Transformer Engine's modules do."""

    def __init__(self, is_delaying: bool) -> None:
        super().__init__(4, 4, bias=False)
        self.is_delaying, self.calls = is_delaying, 0

    def need_backward_dw(self) -> bool:
        return self.is_delaying

    def backward_dw(self) -> None:
        self.calls += 1


def test_modules_that_delay_by_themselves():
    delaying, other = EngineLike(True), EngineLike(False)
    modules = torch.nn.Sequential(delaying, other, torch.nn.SiLU())
    assert delaying_modules(modules, None) == [delaying]
    tape = Tape(is_recording=True)
    (output,) = tape.run(modules, tape.value(torch.ones(3, 4)), delaying=delaying_modules(modules))
    output.slot.add(torch.ones(3, 4))
    exhaust(tape.backward(defer_weights=True))
    assert (delaying.calls, other.calls) == (0, 0)
    tape.weights.compute()
    assert (delaying.calls, other.calls) == (1, 0)


# -- what hides behind what --------------------------------------------------------------------------


class Timed:
    """A stand-in stage of 8 layers in virtual time; a micro-batch computes for 48."""

    def __init__(self, duration: float, attention: Costs, experts: Costs) -> None:
        self.clock = VirtualClock()
        self.channel = Channel(self.clock, Loopback, duration)
        self.stage = TimedStage(8, attention, experts, self.clock, self.channel, SPLITS)
        self.communication = 2 * 2 * 8 * duration  # of a forward and a backward

    def forward(self, number: int) -> Any:
        return self.stage.forward_steps(number, torch.ones(3, 2))

    def backward(self, number: int, defer_weights: bool = False) -> Any:
        yield from self.stage.backward_steps(number, torch.ones(3, 2), defer_weights=defer_weights)
        if not defer_weights:
            self.stage.backward_weight(number)

    def time(self, *turns: Any) -> float:
        start = self.clock.now()
        take_turns(turns)
        return self.clock.now() - start


@pytest.mark.parametrize("is_backward_first", [True, False])
@pytest.mark.parametrize(("attention", "experts"), [
    (Costs(1, 1, 1), Costs(1, 1, 1)), (Costs(0.8, 1, 0.7), Costs(1.2, 1.1, 1.2)), (Costs(1.2, 1.3, 1.0),
                                                                                   Costs(0.8, 0.9, 0.8))])
@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_a_pair_takes_what_the_longer_of_compute_and_communication_takes(attention, experts, share, is_backward_first):
    timed = Timed(share * 48 / 32, attention, experts)
    assert timed.stage.compute_s == pytest.approx(48)
    alone = timed.time(timed.forward(0))
    pair = [timed.backward(0), timed.forward(1)]
    together = timed.time(*(pair if is_backward_first else reversed(pair)))
    longer = max(48, timed.communication)
    print(f"share {share}: {together / longer:.3f}")
    assert longer - 1e-9 <= together <= 1.15 * longer
    # One after the other nothing of the forward hides, and of the backward what its own weight gradients hide.
    alone += timed.time(timed.backward(1, defer_weights=True))
    start = timed.clock.now()
    timed.stage.backward_weight(1)
    alone += timed.clock.now() - start
    assert alone == pytest.approx(48 + timed.communication)


def test_weight_gradients_hide_a_transfer_of_their_own_pass():
    costs = Costs(1, 1, 1)
    timed = Timed(1.0, costs, costs)
    timed.time(timed.forward(0))
    # 16 segments of input gradients and of weight gradients, 16 transfers, each behind the weights of its segment;
    # the first one, of the combine, has none before it.
    assert timed.time(timed.backward(0)) == pytest.approx(33)
