"""Settings x seeds of one training command, as runs of their own and one table: `dsv3 sweep FILE.toml`.

    dsv3 sweep study.toml                    do what is not done yet, and print the table
    dsv3 sweep study.toml --at-a-time 4      four runs under way together
    dsv3 sweep study.toml --list             print the commands, and start nothing
    dsv3 sweep study.toml --table            print the table of what there is, and start nothing
    dsv3 plot runs/study                     a picture, with bands over the seeds

A sweep that was stopped or killed goes on with the same command: finished runs stay, and those that were under way go
on from their checkpoints. The file and the table are described in docs/guides/sweeps.md.

Exit status: 0 all runs are done, 1 some are not, 2 the file or an input is wrong, 128 and the number of a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.commands import grpo, sft
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import CommandLine, TrainingRequest, parse_command
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.slow_work import bar_width
from dsv3_megatron.config.streams import message, print_error
from dsv3_megatron.config.sweep_file import SweepPlan, SweepRun, check_settings, read_sweep
from dsv3_megatron.guards.lock import BEAT_S, RunLock
from dsv3_megatron.metrics.progress import duration
from dsv3_megatron.metrics.run_records import METRICS_FILE, last_iteration
from dsv3_megatron.process.elastic import EXIT_AGAIN
from dsv3_megatron.reports.run_groups import SWEEP_FILE
from dsv3_megatron.reports.sweep_table import DONE, RunResult, as_csv, as_json, as_text, measures_of
from dsv3_megatron.runs.run_queue import (
    EXIT_DONE,
    EXIT_GUARD,
    FINAL,
    LOG,
    LOG_START,
    EndedRun,
    RunQueue,
    code_of,
    visible_gpus,
)

EXIT_NOT_DONE, EXIT_WRONG = 1, 2
RESULTS, LOCK = "results", "sweep.lock"
_WAITS, _UNDER_WAY = "not finished", "under way"
# Between two lines about runs under way, where there is no terminal for a bar.
_LINE_S = 60.0
_LOG_LINES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        plan = read_sweep(options.file, _line_of)
        if options.at_a_time is not None:
            plan = dataclasses.replace(plan, at_a_time=options.at_a_time)
        steps = check_settings(plan, _reader_of(plan.command))
        if options.list:
            launch = ["dsv3"] if plan.processes == 1 else [
                "torchrun", "--standalone", "--nproc-per-node", str(plan.processes), "-m", "dsv3_megatron"]
            for run in plan.runs:
                print(shlex.join((*launch, plan.command, *run.words)))
            return 0
        _require_own(plan.output)
        codes = {run: code_of(run) for run in plan.runs}
        if options.table:
            print(as_text(_results(plan, codes, ()), base=plan.base))
            return 0
        queue = RunQueue(plan.command, at_a_time=plan.at_a_time, processes=plan.processes, gpus=visible_gpus())
        return _Sweep(plan, steps, codes, queue).do()
    except (ValueError, OSError) as error:
        print_error(error)
        return EXIT_WRONG


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 sweep", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.toml", help="what the sweep is")
    parser.add_argument("--at-a-time", type=int, metavar="N", help="runs under way together, in place of the file's "
                        "at_a_time")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print the command of every run, and stop")
    only.add_argument("--table", action="store_true", help="print the table of what is done, and stop; also while the "
                      "sweep is under way")
    options = parser.parse_args(arguments)
    if options.at_a_time is not None and not 1 <= options.at_a_time <= 4096:
        parser.error(f"--at-a-time {options.at_a_time} must be from 1 to 4096")
    return options


def _line_of(command: str) -> CommandLine:
    return {"sft": sft.command_line, "grpo": grpo.command_line}.get(command, CommandLine)()


def _reader_of(command: str) -> Callable[[Sequence[str]], TrainingRequest]:
    return {"sft": sft.parse, "grpo": grpo.parse}.get(command, parse_command)


def _require_own(output: Path) -> None:
    """Refuse a folder that holds other things than a sweep's."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is not a folder; give another")
    if output.is_dir() and not (output / SWEEP_FILE).is_file() and any(output.iterdir()):
        raise ConfigError(f"output={output} holds other things than a sweep's; give a folder of its own")


def _state(code: int | None) -> str:
    if code is None:
        return _WAITS
    if code == EXIT_DONE:
        return DONE
    if code == EXIT_GUARD:
        return "ended by a guard"
    return "stopped" if code == EXIT_AGAIN or code > 128 else f"failed with code {code}"


def _results(plan: SweepPlan, codes: Mapping[SweepRun, int | None], under_way: Sequence[SweepRun]) -> list[RunResult]:
    measures = measures_of(plan.command, plan.measures)
    return [RunResult.of(run.setting, run.seed, _UNDER_WAY if run in under_way else _state(code), run.folder,
                         measures=measures) for run, code in codes.items()]


class _Sweep:
    """A sweep that is done, from its lock to its table."""

    def __init__(self, plan: SweepPlan, steps: Mapping[str, int], codes: dict[SweepRun, int | None], queue: RunQueue
                 ) -> None:
        self._plan, self._steps, self._codes, self._queue = plan, steps, codes, queue
        self._bar: Any = None

    def do(self) -> int:
        """Do what is not done, and print the table.

        Raises:
            CheckpointError: another process does this sweep.
        """
        output = self._plan.output
        output.mkdir(parents=True, exist_ok=True)
        lock = RunLock(output / LOCK, "sweep", f"output={output}")
        note = lock.take()
        if note:
            _say(note)
        try:
            return self._do(lock)
        finally:
            lock.release()

    def _do(self, lock: RunLock) -> int:
        self._write_plan()
        waiting = [run for run, code in self._codes.items() if code not in FINAL]
        _say(f"{len(self._codes)} runs, {len(self._codes) - len(waiting)} of them finished before; "
             f"{self._plan.at_a_time} at a time, in {self._plan.output}")
        self._begin_bar()
        told = beat = time.monotonic()
        wrong = False
        try:
            with contextlib.closing(self._queue.do(waiting)) as events:
                for event in events:
                    now = time.monotonic()
                    if isinstance(event, EndedRun):
                        wrong = self._end(event)
                        told = now
                        if wrong:
                            break
                    elif event is not None:
                        self._say(f"{event.name}: begins (log: {event.folder / LOG})")
                    if now - beat >= BEAT_S:
                        lock.touch()
                        beat = now
                    told = self._tell(now, told)
        finally:
            self._close()
            results = self._write_results()
        print(as_text(results, base=self._plan.base))
        _say(f"{self._plan.output / RESULTS}.csv and .json have every run; a picture: dsv3 plot {self._plan.output}")
        if wrong:
            return EXIT_WRONG
        return 0 if all(code == EXIT_DONE for code in self._codes.values()) else EXIT_NOT_DONE

    def _end(self, ended: EndedRun) -> bool:
        """Note a run's end; whether it found something wrong that the others would meet too."""
        run = ended.run
        self._codes[run] = ended.code
        num_done = sum(code in FINAL for code in self._codes.values())
        [result] = _results(self._plan, {run: ended.code}, ())
        last = sorted((name for name in result.values if name.endswith(", last")),
                      key=lambda name: not name.startswith("validation "))  # of validations first, else as they are
        value = f", {last[0].removesuffix(', last')} {result.values[last[0]]:.4f}" if last else ""
        self._say(f"[{num_done}/{len(self._codes)}] {run.name}: {result.state} after {duration(ended.seconds)}{value}")
        if ended.code == EXIT_DONE and not self._plan.keeps_checkpoints:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        self._write_results()
        if result.state.startswith("failed"):
            self._say("\n".join(f"  {line}" for line in _last_lines(run.folder / LOG)))
        if ended.code == EXIT_WRONG:
            self._say("a setting or an input is wrong, which the other runs would meet too: those under way save and "
                      "end. Mend it; the same command goes on")
        return ended.code == EXIT_WRONG

    def _write_plan(self) -> None:
        content = {"command": self._plan.command, "base": self._plan.base,
                   "settings": [{"name": setting.name, "values": dict(setting.values), "words": list(setting.words)}
                                for setting in self._plan.settings],
                   "runs": [{"setting": run.setting, "seed": run.seed,
                             "folder": str(run.folder.relative_to(self._plan.output))} for run in self._codes]}
        replace_text(self._plan.output / SWEEP_FILE, json_text(content, indent=1) + "\n")

    def _write_results(self) -> list[RunResult]:
        results = _results(self._plan, self._codes, self._queue.under_way)
        settings = {setting.name: setting.values for setting in self._plan.settings}
        path = self._plan.output / RESULTS
        replace_text(path.with_suffix(".csv"), as_csv(results, settings))
        replace_text(path.with_suffix(".json"), json_text(as_json(results, settings), indent=1) + "\n")
        return results

    # -- what is shown ---------------------------------------------------------------------------------

    def _begin_bar(self) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=sum(self._steps[run.setting] for run in self._codes), unit="step",
                             initial=self._num_steps(), file=sys.stderr, **bar_width(sys.stderr))

    def _num_steps(self) -> int:
        return sum(self._steps[run.setting] if code in FINAL else last_iteration(run.logs / METRICS_FILE)
                   for run, code in self._codes.items())

    def _tell(self, now: float, told: float) -> float:
        """Bring the bar up to date, or print a line now and then; returns when one was printed last."""
        if self._bar is not None:
            self._bar.n = self._num_steps()
            self._bar.refresh()
        elif now - told >= _LINE_S and self._queue.under_way:
            _say("under way: " + "; ".join(
                f"{run.name} step {last_iteration(run.logs / METRICS_FILE)}/{self._steps[run.setting]}"
                for run in self._queue.under_way))
            return now
        return told

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(message(text), file=sys.stderr)
        else:
            _say(text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _say(text: str) -> None:
    print(message(text), file=sys.stderr, flush=True)


def _last_lines(log: Path) -> list[str]:
    """The error of a run's last start in its log, or its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.rpartition(LOG_START)[2].splitlines()[1:]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1:] or lines[-_LOG_LINES:]
