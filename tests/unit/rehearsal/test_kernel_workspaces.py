"""What kernels take for themselves, and that it is part of a peak and gone after it."""

from __future__ import annotations

import torch

from dsv3_megatron.rehearsal.kernel_workspaces import workspace_bytes
from dsv3_megatron.rehearsal.live_memory import LiveMemory

BACKWARD = "_scaled_dot_product_flash_attention_backward"


def test_the_gradient_of_the_queries_is_summed_in_fp32() -> None:
    query = torch.empty(2, 3, 200, 192, device="meta")
    assert workspace_bytes(BACKWARD, (query, query)) == 4 * 2 * 3 * 256 * (192 + 1)
    narrow = torch.empty(1, 1, 128, 72, device="meta")
    assert workspace_bytes(BACKWARD, (narrow, narrow)) == 4 * 128 * (96 + 1)


def test_other_operations_have_none() -> None:
    assert workspace_bytes("mm", (torch.empty(2, 2), torch.empty(2, 2))) == 0


def test_a_pulse_is_in_the_peak_alone() -> None:
    memory = LiveMemory()
    memory.pulse(1000, "inside a kernel")
    assert memory.peak(0, memory.now).num_bytes == 1000
    assert memory.total_at(memory.now) == 0
