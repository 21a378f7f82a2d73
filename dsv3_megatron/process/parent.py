"""Processes that a process starts: where they find this package, and their end when it has ended, however it did."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["end_with_parent", "environment_of_child", "freeze_before_forks", "stop_with_parent"]

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def environment_of_child() -> dict[str, str]:
    """This process's environment variables, with which another Python process imports this same package.

    This package may be a checkout that nothing but the first process's working folder led to.
    """
    path = filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def freeze_before_forks() -> None:
    """Take what is there now, mostly imported modules, out of garbage collection: forked processes share it untouched.

    At the end of this process it is collected again; libraries that look then would call it leaked.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent is gone: by the kernel on Linux, elsewhere by a thread that looks.

    Args:
        parent: Process id of the parent, which may have ended already; None: whoever it is now.
    """
    parent = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_look_after, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def stop_with_parent(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """What has the kernel send a signal to a program once the thread that started it is gone: `Popen(preexec_fn=...)`.

    Args:
        number: The signal.

    Returns:
        The function; None where the kernel cannot be asked (not Linux), and the program goes on.
    """
    if sys.platform != "linux":
        return None
    library, parent = ctypes.CDLL(None), os.getpid()  # loaded here: between fork and exec nothing should be

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)
