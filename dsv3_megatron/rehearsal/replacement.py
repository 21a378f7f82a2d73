"""One thing that is replaced during a rehearsal, and the block in which it is."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replacement:
    """An attribute that is replaced during a rehearsal.

    Attributes:
        owner: The object that has it; or the name of its module, imported when it is replaced.
        name: The attribute.
        make: Makes the replacement from the original.
        reason: What the original does that a rehearsal cannot.
        is_everywhere: Whether other modules of the library have imported it by name: replaced there too.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    reason: str
    is_everywhere: bool = False


@contextlib.contextmanager
def replaced(table: tuple[Replacement, ...]) -> Iterator[None]:
    """Replace everything in a table inside the block."""
    with contextlib.ExitStack() as stack:
        for item in table:
            owner = _owner(item.owner) if isinstance(item.owner, str) else item.owner
            original = getattr(owner, item.name)
            replacement = item.make(original)
            places = [owner]
            if item.is_everywhere:
                places = [module for name, module in list(sys.modules.items())
                          if name.startswith("dsv3_megatron") and getattr(module, item.name, None) is original]
            for place in places:
                stack.callback(setattr, place, item.name, original)
                setattr(place, item.name, replacement)
        yield


def _owner(name: str) -> Any:
    """A module, or a class in one, by its dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in place of what a rehearsal has no use for."""
