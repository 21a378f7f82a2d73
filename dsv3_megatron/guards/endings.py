"""How a run's end is told to what started it: a code through torchrun, and a file beside the checkpoints.

torchrun ends with 1 whatever its workers end with. A launcher that wants to know more names a file in EXIT_CODE_FILE,
into which the first process with a code of its own writes it. What starts a run on many nodes cannot rely on any one
node's code; it looks for ENDED_FILE in the folder of checkpoints, which a guard's end leaves there and the next start
takes away. Where nodes come and go, torchrun starts processes again whatever they end with: only what the next start
would meet again is told, and ends torchrun too.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dsv3_megatron.process.elastic import elastic_launch, end_agent

EXIT_CODE_FILE = "DSV3_EXIT_CODE_FILE"
ENDED_FILE = "ended-by-guard.txt"

# A wrong setting, and a guard's end (guards/decisions.py): the next start would end the same way.
_FINAL = (2, 3)

logger = logging.getLogger(__name__)


def tell_launcher(code: int) -> int:
    """Write this process's exit code where the launcher looks for it; the first process to do so is heard.

    Returns:
        The code.
    """
    if code in _FINAL or not elastic_launch():
        _write_code(code)
        end_agent()  # where nodes come and go; nothing otherwise
    return code


def _write_code(code: int) -> None:
    path = os.environ.get(EXIT_CODE_FILE)
    if path:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return
        except OSError as error:
            logger.warning("exit code %d cannot be told to the launcher: %s: %s", code, path, error.strerror)
            return
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{code}\n")


def launcher_listens() -> bool:
    """Whether a launcher has named a file for codes that torchrun does not pass on."""
    return bool(os.environ.get(EXIT_CODE_FILE))


def mark_ended(save: str, text: str) -> None:
    """Leave a guard's reason for ending the run in its folder of checkpoints; that it cannot be is only said."""
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
        (Path(save) / ENDED_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s", Path(save) / ENDED_FILE, error.strerror)


def forget_ended(save: str) -> None:
    """Take away what a guard's end left in the folder of checkpoints: the run goes on."""
    try:
        (Path(save) / ENDED_FILE).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", Path(save) / ENDED_FILE, error.strerror)
