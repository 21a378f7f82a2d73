"""Operations that a GPU would be given, noted on tensors without values or memory. Autograd's engine needs a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.platform import cpu


class OperationLog(TorchDispatchMode):
    """Notes each operation's name, "addmm.dtype_out" for example, and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Carry out an operation and note it."""
        out = func(*args, **(kwargs or {}))
        self.noted.append((str(func).removeprefix("aten."), out))
        return out

    def dtypes(self, name: str) -> list[torch.dtype]:
        """The dtypes that the operations of a name gave, in order."""
        return [out.dtype for noted, out in self.noted if noted == name]


@contextlib.contextmanager
def noted_on_a_gpu() -> Iterator[OperationLog]:
    """Tensors of device "cuda" can be made inside the block, which otherwise would be the CPU's or refused."""
    was_installed = cpu.installed()
    cpu.remove_stand_ins()
    try:
        with FakeTensorMode(), OperationLog() as log:
            yield log
    finally:
        if was_installed:
            cpu.install_stand_ins()
