"""What the ranks of a run must agree on while they save or load: one answer, one error, one folder, enough disk.

An action of rank 0 alone must not leave the others waiting when it fails, and an error of one rank must
be told by all, with its reason.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError, DamagedCheckpointError

# Seconds a folder made by one node may take to be seen by another (attribute caches of network file systems).
_FOLDER_VISIBLE_S = 60.0
# Disk space beyond the tensors themselves: headers, metadata.
_OVERHEAD = 1.05
_FREE_SPACE = "free some space, lower keep_last, or choose another folder"


def on_first_rank[T](action: Callable[[], T], subject: str) -> T:
    """Run `action` on rank 0 while the others wait; its result, or its error, on every rank."""
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = action()
        except DamagedCheckpointError as error:
            answer[1], failure = error, error
        except CheckpointError as error:
            answer[1], failure = str(error), error
        except OSError as error:
            answer[1], failure = f"{subject}: {why(error)}", error
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer; raised below
            answer[1], failure = f"{subject}: {type(error).__name__}: {error}", error
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[1], DamagedCheckpointError):
        raise answer[1] from failure
    if answer[1] is not None:
        raise CheckpointError(answer[1]) from failure
    return answer[0]


def why(error: OSError) -> str:
    """What went wrong with which file, and the way out if the disk is full."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}" + _way_out(f"[Errno {error.errno}]")


def with_way_out(text: str) -> str:
    """A message with the way out at its end if it says that the disk is full."""
    return text + _way_out(text)


def _way_out(text: str) -> str:
    is_full = any(f"[Errno {number}]" in text for number in (errno.ENOSPC, errno.EDQUOT)) and _FREE_SPACE not in text
    return f": {_FREE_SPACE}" if is_full else ""


def from_all_ranks(reasons: list[str], otherwise: str) -> str:
    """The reasons that any rank has, with its number."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, reasons)
    text = "; ".join(f"process {rank}: {mine[0]}" for rank, mine in enumerate(gathered) if mine) or otherwise
    return text + _way_out(text)


def sum_over_ranks(number: int) -> int:
    """The sum of what every rank gives; called by every rank."""
    # Where collectives take their tensors: the CPU in a run without CUDA (platform/cpu.py).
    total = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total.item())


def check_space(directory: str | Path, my_bytes: int) -> None:
    """Raise on every rank if the disk has not the room for what all of them will write, before any of it is written.

    Args:
        directory: Folder that all ranks write to; need not exist.
        my_bytes: Bytes that this rank adds.
    """
    needed = int(sum_over_ranks(my_bytes) * _OVERHEAD)

    def check() -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"save={directory}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free "
                "some, lower keep_last, or choose another folder")

    on_first_rank(check, f"save={directory}")


def wait_for_folder(target: Path) -> None:
    """Raise on every rank if some rank does not see the folder that rank 0 made."""
    deadline = time.monotonic() + _FOLDER_VISIBLE_S
    while not target.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    num_blind = sum_over_ranks(int(not target.is_dir()))
    if num_blind:
        raise CheckpointError(
            f"save={target.parent}: {num_blind} of {torch.distributed.get_world_size()} processes do not see this "
            "folder; choose one on a file system that all nodes share")
