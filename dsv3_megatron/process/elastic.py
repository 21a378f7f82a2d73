"""A run whose nodes come and go: what its launcher tells its processes, and what they tell torchrun.

The launcher (examples/pretrain_dsv3.sh with NNODES=MIN:MAX) sets ELASTIC for its processes. torchrun starts all of them
again where one has failed, and where a node has come. A process that ends with 0 has ended the run for torchrun, so
that one which only makes way for the next start ends with EXIT_AGAIN; one whose error the next start would meet again
ends its torchrun too.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Set by the launcher: the name of this launch, the same on all its nodes; and a file that is there once somebody asked
# this launcher, not torchrun, to stop.
ELASTIC, STOP_FILE = "DSV3_ELASTIC", "DSV3_STOP_FILE"
# Exit code of the launcher, in place of 0, where a run was stopped by a signal before it was complete.
STOPPED_CODE = "DSV3_STOPPED_CODE"
# Ends a process that makes way for the next start (EX_TEMPFAIL).
EXIT_AGAIN = 75


def elastic_launch() -> str | None:
    """Name of the launch whose nodes come and go; None: this process's nodes stay."""
    return os.environ.get(ELASTIC) or None


def is_told_to_stop() -> bool:
    """Whether this node's launcher was asked to stop, so that what runs here ends for good."""
    path = os.environ.get(STOP_FILE)
    return bool(path) and Path(str(path)).exists()


def stopped_code() -> int:
    """Exit code of a process whose run was stopped by a signal, has saved, and is not complete.

    torchrun signals its processes before it starts them again with other nodes, which is no end of the run. Of other
    runs 0, or what STOPPED_CODE says, for who starts a run again unless it ended with 0 (Kubernetes).
    """
    if elastic_launch():
        return 0 if is_told_to_stop() else EXIT_AGAIN
    code = os.environ.get(STOPPED_CODE, "0")
    return int(code) if code.isascii() and code.isdigit() and int(code) < 256 else 0


def end_agent() -> None:
    """End the torchrun that started this process, which would start it again; of other processes nothing happens."""
    if elastic_launch() and "TORCHELASTIC_RUN_ID" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
