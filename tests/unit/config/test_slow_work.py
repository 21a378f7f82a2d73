"""The bar of slow work: nothing for what is quick or has no terminal, and seconds that go on for what is slow."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import termios
import threading
import time
from typing import Any

import pytest

from dsv3_megatron.config import slow_work as module
from dsv3_megatron.config.slow_work import bar_width, slow_work


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def give_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Have a terminal as stderr; no fixture: pytest puts its own there when a test's call begins."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DELAY_S", 0.05)
    monkeypatch.setattr(module, "_TICK_S", 0.02)


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    with slow_work("verify", total=10, unit="B") as work:
        work.add(10)
        time.sleep(0.05)
    assert "verify" not in terminal.getvalue()


def test_where_there_is_no_terminal_only_lines_are_printed(capsys: pytest.CaptureFixture[str],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    with slow_work("verify", total=10) as work:
        work.add(3)
        work.reach(5)
        time.sleep(0.2)
        work.say("half")
    assert capsys.readouterr().err == "half\n"


def test_what_is_slow_shows_how_far_it_is_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    hurry(monkeypatch)
    with slow_work("ranks", total=4, unit="rank") as work:
        threads = [threading.Thread(target=work.add) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work.reach(3)
        time.sleep(0.3)
        work.say("a line")
    text = terminal.getvalue()
    assert re.search(r"ranks: +75%.*3/4", text) and "\na line\n" in "\n" + text.replace("\r", "\n")
    assert text.split("\r")[-1].strip() == "", "the bar is wiped away at the end"


def test_what_cannot_be_counted_shows_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    hurry(monkeypatch)
    with slow_work("search layouts"):
        time.sleep(1.2)
    assert {"search layouts: 00:00", "search layouts: 00:01"} <= {part.strip() for part in
                                                                 terminal.getvalue().split("\r")}


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    give_terminal(monkeypatch)
    hurry(monkeypatch)
    before = threading.active_count()
    with pytest.raises(KeyError), slow_work("merge"):
        raise KeyError
    assert threading.active_count() <= before + 1  # tqdm's own monitor stays


def test_one_of_several_processes_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    hurry(monkeypatch)
    with slow_work("start", shown=False):
        time.sleep(0.2)
    assert terminal.getvalue() == ""


def test_a_process_that_forks_gets_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    hurry(monkeypatch)
    before = set(threading.enumerate())
    with slow_work("certify", total=4, unit="stage", ticks=False) as work:
        time.sleep(0.1)
        assert not set(threading.enumerate()) - before
        work.tick()
        assert "certify:   0%" in terminal.getvalue(), "it is seen before the first stage is done"
        time.sleep(0.15)  # tqdm draws ten times a second at most
        work.add()
    assert "certify:  25%" in terminal.getvalue()


@pytest.mark.parametrize(("rows", "columns", "width"), [
    (0, 100, {"ncols": 99, "nrows": 24}), (0, 0, {"ncols": 79, "nrows": 24}), (30, 60, {"dynamic_ncols": True})])
def test_a_terminal_that_does_not_say_its_height_gets_a_bar(rows: int, columns: int, width: dict[str, Any]) -> None:
    ours, theirs = os.openpty()
    try:
        termios.tcsetwinsize(theirs, (rows, columns))
        with open(theirs, "w") as terminal:
            assert bar_width(terminal) == width
    finally:
        os.close(ours)
    assert bar_width(io.StringIO()) == {"dynamic_ncols": True}


def test_log_lines_do_not_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = give_terminal(monkeypatch)
    hurry(monkeypatch)
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with slow_work("start"):
        time.sleep(0.2)
        logging.getLogger("dsv3_megatron").warning("experts on AMX")
    assert re.search(r"start: 00:00\r +\r?experts on AMX\n", terminal.getvalue()), repr(terminal.getvalue())
    assert logging.getLogger().handlers == [handler]
