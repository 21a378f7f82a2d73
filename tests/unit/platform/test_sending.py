"""platform/sending.py: the numbers are those that were given, and a GPU's copy is one that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.platform.sending import send_integers


@pytest.mark.parametrize("numbers", [[3, 0, 5], np.array([[1, 2], [3, 4]]), [], np.zeros((0, 3), dtype=np.int64)])
def test_numbers_arrive(numbers: Any) -> None:
    for dtype in (torch.int32, torch.int64):
        sent = send_integers(numbers, torch.device("cpu"), dtype)
        assert sent.dtype == dtype and sent.tolist() == np.asarray(numbers).tolist()


def test_the_host_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calls: not run on a GPU."""
    calls: list[tuple[str, Any]] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(("pin_memory", tensor.tolist()))
        return tensor

    def moved(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append((str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    send_integers([1, 2], torch.device("cuda", 0))
    assert calls == [("pin_memory", [1, 2]), ("cuda:0", True)]
