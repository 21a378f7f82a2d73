"""One process of a run, from its device to its exit code, whatever it does: training, evaluation, generation.

Exit codes: 0 done, 2 a setting or an input is wrong, 1 any other error; a guard, a hung rank and a signal have their
own (`guards/endings.py`, `process/stop.py`).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.data.checksums import DamagedFileError
from dsv3_megatron.process.elastic import EXIT_AGAIN, elastic_launch
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.process.stop import StopListener, Stopped

EXIT_CONFIG = 2
# Ranks that fail because another one did wait this long, so that the first error is printed first.
_SECONDS_AFTER_LOST_PEER = 5.0


def prepare_rank() -> None:
    """Choose the device and set the process up for it; to be called before anything imports Megatron-Core."""
    from dsv3_megatron.ops.host_memory import keep_freed_memory
    from dsv3_megatron.platform import prepare

    # On a GPU torch keeps the memory of its tensors itself; on a CPU the C library gives it back after every step.
    if not prepare().is_cuda:
        keep_freed_memory()


def refuse(text: str) -> int:
    """Say what is wrong with a command, before it has begun; returns the exit code.

    Of processes that wait for each other, who meets it says it with rank and host, and tells the others.
    """
    try:
        say_error(text, Processes.from_environment())
    except ConfigError:  # of the variables: that is another error, and this one comes first
        print_error(text)
    return EXIT_CONFIG


def say_error(text: str, processes: Processes, *, tells: bool = True) -> None:
    """Print an error of this process; of a run's, with rank and host, once for all ranks that meet the same."""
    if processes.world_size == 1 or processes.address is None:
        print_error(text)
        return
    if not processes.address:  # no others can be met; rank 0 may stand for all, to look at a layout
        print_error(text, f" ({processes.place})" if processes.rank else "")
        return
    from dsv3_megatron.parallel.roll_call import say_once

    say_once(text, processes, tells=tells)


def end_of(work: Callable[[], int]) -> int:
    """The exit code of a process's work; that of a stop, with a line, where a signal ended it."""
    try:
        return work()
    except Stopped as stop:
        from dsv3_megatron.guards.endings import tell_launcher

        tell_launcher(stop.exit_code)
        sys.stdout.flush()
        place = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{place}{stop}", file=sys.stderr, flush=True)
        if "torch.distributed" in sys.modules:
            os._exit(stop.exit_code)  # threads of collectives that nobody will finish
        return stop.exit_code


def check_and_run[Checked](check: Callable[[Processes], Checked], work: Callable[[int, Checked], int], *, left: str
                            ) -> int:
    """Check what is asked of this process, then do it, from the launch's variables to the exit code.

    Args:
        check: Says of a request what is to be done, given the processes of the launch; raises ValueError for what is
            wrong with it. Nothing is allocated yet.
        work: Function that does it, given this process's rank; its result is the exit code (`run_rank`).
        left: What a signal leaves behind, for the line that says so.

    Returns:
        Exit code: 0 done, 2 something that was asked for is wrong, 128 and the number of a signal that asked to stop;
        any other error ends the process.
    """
    def checked_work() -> int:
        processes = Processes()
        try:
            processes = Processes.from_environment()
            checked = check(processes)
        except ValueError as error:
            say_error(str(error), processes)
            return EXIT_CONFIG
        return run_rank(processes.rank, lambda: work(processes.rank, checked))

    with StopListener(left):
        return end_of(checked_work)


def run_rank(rank: int, work: Callable[[], int]) -> int:
    """Do one process's work; of an error that several processes meet, show the first and end them all.

    Returns:
        Exit code: what `work` returned, or 2 for a setting or an input that is wrong, printed by a rank that met it.
        The launcher is told one that is not 0.
    """
    from dsv3_megatron.guards.endings import tell_launcher
    from dsv3_megatron.parallel.roll_call import PeerError

    try:
        code = work()
        return tell_launcher(code) if code else 0
    except (ConfigError, DamagedFileError) as error:
        import torch

        say_error(str(error), Processes.from_environment(), tells=not torch.distributed.is_initialized())
        return tell_launcher(EXIT_CONFIG)
    except PeerError as error:
        # Whoever met it has said it; under torchrun on this host too.
        if not Processes.from_environment().has_agent:
            print(f"rank {rank}: ends, {error}", file=sys.stderr, flush=True)
        if elastic_launch():
            return EXIT_AGAIN  # the next start may be without that process's node
        return tell_launcher(EXIT_CONFIG)
    except SystemExit as end:  # an output cannot be written: other ranks wait in a collective, so nothing is tidied up
        os._exit(end.code if isinstance(end.code, int) else 1)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is printed and ends the process
        if _is_lost_peer(error):
            time.sleep(_SECONDS_AFTER_LOST_PEER)
            print(f"rank {rank}: stopped because another rank did ({type(error).__name__})", file=sys.stderr)
            os._exit(1)  # not by an exception: it would wait for threads of collectives that nobody will finish
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    # A failed collective has no error class of its own in torch; only its text tells a lost peer from another error.
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed by peer", "connection reset by peer", "broken pipe",
                                         "socket closed", "nccl remote error", "connection refused"))
