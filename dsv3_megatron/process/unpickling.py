"""The one place that unpickles. A pickle can run any code: what it may name is listed, or this process had it written.

No other module calls pickle's readers or torch.load; a test holds it (tests/unit/test_unpickling.py).

    load_listed    files of others: nothing is made but what a list names
    load_tensors   files of others that torch.save wrote: tensors and plain values
    load_own       files that a child of this process has just written into a folder of its own
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

UnpicklingError = pickle.UnpicklingError


def load_listed(stream: IO[bytes], is_allowed: Callable[[str, str], bool], what: str) -> Any:
    """Unpickle a file of others, of which nothing is made but what is allowed.

    Args:
        stream: The file.
        is_allowed: Says of a module's name and a name in it whether the pickle may use it.
        what: What the file is, for the message.

    Raises:
        UnpicklingError: the pickle names something else, or is damaged.
    """
    class Listed(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # A name with dots leads on into what it names.
            if "." in name or not is_allowed(module, name):
                raise pickle.UnpicklingError(f"it names {module}.{name}, which no {what} has")
            return super().find_class(module, name)

        def persistent_load(self, pid: Any) -> Any:
            raise pickle.UnpicklingError(f"it refers to something outside of it, which no {what} does")

    return Listed(stream).load()


def load_tensors(stream: Any) -> Any:
    """Read what `torch.save` wrote, of which nothing is made but tensors and plain values; on the host.

    Args:
        stream: The file, or a part of it, opened for reading and seeking.

    Raises:
        UnpicklingError: the file names something else.
        RuntimeError: the file is damaged.
    """
    import torch

    return torch.load(stream, map_location="cpu", weights_only=True)


def load_own(path: Path) -> Any:
    """Read what a child of this process has just written into a folder that this process made.

    Raises:
        OSError: the file cannot be read.
    """
    return pickle.loads(path.read_bytes())
