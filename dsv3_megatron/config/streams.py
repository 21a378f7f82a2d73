"""Standard output and error of a command: no reader that has gone, full disk or odd encoding ends it in a traceback.

Usage, at the end of a script:
    if __name__ == "__main__":
        run_command(main)
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

# 128 + SIGPIPE: what a shell says of a program whose reader has gone.
EXIT_READER_GONE = 141
EXIT_OUTPUT = 2
_ESCAPE = "dsv3-megatron-escape"
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


def prepare_streams() -> None:
    """Put this process's stdout and stderr behind what `run_command` promises."""
    codecs.register_error(_ESCAPE, _escaped)
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
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=_ESCAPE,
                            line_buffering=bool(is_at_once) or not is_result)


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
