"""Standard output and error of a command: no reader that has gone, full disk or odd encoding ends it in a traceback.

What a file holds can say nothing to a terminal, nor pass for a line of ours. `message` and `quoted` see to it: the
first for what is printed as an error, the second for a name or a value of a file. Control characters are escaped on the
way to stderr, and to stdout where that is a terminal.

Usage, at the end of a script:
    if __name__ == "__main__":
        run_command(main)
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

# 128 + SIGPIPE: what a shell says of a program whose reader has gone.
EXIT_READER_GONE = 141
EXIT_OUTPUT = 2
_ESCAPE = "dsv3-megatron-escape"
# Those of ASCII and of Latin-1, line and paragraph separators, and what turns the direction of writing.
_CONTROL_RANGES = "\\x00-\\x08\\x0b-\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069"
_CONTROLS = re.compile(f"[{_CONTROL_RANGES}\\t\\n\\r]")
_CONTROLS_IN_LINES = re.compile(f"[{_CONTROL_RANGES}\\r]")
_CONTROLS_ON_SCREEN = re.compile(f"[{_CONTROL_RANGES}]")  # progress bars go back to the beginning of their line
# What is called instead of ending the process when an output's reader has gone; the last one counts.
_when_reader_gone: list[Callable[[], None]] = []


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and end the process with its status.

    What an output's encoding does not have is escaped as JSON escapes it. When the reader of an output has gone
    (`| head -1`), the process ends with status 141 and without a word; when the result cannot be written (a full disk),
    with status 2 and the reason on stderr. What cannot be written to stderr is dropped: a command's work does not
    depend on its remarks.
    """
    prepare_streams()
    status: Any = 1
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except SystemExit as end:
                status = end.code
    sys.exit(status)


@contextlib.contextmanager
def reader_gone_calls(function: Callable[[], None]) -> Iterator[None]:
    """Have `function` called, once for each output, when its reader has gone, in place of the end of the process.

    For work that has to save something first, or that other processes wait for. What is written afterwards is dropped.
    """
    _when_reader_gone.append(function)
    try:
        yield
    finally:
        _when_reader_gone.remove(function)


def quoted(value: object) -> str:
    """A value as text of one line, in which every control character is escaped, as in \\x1b."""
    return _CONTROLS.sub(_escaped_control, str(value))


def message(value: object) -> str:
    """An error's text with its control characters escaped; lines behind its first begin with a space."""
    return "\n".join(line if not number or line[:1] in ("", " ", "\t") else f"  {line}"
                     for number, line in enumerate(_CONTROLS_IN_LINES.sub(_escaped_control, str(value)).split("\n")))


def print_error(error: object, behind: str = "") -> None:
    """Say on stderr what is wrong, as `message` has it.

    Args:
        error: The error, or its text.
        behind: Words of ours that follow it.
    """
    print(f"error: {message(error)}{behind}", file=sys.stderr, flush=True)


def _escaped_control(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


class _QuotedRecord(logging.LogRecord):
    """A log record whose arguments, which may be of files, are quoted; its format is ours."""

    def getMessage(self) -> str:
        if isinstance(self.args, tuple):
            self.args = tuple(quoted(value) if isinstance(value, str | BaseException | os.PathLike) else value
                              for value in self.args)
        return super().getMessage()


def prepare_streams() -> None:
    """Put this process's stdout and stderr behind what `run_command` promises."""
    codecs.register_error(_ESCAPE, _escaped)
    logging.setLogRecordFactory(_QuotedRecord)
    sys.stdout = _guarded(sys.stdout, is_result=True)
    sys.stderr = _guarded(sys.stderr, is_result=False)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    r"""A character as JSON escapes it: an e with an acute accent as \u00e9, one beyond 16 bits as two."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start:error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{text[i]:02x}{text[i + 1]:02x}" for i in range(0, len(text), 2)), error.end


def _guarded(stream: TextIO | None, *, is_result: bool) -> Any:
    if stream is None:  # closed by the caller (>&-): nothing is there to write to
        return stream
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: a test's or a notebook's
        return stream
    stream.flush()
    is_at_once = stream.line_buffering or getattr(stream, "write_through", False)
    raw = _Guarded(descriptor, is_result=is_result)
    kind = io.TextIOWrapper if is_result and not os.isatty(descriptor) else _Quoting
    return kind(io.BufferedWriter(raw), encoding=stream.encoding, errors=_ESCAPE,
                line_buffering=bool(is_at_once) or not is_result)


class _Quoting(io.TextIOWrapper):
    """A text stream for people, in which no control character but those that move within a line gets through."""

    def write(self, text: str) -> int:
        super().write(text if text.isprintable() else _CONTROLS_ON_SCREEN.sub(_escaped_control, text))
        return len(text)


class _Guarded(io.RawIOBase):
    """A file descriptor; once it has failed, what is written to it is dropped.

    SystemExit goes through every handler of errors on its way out, so that nobody takes a reader that has gone for
    another failure.
    """

    def __init__(self, descriptor: int, *, is_result: bool) -> None:
        self._descriptor, self._is_result = descriptor, is_result
        self._has_failed = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        content = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self._has_failed:
            return len(content)
        try:
            return os.write(self._descriptor, content)
        except BlockingIOError:  # somebody's terminal or pipe does not wait: wait for it here
            import select

            select.select([], [self._descriptor], [])
            return 0 if not len(content) else self.write(content)
        except OSError as error:
            self._has_failed = True
            if error.errno == errno.EPIPE and _when_reader_gone:
                _when_reader_gone[-1]()
                return len(content)
            if error.errno == errno.EPIPE:
                raise SystemExit(EXIT_READER_GONE) from None
            if not self._is_result:
                return len(content)
            print(f"error: standard output cannot be written: {error.strerror}; give it another place", file=sys.stderr)
            raise SystemExit(EXIT_OUTPUT) from None
