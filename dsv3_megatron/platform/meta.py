"""Modules without memory: a model of any size built on torch's meta device, to be counted or inspected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def meta_device() -> Iterator[torch.device]:
    """Create every tensor on the meta device inside the block, those that name the current CUDA device too.

    Megatron-Core's layers pass `device=torch.cuda.current_device()` to their factories, which goes before
    torch's default device, so `with torch.device("meta")` alone would allocate. Inside the block
    `torch.cuda.current_device()` is the meta device; after it, whatever it was before.
    """
    meta = torch.device("meta")
    original = torch.cuda.current_device
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment, return-value]
    try:
        with meta:
            yield meta
    finally:
        torch.cuda.current_device = original
