"""A few minutes on one GPU, ordered by worth: what a first meeting of this library with a GPU should show.

Each part has a time of its own and is a process of its own; one that fails or hangs stops no other, and one for which
no time is left is said. Results are on disk as soon as they are known: report.md and report.json after every step,
log.txt while a step runs, tables of the benchmarks as CSV. docs/contributing/gpu.md says how to use it on a machine
that cannot install anything.

    python -m tools.gpu_session --out runs/gpu-session              12 minutes, one Hopper GPU
    python -m tools.gpu_session --only fp8 slice --minutes 6        these parts
    python -m tools.gpu_session --rehearse                          the same commands on a CPU, at small sizes, with
                                                                    kernels under Triton's interpreter

Exit codes: 0 every part ran and passed; 1 something failed, or no time was left for it; 2 the command cannot run here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command

ROOT = Path(__file__).resolve().parents[1]
# A rehearsal is for a machine with little else to do and without a GPU: parts may take so many times their budgets.
PATIENCE = 6
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
# The slice of DeepSeek-V3 whose memory tools/bench/slice_memory.py has rehearsed.
SLICE = ("--layers", "3", "--experts", "32", "--micro-batch-size", "2", "--num-microbatches", "2", "--steps", "5",
         "--warm-up", "2", "--contenders", "bf16", "fp8")
ATTENTION = "attention"
NOT_SEEN = (
    "Several processes on one GPU: not run. NCCL refuses two ranks of a communicator on one device, and gloo has no "
    "all-to-all of CUDA tensors. Messages between ranks need two GPUs; until then they are proved on a CPU "
    "(tests/distributed, tests/nccl_like.py, dsv3 rehearse).")


@dataclass(frozen=True)
class Step:
    """One process of a part.

    Attributes:
        name: What the report calls it.
        command: Arguments of Python.
        rehearsal: Arguments of Python where there is no GPU; None: `command`, which then knows what to leave out.
    """

    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Part:
    """Steps that answer one question.

    Attributes:
        name: Short name, for --only.
        question: What it answers.
        budget_s: Seconds for all its steps.
        steps: In order; a step that fails does not keep the next from running.
    """

    name: str
    question: str
    budget_s: float
    steps: tuple[Step, ...]


@dataclass
class Outcome:
    """What became of a step: "passed", "failed", "out of time" or "not run", with its seconds and last lines."""

    part: str
    step: str
    verdict: str
    seconds: float = 0.0
    summary: str = ""
    lines: list[str] = dataclasses.field(default_factory=list)


def parts() -> list[Part]:
    """The parts in order of worth; those before the last take 11 of 12 minutes at most."""
    attention = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/gpu").glob("test_attention*.py")))
    fp8, modules = "tests/gpu/test_fp8.py", "tests/gpu/test_local_modules.py"
    kernels = "bit_for_bit or finite or product or counts"
    bench = ("-m", "tools.bench.bench_fp8")
    return [
        Part("machine", "Does the library import and find the GPU?", 30, (
            Step("packages", ("-m", "tools.gpu_machine")),)),
        Part("modules", "Do local modules, head and loss compute what a CPU computes in fp32?", 110, (
            Step("modules", (*PYTEST, modules, "tests/gpu/test_adamw.py", "-k", f"not {ATTENTION}")),)),
        Part("fp8", "Do the FP8 kernels compute what the reference does, bit for bit where promised?", 130, (
            Step("kernels", (*PYTEST, fp8, "-k", kernels)),
            Step("model", (*PYTEST, fp8, "-k", f"not ({kernels}) and not transformer_engine")))),
        Part("attention", "Which attention backends run, and are they right?", 50, (
            Step("attention", (*PYTEST, modules, *attention, "-k", ATTENTION)),)),
        Part("slice", "What do three layers of DeepSeek-V3 take, in BF16 and FP8?", 190, (
            Step("slice", ("-m", "tools.bench.bench_fp8_slice", *SLICE),
                 ("-m", "tools.bench.bench_fp8_slice", "--device", "cpu", "--smoke", "--no-csv", "--steps", "1",
                  "--warm-up", "0", "--contenders", "bf16", "fp8")),)),
        Part("speed", "How fast are the kernels beside their peers?", 150, (
            Step("AdamW", ("-m", "tools.bench.bench_adamw"), ("-m", "tools.bench.bench_adamw", "--smoke", "--no-csv")),
            Step("head and loss", ("-m", "tools.bench.bench_head_loss"),
                 ("-m", "tools.bench.bench_head_loss", "--smoke", "--no-csv")),
            Step("FP8 products", (*bench, "--tokens", "4096", "--experts", "8"), (*bench, "--check-on-cpu")),
            Step("ways of the FP8 kernel", (*bench, "--configurations", "--tokens", "4096", "--experts", "8"),
                 ("-m", "tools.bench.bench_fp8", "--compile")))),
        Part("rest", "Do checkpoints, training and the other tests pass?", 60, (
            Step("platform", (*PYTEST, "tests/gpu/test_platform.py"), ("-c", "print('a GPU is needed')")),
            Step("checkpoints", (*PYTEST, "tests/gpu/test_checkpoint.py", "-k", "not implementations"),
                 ("-c", "print('tests/distributed/test_checkpoint.py does this on a CPU')")),
            Step("chunks and training", (*PYTEST, "tests/gpu/test_chunk.py", "tests/gpu/test_training.py"),
                 ("-c", "print('tests/distributed does this on a CPU')")))),
    ]


def run_parts(chosen: Iterable[Part], out: Path, *, seconds: float, is_rehearsal: bool) -> list[Outcome]:
    """Run parts until the time is over, and write the report after each step.

    Args:
        chosen: Parts, in order.
        out: Folder of the results; made.
        seconds: For all parts; a part gets its own budget at most.
        is_rehearsal: On a CPU, at small sizes, with PATIENCE.
    """
    out.mkdir(parents=True, exist_ok=True)
    patience = PATIENCE if is_rehearsal else 1
    end, outcomes = time.monotonic() + patience * seconds, []
    for part in chosen:
        part_end = min(end, time.monotonic() + patience * part.budget_s)
        for step in part.steps:
            left = part_end - time.monotonic()
            if left < 1:
                outcomes.append(Outcome(part.name, step.name, "not run", summary="no time was left"))
            else:
                command = step.rehearsal if is_rehearsal and step.rehearsal is not None else step.command
                outcomes.append(_run(part.name, step.name, command, out, left, is_rehearsal))
            last = outcomes[-1]
            print(f"{part.name} / {step.name}: {last.verdict}, {last.seconds:.0f} s. {last.summary}", flush=True)
            _write(out, outcomes, is_rehearsal)
    return outcomes


def _run(part: str, step: str, command: Sequence[str], out: Path, seconds: float, is_rehearsal: bool) -> Outcome:
    """One step as a process of its own, which is ended with all that it started when its time is over."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
           "PYTHONUNBUFFERED": "1", "BENCH_RESULTS": str(out.resolve()),
           "DSV3_FP8_TUNING": str(out.resolve() / "tuning.json")}
    if is_rehearsal:
        env |= {"REHEARSE_GPU_TESTS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    started, verdict = time.monotonic(), "passed"
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n== {part} / {step}: python {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if process.wait(timeout=seconds):
                verdict = "failed"
        except subprocess.TimeoutExpired:
            verdict = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with (out / "log.txt").open("rb") as written:
        written.seek(begin)
        lines = written.read().decode(errors="replace").splitlines()
    summary = _summary(lines) + (f"; ended after its {seconds:.0f} s" if verdict == "out of time" else "")
    return Outcome(part, step, verdict, time.monotonic() - started, summary, _telling(lines))


def _summary(lines: list[str]) -> str:
    """Counts of tests if these are pytest's lines, also of one that was ended; else the last line."""
    counts = {word: sum(bool(re.search(rf"::.* {word.upper()}\b", line)) for line in lines)
              for word in ("passed", "failed", "error", "skipped")}
    if any(counts.values()):
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _telling(lines: list[str]) -> list[str]:
    """What of a step's output belongs in the report: what failed and why, numbers, the end."""
    wanted = re.compile(r"^(FAILED|ERROR|SKIPPED|E  )|\b(TFLOP/s|GB/s|tok/s|GB|missed|met|launches)\b")
    found = [line.rstrip()[:240] for line in lines if wanted.search(line)]
    tail = [line.rstrip()[:240] for line in lines[-5:] if line.strip() and line.rstrip()[:240] not in found]
    return found[:60] + tail


def _write(out: Path, outcomes: list[Outcome], is_rehearsal: bool) -> None:
    """The report as it stands, JSON and Markdown; each file is whole at every moment."""
    title = "# Rehearsal of a GPU session on a CPU" if is_rehearsal else "# GPU session"
    page = [title, "", "| part | step | verdict | seconds | |", "|---|---|---|---:|---|"]
    page += [f"| {o.part} | {o.step} | {o.verdict} | {o.seconds:.0f} | {o.summary.replace('|', '/')} |"
             for o in outcomes]
    page += ["", NOT_SEEN]
    for outcome in outcomes:
        if outcome.lines:
            page += ["", f"## {outcome.part} / {outcome.step}", "", "```", *outcome.lines, "```"]
    texts = {"report.md": "\n".join(page) + "\n",
             "report.json": json_text([dataclasses.asdict(outcome) for outcome in outcomes])}
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for."""
    known = parts()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs/gpu-session"),
                        help="folder of the results (default: $OUT, else runs/gpu-session)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in known], help="these parts, in their order")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    options = parser.parse_args(arguments)
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("gpu_session needs one CUDA device that torch can use; --rehearse runs it without", file=sys.stderr)
            return 2
    chosen = [part for part in known if options.only is None or part.name in options.only]
    outcomes = run_parts(chosen, options.out, seconds=60 * options.minutes, is_rehearsal=options.rehearse)
    print(f"report: {options.out / 'report.md'}")
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


if __name__ == "__main__":
    run_command(main)
