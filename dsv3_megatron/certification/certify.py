"""Certifies layouts: one process, the layout's processes, one process again; then everything compared.

Layouts of the same number of processes take their turns in the same processes. Where one fails or hangs, those behind
it go on in new ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_megatron.certification.certified_layout import (
    Decided,
    Resumed,
    RunToCertify,
    definition_of,
    resume,
    run_layout,
)
from dsv3_megatron.certification.given_roundings import merge_roundings
from dsv3_megatron.certification.rank_forks import RankError, call_in_ranks
from dsv3_megatron.certification.rank_step import StepHooks
from dsv3_megatron.certification.verdict import OneProcess, Verdict, both_precisions, judge
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.slow_work import SlowWork, slow_work
from dsv3_megatron.process.parent import freeze_before_forks
from dsv3_megatron.process.unpickling import load_own

# What torch and Megatron-Core import where it is first used.
_FIRST_USED = ("torch._dynamo", "torch.utils.serialization.config", "megatron.core.models.hybrid.hybrid_block",
               "megatron.core.models.mimo", "megatron.core.dist_checkpointing.strategies.state_dict_saver",
               "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader")
# Layouts that take their turns in the same processes.
BATCH_SIZE = 12
# Of a batch: one process, the layouts, one process that resumes from theirs, the comparison.
_NUM_STAGES = 4
TIMEOUT_S = 600.0
# Behind the name of a layout that is certified without FP8 besides.
TWIN = " without FP8"


class Certifier:
    """Certifies runs in processes forked from this one, which must have imported the trainer and used no threads.

    Args:
        processes: Processes at a time.
        hooks: Things to do in the steps of a layout, by the name of its run; for tests.
        alone_hooks: Things to do in the steps of the one process that it is compared with.
        timeout_s: Seconds in which a layout, or one process, must be done.
    """

    def __init__(self, processes: int, *, hooks: dict[str, StepHooks] | None = None,
                 alone_hooks: dict[str, StepHooks] | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.processes, self.timeout_s = processes, timeout_s
        self._hooks, self._alone_hooks = hooks or {}, alone_hooks or {}
        self._alone: dict[Any, OneProcess | str] = {}
        self._num_alone = 0
        self._work = SlowWork(None)

    def certify(self, jobs: Sequence[RunToCertify], tell: Callable[[Verdict], None] = lambda verdict: None
                ) -> list[Verdict]:
        """Certify runs, those of as many processes in the same ones.

        Args:
            jobs: Runs with different names, small enough for `processes`.
            tell: Called with each verdict when it is known.

        Returns:
            The verdicts in the order of the jobs.
        """
        verdicts: dict[str, Verdict] = {}
        twins = {job.name: without_fp8(job) for job in jobs if job.run.fp8.is_enabled}
        everything = [both for job in jobs for both in (job, twins.get(job.name)) if both is not None]
        lots = batches(everything)
        # Of several layouts, `tell` shows how far they are.
        with (tempfile.TemporaryDirectory(prefix="certify-") as folder,
              slow_work("certify", total=_NUM_STAGES * len(lots), unit="stage", shown=len(jobs) == 1, ticks=False
                        ) as self._work):
            for number, batch in enumerate(lots):
                for verdict in self._certify_batch(batch, Path(folder)):
                    name = verdict.job.name.removesuffix(TWIN)
                    known = verdicts.get(name)
                    verdicts[name] = verdict if known is None else both_precisions(known, verdict)
                    if name not in twins or known is not None:
                        tell(verdicts[name])
                self._forget({self._key(job) for later in lots[number + 1:] for job in later})
        return [verdicts[job.name] for job in jobs]

    def _certify_batch(self, jobs: Sequence[RunToCertify], folder: Path) -> list[Verdict]:
        started = time.monotonic()
        self._run_alone([self._alone_job(job) for job in jobs], folder)
        self._work.add()
        verdicts = {job.name: Verdict(job) for job in jobs}
        possible = []
        for job in jobs:
            alone = self._alone[self._key(job)]
            if isinstance(alone, str):
                verdicts[job.name].error = alone
            else:
                possible.append(job)
        files = self._run_layouts(possible, folder, verdicts)
        self._work.add()
        crossed = self._resume_alone([job for job in possible if job.name in files and job.num_steps > 1], folder,
                                     files, verdicts)
        self._work.add()
        self._judge(files, crossed, verdicts)
        self._work.add()
        for name, left in files.items():
            for file in left:
                file.unlink()
            shutil.rmtree(folder / name, ignore_errors=True)
        for verdict in verdicts.values():
            verdict.seconds = (time.monotonic() - started) / len(jobs)
        return list(verdicts.values())

    # -- one process ---------------------------------------------------------------------------------

    def _key(self, job: RunToCertify) -> Any:
        """What the one process depends on; runs that are broken on purpose there have one of their own."""
        alone = self._alone_job(job)
        own = job.name if job.name in self._alone_hooks else ""
        return alone.run, alone.seed, alone.num_steps, own

    def _alone_job(self, job: RunToCertify) -> RunToCertify:
        return dataclasses.replace(job, run=alone(job.run), world_size=1)

    def _run_alone(self, jobs: Sequence[RunToCertify], folder: Path) -> None:
        missing = {self._key(job): job for job in jobs if self._key(job) not in self._alone}
        keys, first = list(missing), self._num_alone
        self._num_alone += len(keys)

        def work(index: int) -> Any:
            job, place = missing[keys[index]], folder / f"alone-{first + index}"
            definition = definition_of(job)
            given = definition[1] if definition else None
            record = run_layout(job, place, Decided(given), None, self._alone_hooks.get(job.name))
            return OneProcess(record, definition[0] if definition else None, record.notes if given is None else given,
                              place)

        found = self._in_processes(len(keys), work)
        self._alone |= dict(zip(keys, found, strict=True))

    def _forget(self, needed: set[Any]) -> None:
        """Let go of what one process did, and its checkpoint, unless a later layout is compared with it."""
        for key in set(self._alone) - needed:
            one = self._alone.pop(key)
            if isinstance(one, OneProcess):
                shutil.rmtree(one.folder, ignore_errors=True)

    def _resume_alone(self, jobs: Sequence[RunToCertify], folder: Path, files: dict[str, list[Path]],
                      verdicts: dict[str, Verdict]) -> dict[str, Resumed]:
        """Let one process resume from each layout's checkpoint, and round to FP8 as the layout did from there."""
        def work(index: int) -> Resumed:
            job = self._alone_job(jobs[index])
            one = self._alone[self._key(jobs[index])]
            assert isinstance(one, OneProcess)
            roundings = merge_roundings(_read(file).roundings for file in files[jobs[index].name]
                                        ) if job.run.fp8.is_enabled else {}
            return resume(job, folder / jobs[index].name, Decided(one.given, roundings),
                          self._alone_hooks.get(job.name))

        resumed = {}
        for job, found in zip(jobs, self._in_processes(len(jobs), work), strict=True):
            if isinstance(found, str):
                verdicts[job.name].error = f"one process cannot resume from the layout's checkpoint: {found}"
            else:
                resumed[job.name] = found
        return resumed

    def _judge(self, files: dict[str, list[Path]], crossed: dict[str, Resumed], verdicts: dict[str, Verdict]) -> None:
        """Compare what all did, several layouts at a time; puts the verdicts in their places."""
        names = [name for name in files if not verdicts[name].error]

        def work(index: int) -> Verdict:
            verdict = verdicts[names[index]]
            one = self._alone[self._key(verdict.job)]
            assert isinstance(one, OneProcess)
            judge(verdict, one, [_read(file) for file in files[verdict.job.name]], crossed.get(verdict.job.name))
            return verdict

        for name, found in zip(names, self._in_processes(len(names), work), strict=True):
            if isinstance(found, str):
                verdicts[name].error = f"what the processes did cannot be compared: {found}"
            else:
                verdicts[name] = found

    def _in_processes(self, count: int, work: Callable[[int], Any]) -> list[Any]:
        """What `work` gives for each number below `count`, in processes of one rank; a text where it failed."""
        workers = min(self.processes, count)
        with tempfile.TemporaryDirectory(prefix="certify-") as name:
            def share(worker: int) -> None:
                for index in range(worker, count, workers):
                    try:
                        result: Any = work(index)
                    except Exception as error:  # noqa: BLE001 - told as this one's verdict; the others go on
                        import traceback

                        result = f"{error}\n{traceback.format_exc()}"
                    _write(Path(name) / f"{index}.pickle", result)

            error = "the process has left nothing"
            if count:
                try:
                    call_in_ranks(workers, share, timeout_s=self.timeout_s, are_alone=True,
                                  progress=partial(self._count, Path(name)))
                except (RankError, TimeoutError) as failure:
                    error = str(failure)
            files = [Path(name) / f"{index}.pickle" for index in range(count)]
            return [_read(file) if file.exists() else error for file in files]

    def _count(self, folder: Path) -> int:
        """How much is done: files that are complete. Called again and again while processes are waited for."""
        self._work.tick()
        return sum(1 for _ in folder.glob("*.pickle"))

    # -- the layouts ---------------------------------------------------------------------------------

    def _run_layouts(self, jobs: Sequence[RunToCertify], folder: Path, verdicts: dict[str, Verdict]
                     ) -> dict[str, list[Path]]:
        """The files with the records of all ranks by layout; what failed has its verdict."""
        records: dict[str, list[Path]] = {}
        waiting = list(jobs)
        while waiting:
            size = waiting[0].world_size

            def turns(rank: int, waiting: list[RunToCertify] = waiting) -> None:
                for job in waiting:
                    one = self._alone[self._key(job)]
                    assert isinstance(one, OneProcess)
                    record = run_layout(job, folder / job.name, Decided(one.given, one.record.roundings),
                                        one.folder if job.num_steps > 1 else None, self._hooks.get(job.name))
                    _write(folder / f"{job.name}.{rank}.pickle", record)

            error = ""
            try:
                call_in_ranks(size, turns, timeout_s=self.timeout_s, progress=partial(self._count, folder))
            except (RankError, TimeoutError) as failure:
                error = str(failure)
            done = []
            for job in waiting:
                done.append(job)
                files = [folder / f"{job.name}.{rank}.pickle" for rank in range(size)]
                if not all(file.exists() for file in files):
                    verdicts[job.name].error = error or "not all ranks have left what they did"
                    break
                records[job.name] = files
            waiting = waiting[len(done):]
        return records


def get_ready_to_fork() -> None:
    """Import what ranks use, once for all of them, and keep this process from starting threads.

    `platform.prepare` must have been called.
    """
    import torch

    torch.set_num_threads(1)
    os.environ["DSV3_OVERLAP_ON_CPU"] = "1"  # as on the GPUs of the run that is certified
    for name in _FIRST_USED:
        importlib.import_module(name)
    freeze_before_forks()


def alone(run: RunConfig) -> RunConfig:
    """The run in one process: without any split, and without recomputation."""
    return dataclasses.replace(run, parallel=ParallelConfig()).override(recompute_granularity=None,
                                                                         recompute_modules=())


def without_fp8(job: RunToCertify) -> RunToCertify:
    """A layout in FP8 as it is without, where one process is held to the definition, and no gradient is rounded."""
    return dataclasses.replace(job, name=job.name + TWIN, run=dataclasses.replace(job.run, fp8=Fp8Config()))


def batches(jobs: Iterable[RunToCertify]) -> list[list[RunToCertify]]:
    """The jobs in lots of the same number of processes."""
    by_size: dict[int, list[RunToCertify]] = {}
    for job in jobs:
        by_size.setdefault(job.world_size, []).append(job)
    return [same[start:start + BATCH_SIZE] for same in by_size.values() for start in range(0, len(same), BATCH_SIZE)]


def _write(file: Path, value: Any) -> None:
    partial_file = file.with_suffix(".partial")
    partial_file.write_bytes(pickle.dumps(value))
    partial_file.rename(file)


def _read(file: Path) -> Any:
    return load_own(file)
