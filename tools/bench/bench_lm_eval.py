"""`dsv3 lm-eval` beside lm-evaluation-harness's own `hf` model: the same questions, the same export, the same numbers.

Each contender is a whole process, from its start to its exit, and they take turns. The questions are made up of the
words in tests/lm_eval_tasks/: choices (log-likelihoods), texts (rolling log-likelihoods), and prompts to go on with.
One question alone is measured too: it says what the start costs. Both compute in fp32, and every number must be equal.

    python -m tools.bench.bench_lm_eval --model runs/quickstart/exported --folder /tmp/bench-lm-eval

The harness must be installed: pip install -e '.[lm-eval]'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.records import Measurement, append_rows, load_average, warn_of_load

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = REPOSITORY / "tests" / "lm_eval_tasks"
OURS, THEIRS = "dsv3 lm-eval", "lm-eval, hf"
_SEED, _RELATIVE = 3, 1e-4
_CONTEXT_WORDS, _TEXT_WORDS = (20, 60), (60, 200)


def _words() -> list[str]:
    """Every word of the tasks' prompts."""
    lines = (TASKS / "continue.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines for word in json.loads(line)["prompt"].split()})


def _questions(draw: random.Random, words: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes a question of each kind, by the name of its file in tests/lm_eval_tasks/."""
    def text(span: tuple[int, int]) -> str:
        return " ".join(draw.choices(words, k=draw.randint(*span)))

    return {
        "choice": lambda: {"question": text(_CONTEXT_WORDS), "choices": [text((1, 3)) for _ in range(4)],
                           "answer": draw.randrange(4)},
        "rolling": lambda: {"text": text(_TEXT_WORDS)},
        "continue": lambda: {"prompt": text(_CONTEXT_WORDS), "answer": "fox"}}


def make_tasks(folder: Path, count: int) -> dict[str, str]:
    """Write tasks of so many questions of each kind into a folder; returns their names, by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for kind, question in _questions(random.Random(_SEED), _words()).items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(question()) + "\n" for _ in range(count)), encoding="utf-8")
        task = (TASKS / f"{kind}.yaml").read_text(encoding="utf-8")
        task = task.replace(f"tests/lm_eval_tasks/{kind}.jsonl", str(data)).replace("local_", "bench_")
        (folder / f"{kind}.yaml").write_text(task, encoding="utf-8")
        names[kind] = f"bench_{kind}"
    return names


@dataclass(frozen=True)
class Turn:
    """What one process took, and what it found.

    Attributes:
        seconds: From its start to its exit.
        cpu_seconds: Time that it and its children computed.
        results: Numbers of each task by the harness.
    """

    seconds: float
    cpu_seconds: float
    results: dict[str, dict[str, Any]]


def run_once(command: list[str], output: Path) -> Turn:
    """Run a command of the harness that writes its results below a folder.

    Raises:
        RuntimeError: it failed; the message has what it printed last.
    """
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*command, "--output_path", str(output)], cwd=REPOSITORY, env=environment, check=False,
                          capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}: {done.stderr[-2000:]}")
    (file,) = output.rglob("results_*.json")
    return Turn(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                json.loads(file.read_text(encoding="utf-8"))["results"])


def differences(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Numbers of the tasks that are not equal within rounding."""
    for task, numbers in theirs.items():
        for name, value in numbers.items():
            if isinstance(value, float) and "stderr" not in name:
                found = ours[task].get(name)
                if not isinstance(found, float) or not math.isclose(found, value, rel_tol=_RELATIVE):
                    yield f"{task}, {name}: {found} instead of {value}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, compare, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="an export with its tokenizer")
    add("--folder", required=True, help="folder for tasks and results")
    add("--questions", type=int, default=200, metavar="N", help="of each kind (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences of a pass (%(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="turns (%(default)s)")
    add("--device", required=True, help="what this is, for the CSV")
    options = parser.parse_args(arguments)
    warn_of_load()
    model, folder = Path(options.model).resolve(), Path(options.folder).resolve()
    names = make_tasks(folder / "tasks", options.questions)
    common = ["--include_path", str(folder / "tasks"), "--batch_size", str(options.batch_size)]
    commands = {
        OURS: [sys.executable, "-m", "dsv3_megatron", "lm-eval", "--load", str(model), "--precision", "fp32", *common],
        THEIRS: [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
                 f"pretrained={model},dtype=float32", "--device", "cpu", *common]}
    cases = {"one question": ["--tasks", names["choice"], "--limit", "1"],
             **{f"{options.questions} of {kind}": ["--tasks", name] for kind, name in names.items()}}
    rows, loads = [], [load_average()]
    for case, words in cases.items():
        turns: dict[str, list[Turn]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                turns[name].append(run_once([*command, *words], folder / "results"))
            wrong = list(differences(turns[OURS][-1].results, turns[THEIRS][-1].results))
            if wrong:
                raise RuntimeError("\n".join(wrong))
        loads.append(load_average())
        config = f"{case}, {model.name}, fp32, batch size {options.batch_size}"
        for name, found in turns.items():
            for metric, values in (("time", [turn.seconds for turn in found]),
                                   ("cpu_time", [turn.cpu_seconds for turn in found])):
                rows += [Measurement(name, config, f"{metric}_median", statistics.median(values), "s"),
                         Measurement(name, config, f"{metric}_min", min(values), "s")]
            rows.append(Measurement(name, config, "num_rounds", len(found), ""))
            print(f"{case:20} {name:14} {statistics.median(turn.seconds for turn in found):7.2f} s, computed "
                  f"{statistics.median(turn.cpu_seconds for turn in found):7.2f} s", flush=True)
    print(append_rows("lm_eval.csv", rows, f"{options.device}, load {min(loads):.1f} to {max(loads):.1f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
