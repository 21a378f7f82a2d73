"""Bytes that are alive, and the most: compared with sums written by hand."""

from __future__ import annotations

import torch

from dsv3_megatron.rehearsal.live_memory import Label, LiveMemory, block
from dsv3_megatron.rehearsal.watch import Watch, fake_mode

GPU = torch.device("cuda", 0)


def test_a_block_is_of_512_bytes() -> None:
    assert [block(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_tensors_come_and_go_and_views_are_no_memory_of_their_own() -> None:
    with fake_mode(), Watch() as watch:
        kept = torch.empty(256, device=GPU)  # 1024 bytes
        view = kept.view(16, 16)
        gone = torch.empty(100, device=GPU)  # 400 bytes, 512 in blocks
        del gone
        assert watch.memory.total_at(watch.memory.now) == 1024
        peak = watch.memory.peak(0, watch.memory.now)
        assert (peak.num_bytes, peak.allocated) == (1424, 1536)
        del kept
        assert watch.memory.total_at(watch.memory.now) == 1024, "the view holds it"
        del view
        assert watch.memory.total_at(watch.memory.now) == 0


def test_what_a_step_leaves_counts_from_its_beginning() -> None:
    """A first step makes the optimizer's state at its end; the peak wanted is that of the second."""
    with fake_mode(), Watch() as watch:
        weights = torch.empty(256, device=GPU)
        start = watch.memory.now
        passes = torch.empty(512, device=GPU)
        del passes
        state = torch.empty(1024, device=GPU)
        watch.memory.name(weights, "parameters")
        watch.memory.name(state, "optimizer")
        peak = watch.memory.peak(start, watch.memory.now)
    assert peak.num_bytes == 4 * (256 + 512 + 1024)
    by_component = {label.component: size for label, size in peak.by_label.items()}
    assert by_component == {"parameters": 1024, "optimizer": 4096, "working": 2048}
    assert peak.at.operation == "empty"


def test_a_moment_without_anything_has_a_peak_of_nothing() -> None:
    peak = LiveMemory().peak(0, 0)
    assert peak.num_bytes == 0 and peak.by_label == {} and peak.at == Label("", "", "")


def test_what_a_pass_made_is_kept_once_the_next_begins_and_what_is_received_is_on_its_way_before() -> None:
    with fake_mode(), Watch() as watch:
        memory, start = watch.memory, watch.memory.now
        received = torch.empty(16, device=GPU)
        memory.receive(received)
        memory.begin_pass()
        kept = torch.empty(256, device=GPU)
        memory.arrived(received)
        memory.begin_pass()
        work, later = torch.empty(512, device=GPU), torch.empty(32, device=GPU)
        memory.receive(later)
        moments = [memory.peak(start, end, is_repeated=False) for end in (1, 2, memory.now)]
        assert len(kept) + len(work) + len(later) == 800
    by_component = [{label.component: size for label, size in peak.by_label.items()} for peak in moments]
    assert by_component[:2] == [{"communication": 64}, {"communication": 64, "working": 1024}]
    assert by_component[2] == {"activations": 64 + 1024, "working": 2048, "communication": 128}


def test_what_is_sent_is_on_its_way_from_then_on() -> None:
    with fake_mode(), Watch() as watch:
        memory = watch.memory
        memory.begin_pass()
        output = torch.empty(256, device=GPU)
        before = memory.peak(0, memory.now, is_repeated=False)
        memory.sent(output)
        memory.begin_pass()
        later = torch.empty(16, device=GPU)
        after = memory.peak(0, memory.now, is_repeated=False)
        assert len(output) + len(later) == 272
    assert [{label.component: size for label, size in peak.by_label.items()} for peak in (before, after)] == [
        {"working": 1024}, {"communication": 1024, "working": 64}]


def test_a_peak_that_is_not_repeated_takes_nothing_from_later() -> None:
    with fake_mode(), Watch() as watch:
        old = torch.empty(256, device=GPU)
        start = watch.memory.now
        passing = torch.empty(512, device=GPU)
        del passing, old
        state = torch.empty(128, device=GPU)
        peak = watch.memory.peak(start, watch.memory.now, is_repeated=False)
        assert (peak.num_bytes, sum(peak.by_label.values())) == (4 * (256 + 512), 4 * (256 + 512))
        assert watch.memory.peak(start, watch.memory.now).num_bytes == 4 * (512 + 128) and len(state)
