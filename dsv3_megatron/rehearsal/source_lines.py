"""Which line of the library an operation comes from: the innermost one on the stack."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

import torch

import dsv3_megatron

_PACKAGE = os.path.dirname(os.path.abspath(dsv3_megatron.__file__)) + os.sep
_KERNELS = os.path.join(os.path.dirname(_PACKAGE.rstrip(os.sep)), "kernels") + os.sep
_OWN = os.path.join(_PACKAGE, "rehearsal") + os.sep
_names: dict[CodeType, str | None] = {}


def _name(code: CodeType) -> str | None:
    """File of the library, relative to the package; None for other code and the rehearsal's own."""
    if code not in _names:
        path = os.path.abspath(code.co_filename)
        if path.startswith(_OWN):
            _names[code] = None
        elif path.startswith(_PACKAGE):
            _names[code] = path[len(_PACKAGE):]
        else:
            _names[code] = "kernels" + os.sep + path[len(_KERNELS):] if path.startswith(_KERNELS) else None
    return _names[code]


def source_line() -> str:
    """Line of the library that is at work, as "model/router.py:160".

    In a backward pass that torch itself carries out no line of the library is: then the name of its step, as
    "backward of MmBackward0".
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _name(frame.f_code)
        if name is not None:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return f"backward of {node.name()}" if node is not None else "outside the library"


def line_of(code: CodeType, number: int) -> str | None:
    """A line of the library's code, as `source_line` names it; None for other code."""
    name = _name(code)
    return None if name is None else f"{name}:{number}"
