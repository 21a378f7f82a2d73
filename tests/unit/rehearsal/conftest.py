"""A rehearsal's tensors are a GPU's: what lets Megatron-Core run on a CPU would take them for the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv3_megatron.platform import cpu


@pytest.fixture(autouse=True)
def without_stand_ins() -> Iterator[None]:
    was_installed = cpu.installed()
    cpu.remove_stand_ins()
    yield
    if was_installed:
        cpu.install_stand_ins()
