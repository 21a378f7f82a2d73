"""A file in a folder that says which process uses it, so that two runs do not delete each other's files. No torch.

The file appears all at once under its name or not at all (a hard link, where the file system has them), which holds on
network file systems too; no lock of the operating system is relied upon. It names the run, the machine and the process,
and its holder touches it every BEAT_S seconds. One whose process is gone from the same machine is stale at once; one
of another machine, when nobody has touched it for STALE_S seconds while this process looked on, whatever the machines'
clocks say. Whoever finds a stale one takes it over and says so; a holder that was taken for gone finds that out before
it writes a checkpoint (`RunLock.check`).
"""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.config.json_files import parse_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.process.elastic import elastic_launch
from dsv3_megatron.process.stop import shutdown_timeout_s

BEAT_S, STALE_S = 10.0, 120.0
# Older than this by the file system's own clock, a lock is stale without being watched.
_ABANDONED_S = 3600.0
# An earlier start of the same launch ends by itself: so long after SHUTDOWN_TIMEOUT, or after so many touches left out.
_EARLIER_S, _EARLIER_BEATS = 15.0, 3
_POLL_S = 0.5
_WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        run: Identity of the run.
        host: Name of the machine.
        processes: Which table of processes `pid` is of: the machine since its start, and the container.
        pid: Process id.
        began: Start of that process, as the kernel counts it; None where the kernel does not say.
        since: Time at which the lock was taken, as text.
        token: Random mark of this lock alone.
        launch: Name of the launch whose nodes come and go that the process is of (`process/elastic.py`); empty: none.
    """

    run: str
    host: str
    processes: str
    pid: int
    began: str | None
    since: str
    token: str
    launch: str = ""

    def __str__(self) -> str:
        return f"run {self.run}, process {self.pid} on {self.host} since {self.since}"


def process_table() -> str:
    """A text that two processes share exactly if each can look for the other by its process id."""
    parts = [os.uname().nodename]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.stat("/proc/self/ns/pid").st_ino)]
    except OSError:
        parts.append("unknown")
    return " ".join(parts)


def process_began(pid: int) -> str | None:
    """Start of a process, in the kernel's ticks since the machine's start; None if it is gone or cannot be asked."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_running(pid: int, began: str | None) -> bool:
    """Whether the process that had this id and this beginning is there; one that has ended and is not collected isn't.
    """
    if Path("/proc/self/stat").exists():
        now = process_began(pid)
        return now is not None and began in (None, now)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class RunLock:
    """A lock file in a folder of a run.

    Args:
        path: The file; its folder exists when it is taken.
        run: Identity of the run that wants it.
        subject: The setting and the folder, for messages: "save=checkpoints".
        stale_s: Seconds without a touch after which a lock of another machine is stale.
    """

    def __init__(self, path: Path, run: str, subject: str, *, stale_s: float = STALE_S) -> None:
        self.path, self._subject, self._stale_s = path, subject, stale_s
        pid = os.getpid()
        self._me = Holder(run, os.uname().nodename, process_table(), pid, process_began(pid),
                          datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex, elastic_launch() or "")

    def refuse_if_held(self) -> None:
        """Raise if a process of this machine holds the lock; nothing is changed, and other machines are not waited for.

        Raises:
            CheckpointError: one does.
        """
        content = self._read()
        holder = _parse(content) if content is not None else None
        if holder is not None and not self._is_me(holder) and holder.processes == self._me.processes \
                and not self._is_of_my_launch(holder) and is_running(holder.pid, holder.began):
            raise CheckpointError(self._in_use(str(holder)))

    def take(self) -> str | None:
        """Take the lock, a stale one too; may wait STALE_S seconds for a sign of life from another machine.

        Returns:
            What is to be said of a stale lock that was taken over; None if there was none.

        Raises:
            CheckpointError: another process holds it.
            OSError: the file cannot be written.
        """
        note = None
        while not self._create():
            content = self._read()
            if content is None:
                continue  # released meanwhile
            holder = _parse(content)
            if holder is not None and self._is_me(holder):
                self._put()
                return note
            why = self._why_stale(content, holder)
            if self._set_aside(content):
                whose = str(holder) if holder else "a process that it does not name"
                note = f"{self._subject}: the lock of {whose} is stale ({why}): taken over"
        return note

    def touch(self) -> None:
        """A sign of life; that it cannot be given is no reason to stop."""
        try:
            if self._is_mine(self._read()):
                os.utime(self.path)
        except OSError as error:
            logger.debug("%s: no sign of life: %s", self.path, error)

    def check(self) -> None:
        """Make sure that the lock is still this process's; one that somebody has removed is taken again.

        Raises:
            CheckpointError: another process has it.
        """
        content = self._read()
        if self._is_mine(content) or (content is None and self._create()):
            return
        who = _parse(content or self._read() or b"") or "another process"
        raise CheckpointError(f"{self._subject} is no longer this run's: {who} has taken the lock {self.path} over, "
                              "which it does where it finds no sign of life; nothing more is written there")

    def release(self) -> None:
        """Let another process have the file; a lock that is not this process's stays."""
        try:
            if self._is_mine(self._read()):
                self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", self.path, error.strerror)

    # ---- parts ---------------------------------------------------------------------------------------

    def _is_mine(self, content: bytes | None) -> bool:
        holder = _parse(content) if content is not None else None
        return holder is not None and holder.token == self._me.token

    def _is_me(self, holder: Holder) -> bool:
        return (holder.processes, holder.pid, holder.began) == (self._me.processes, self._me.pid, self._me.began)

    def _is_of_my_launch(self, holder: Holder) -> bool:
        """Whether the lock is of an earlier start of this launch, which ends before the next one begins."""
        return bool(self._me.launch) and holder.launch == self._me.launch

    def _in_use(self, who: str) -> str:
        return (f"{self._subject} is in use by {who} (lock {self.path}): two runs in one folder would delete each "
                "other's files; wait for it to end, stop it, or choose another folder")

    def _why_stale(self, content: bytes, holder: Holder | None) -> str:
        """Why a lock is stale.

        Raises:
            CheckpointError: the lock is not stale.
        """
        if holder is not None and holder.processes == self._me.processes:
            deadline = time.monotonic() + (shutdown_timeout_s() + _EARLIER_S if self._is_of_my_launch(holder) else 0)
            while is_running(holder.pid, holder.began):
                if time.monotonic() > deadline:
                    raise CheckpointError(self._in_use(str(holder)))
                time.sleep(_POLL_S)
            return "that process is gone"
        stale_s = self._stale_s
        if holder is not None and self._is_of_my_launch(holder):
            stale_s = min(stale_s, _EARLIER_BEATS * BEAT_S)
        who = str(holder) if holder else "a process that it does not name"
        first, looked_since = self._last_touch(), time.monotonic()
        if first is not None and self._now() - first > _ABANDONED_S:
            return f"no sign of life for {self._now() - first:.0f} s"
        logger.info("%s: there is a lock of %s: looking for a sign of life for up to %g s", self._subject, who,
                    stale_s)
        while time.monotonic() - looked_since < stale_s:
            time.sleep(min(_POLL_S, stale_s))
            if self._read() != content:
                return "it was let go or taken meanwhile"
            if self._last_touch() != first:
                raise CheckpointError(self._in_use(who))
        return f"no sign of life for {stale_s:g} s"

    def _last_touch(self) -> float | None:
        """Time of the last touch; opened, so that a network file system asks its server."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    def _now(self) -> float:
        """The time by the file system's clock."""
        probe = self._partial()
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{self._me.token}.{uuid.uuid4().hex[:8]}")

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _put(self) -> None:
        """Write the lock, whatever was there."""
        partial = self._partial()
        partial.write_text(json_text(asdict(self._me)) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def _create(self) -> bool:
        """Write the lock if there is none; whether there was none."""
        partial = self._partial()
        text = json_text(asdict(self._me)) + "\n"
        try:
            partial.write_text(text, encoding="utf-8")
            try:
                os.link(partial, self.path)
            except FileExistsError:
                # A network file system may do it and lose the answer.
                return partial.stat().st_nlink == 2
            except OSError as error:
                if error.errno not in _WITHOUT_LINKS:
                    raise
                return self._create_exclusively(text)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _create_exclusively(self, text: str) -> bool:
        """Create the file without links: who reads it before it is written does not learn whose it is, and waits."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _set_aside(self, content: bytes) -> bool:
        """Remove a lock with this content, and no other that has taken its place meanwhile."""
        aside = self._partial()
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        try:
            if aside.read_bytes() == content:
                return True
            os.link(aside, self.path)
        except OSError as error:
            logger.warning("%s: a lock that was not stale could not be put back: %s", self.path, error)
        finally:
            aside.unlink(missing_ok=True)
        return False


def _parse(content: bytes) -> Holder | None:
    """Who holds a lock with this content; None if it does not say."""
    try:
        return Holder(**parse_json(content))
    except (ValueError, TypeError):
        return None
