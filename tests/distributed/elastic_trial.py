"""An elastic run on this machine whose nodes are killed and come back at random, beside the same run undisturbed.

    python -m tests.distributed.elastic_trial --nodes 3 --events 20 --steps 300 --folder /tmp/trial

Each node is the launcher, its torchrun and two processes. An event kills (-9) a node's torchrun, one of its processes
or all of the node, or starts a node that was lost. What is checked: the run ends by itself at its last step; of each
step the samples of all ranks are those of the undisturbed run, none twice and none left out; losses are those of the
undisturbed run up to the order of fp32 sums.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.process.loopback import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "examples" / "pretrain_dsv3.sh"
VOCAB, SEQ_LENGTH = 96, 16
# Relative; of fp32 sums in another order, over some hundred steps of a model that learns noise.
TOLERANCE = 2e-3
_START_S = 900.0


@dataclass
class Trial:
    """A run, its folder, and the nodes that there are.

    Attributes:
        folder: Everything that the run writes.
        steps: Steps of the run.
        batch: Samples of a step.
        most_nodes: Nodes that there can be.
        ranks: Processes of a node, which hold the experts together.
        step_s: Seconds slept before each step.
        save_interval: Steps between saves.
    """

    folder: Path
    steps: int
    batch: int = 12
    most_nodes: int = 3
    ranks: int = 2
    step_s: float = 0.1
    save_interval: int = 5
    port: int = field(default_factory=free_port)
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    meeting: subprocess.Popen[bytes] | None = None
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "notes").mkdir()
        python = self.folder / "python"
        # torchrun gives it: -u -m dsv3_megatron train FLAGS.
        python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -u -m tests.distributed.noted_samples "$@"\n')
        python.chmod(0o755)
        generator = np.random.default_rng(0)
        with DatasetWriter(self.folder / "data", vocab_size=VOCAB) as writer:
            writer.add_documents(generator.integers(0, VOCAB, 200 * 30), np.full(200, 30))

    def flags(self) -> list[str]:
        """The command line of the run."""
        return (
            "--num-layers 2 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 "
            "--kv-lora-rank 16 --qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 "
            "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 "
            f"--moe-router-group-topk 1 --vocab-size {VOCAB} --seq-length {SEQ_LENGTH} --micro-batch-size 1 "
            f"--global-batch-size {self.batch} --precision fp32 --eval-interval 0 --log-interval 1 --split 100,0,0 "
            f"--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --lr-decay-style cosine --train-iters {self.steps} "
            f"--expert-model-parallel-size {self.ranks} --save-interval {self.save_interval} --keep-last 2 "
            f"--data-path {self.folder}/data --save {self.folder}/ck --tensorboard-dir {self.folder}/logs").split()

    def environment(self, nnodes: str) -> dict[str, str]:
        """What a launcher is started with."""
        kept = {name: value for name, value in os.environ.items()
                if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        return kept | {
            "NNODES": nnodes, "NPROC_PER_NODE": str(self.ranks), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
            "PYTHON_EXEC": str(self.folder / "python"), "NOTED_SAMPLES": str(self.folder / "notes"),
            "NOTED_STEP_S": str(self.step_s), "SHUTDOWN_TIMEOUT": "20", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT)}

    def open(self) -> None:
        """Start the place where nodes meet."""
        self.meeting = subprocess.Popen([sys.executable, "-m", "dsv3_megatron", "rendezvous", "--port", str(self.port)],
                                        cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("the place where nodes meet does not listen")

    def start(self, node: int, fewest: int = 1) -> None:
        """Start a node's launcher."""
        environment = self.environment(f"{fewest}:{self.most_nodes}") | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
            "RDZV_CONF": "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5"}
        with (self.folder / f"node-{node}.log").open("ab") as log:
            self.nodes[node] = subprocess.Popen(["bash", str(LAUNCHER), *self.flags()], env=environment, stdout=log,
                                                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def processes(self, node: int) -> dict[str, list[int]]:
        """Process ids of a node by what they are: its torchrun, its ranks, all."""
        found: dict[str, list[int]] = {"torchrun": [], "rank": [], "all": []}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, IndexError):
                continue
            # torchrun starts its ranks in sessions of their own.
            if session != self.nodes[node].pid and not (
                    f"{self.folder}/ck" in command and self._is_rank_of(int(entry.name), node)):
                continue
            found["all"].append(int(entry.name))
            if "torch.distributed.run" in command and "env " not in command:
                found["torchrun"].append(int(entry.name))
            elif "noted_samples" in command:
                found["rank"].append(int(entry.name))
        return found

    def _is_rank_of(self, pid: int, node: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            session = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, IndexError):
            return False
        return b"NOTED_SAMPLES" in environment and session == self.nodes[node].pid

    def kill(self, node: int, what: str) -> int:
        """Kill a node's torchrun, one of its ranks, or all of it; how many processes that were."""
        found = self.processes(node)
        # One that has just been started has none yet.
        pids = found["all"] if what == "all" or not found[what] else found[what][:1]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(pids)

    def records(self) -> list[dict[str, Any]]:
        """The steps that the run's log has."""
        path = self.folder / "logs" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the end of it is being written
            if record["kind"] == "step":
                found.append(record)
        return found

    def step(self) -> int:
        """The step that the run has logged last."""
        records = self.records()
        return int(records[-1]["iteration"]) if records else 0

    def wait_for_steps(self, count: int, timeout_s: float = _START_S) -> None:
        """Wait until so many steps more are logged, or the run has ended."""
        seen, left, deadline = self.step(), count, time.monotonic() + timeout_s
        while left > 0 and any(process.poll() is None for process in self.nodes.values()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {count} steps in {timeout_s:.0f} s; see {self.folder}")
            time.sleep(0.2)
            now = self.step()
            if now != seen:
                left, seen = left - max(1, now - seen), now

    def close(self) -> None:
        """End whatever is left."""
        for node in self.nodes:
            self.kill(node, "all")
        for process in (*self.nodes.values(), *([self.meeting] if self.meeting else [])):
            if process.poll() is None:
                process.kill()
            process.wait()


def disturb(trial: Trial, num_events: int, seed: int, *, whats: tuple[str, ...] = ("torchrun", "rank", "all")) -> None:
    """Kill nodes and bring them back at random, until so much has happened or the run has ended."""
    chance = random.Random(seed)
    for number in range(1, num_events + 1):
        if chance.random() < 0.7:
            trial.wait_for_steps(chance.randint(5, 12))
        time.sleep(chance.uniform(0, 4))
        up = [node for node, process in trial.nodes.items() if process.poll() is None]
        down = [node for node in range(trial.most_nodes) if node not in up]
        if not up:
            print(f"the run has ended after {number - 1} events: give it more steps", flush=True)
            return
        if down and (len(up) == 1 or chance.random() < 0.5):
            node = chance.choice(down)
            trial.start(node)
            text = f"node {node} comes back"
        else:
            node, what = chance.choice(up), chance.choice(whats)
            if len(up) == 1 and what != "rank":
                what = "rank"
            text = f"node {node}: {trial.kill(node, what)} killed ({what})"
        trial.told.append(f"event {number:2} at step {trial.step():4}: {text}")
        print(trial.told[-1], flush=True)


def finish(trial: Trial, timeout_s: float) -> dict[int, int]:
    """Wait for the nodes that there are; their exit codes."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in trial.nodes.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not end; see {trial.folder}")
        time.sleep(0.2)
    return {node: process.wait() for node, process in trial.nodes.items()}


def samples_by_step(trial: Trial) -> tuple[dict[int, list[int]], Counter[str]]:
    """Samples of each step by the samples before it, as the last start took it, and the steps of each start."""
    found: dict[int, dict[str, list[tuple[float, list[int]]]]] = defaultdict(lambda: defaultdict(list))
    for file in (trial.folder / "notes").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                when, start, before, ids = json.loads(line)
            except ValueError:
                continue  # killed while it was written
            found[before][start].append((when, ids))
    steps, starts = {}, Counter[str]()
    for before, by_start in found.items():
        last = max(by_start, key=lambda start: max(when for when, _ in by_start[start]))
        steps[before] = sorted(sample for _, ids in by_start[last] for sample in ids)
        starts[last] += 1
    return steps, starts


def check(trial: Trial, codes: Mapping[int, int], undisturbed: list[dict[str, Any]]) -> list[str]:
    """Compare with the undisturbed run; what is seen.

    Raises:
        AssertionError: something is not as there.
    """
    records = trial.records()
    assert [record["iteration"] for record in records] == list(range(1, trial.steps + 1)), "steps of the log"
    steps, starts = samples_by_step(trial)
    wrong = [before for before in range(0, trial.steps * trial.batch, trial.batch)
             if steps.get(before) != list(range(before, before + trial.batch))]
    assert not wrong, f"samples twice or left out in the steps after {wrong[:5]} samples"
    assert set(steps) == set(range(0, trial.steps * trial.batch, trial.batch)), "samples of no step"
    for name in ("consumed_samples", "consumed_tokens", "learning_rate", "batch_size"):
        assert [record[name] for record in records] == [record[name] for record in undisturbed], name
    farthest = max(abs(ours["lm_loss"] / theirs["lm_loss"] - 1)
                   for ours, theirs in zip(records, undisturbed, strict=True))
    assert farthest < TOLERANCE, f"losses differ by {farthest:.2e}"
    assert 0 in codes.values(), codes
    sizes = Counter(start.partition("/")[2] for start in starts.elements())
    return [f"{trial.steps} steps in {len(starts)} starts that lasted; steps by processes at hand: {dict(sizes)}",
            f"exit codes by node: {dict(codes)}", f"losses differ by at most {farthest:.2e}",
            f"{trial.steps * trial.batch} samples, each in exactly one step"]


def undisturbed_run(folder: Path, like: Trial) -> list[dict[str, Any]]:
    """The same run on one node that stays."""
    trial = Trial(folder, like.steps, batch=like.batch, step_s=0.0, save_interval=like.save_interval)
    done = subprocess.run(["bash", str(LAUNCHER), *trial.flags()], env=trial.environment("1"), capture_output=True,
                          text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return trial.records()


def main() -> None:
    """Run a trial, print what happened and what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=int, default=3, metavar="N")
    add("--events", type=int, default=20, metavar="N")
    add("--steps", type=int, default=300, metavar="N")
    add("--batch", type=int, default=12, metavar="N")
    add("--seed", type=int, default=0, metavar="N")
    add("--folder", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    trial = Trial(options.folder / "disturbed", options.steps, batch=options.batch, most_nodes=options.nodes)
    try:
        trial.open()
        for node in range(options.nodes):
            trial.start(node)
        trial.wait_for_steps(1)
        disturb(trial, options.events, options.seed)
        codes = finish(trial, 900.0)
    finally:
        trial.close()
    undisturbed = undisturbed_run(options.folder / "undisturbed", trial)
    for line in check(trial, codes, undisturbed):
        print(line)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
