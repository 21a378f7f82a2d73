"""Runs what the pods of examples/kubernetes run, as processes of this machine, in their order and environment.

    python -m tests.distributed.kubernetes_trial jobset-fixed jobset-elastic trainjob-fixed trainjob-elastic

Commands, environment, volumes, probe and the order of jobs are read from the manifests and the Dockerfile. Kubeflow
Trainer's variables are those that its torch plugin sets. What a cluster has and one machine has not is replaced:

- two nodes of one process instead of four of eight (one of two at least instead of two of four);
- a model that trains in a few seconds instead of dsv3-16b, without its tokenizer; the other flags are the manifest's;
- folders below one instead of volumes, the loopback address instead of names of pods, a free port.

What is checked: pods find each other and train; every pod's probe succeeds meanwhile; SIGTERM to the first process of
every pod, as when nodes are drained, saves a checkpoint and ends each with the code of a run that is not complete; pods
that are made again go on from that step to the last one, and end with 0; the log has every step once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsv3_megatron.checkpoint.folder import latest_iteration
from dsv3_megatron.process.loopback import free_port
from tests.made_up_texts import write_texts

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "examples" / "kubernetes"
NODES, STEPS, STOPPED_CODE = 2, 120, 75
SMALL = (
    "--num-layers 2 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 --num-experts 4 "
    "--moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 --vocab-size 128 "
    "--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --precision fp32 --log-interval 1 --eval-interval 0 "
    f"--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --train-iters {STEPS}").split()
_LIMIT_S = 540.0


@dataclass
class Pod:
    """A container and the environment that it is started in.

    Attributes:
        name: Of the pod.
        command: Its first process.
        environment: Its variables.
        probe: Command of its liveness probe; None: it has none.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    probe: list[str] | None


def read_manifest(name: str, number: int = 0) -> dict[str, Any]:
    """One document of a manifest."""
    return dict(list(yaml.safe_load_all((MANIFESTS / name).read_text()))[number])


def entrypoint() -> list[str]:
    """The image's command, with this checkout in the place of the image's folder."""
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", (MANIFESTS / "Dockerfile").read_text(), re.MULTILINE)
    return [word.replace("/opt/dsv3", str(ROOT)) for word in json.loads(line)]


def pods_of(name: str, folder: Path, port: int) -> list[Pod]:
    """The pods of a JobSet or TrainJob, in the order in which their jobs are listed."""
    kind, _, flavour = name.partition("-")
    trainer: dict[str, Any] = {}
    if kind == "jobset":
        jobs = read_manifest(f"{name}.yaml")["spec"]["replicatedJobs"]
    else:
        runtime = read_manifest("runtime.yaml", ["fixed", "elastic"].index(flavour))
        jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        trainer = read_manifest("trainjob.yaml")["spec"]["trainer"]
    pods = []
    for job in jobs:
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        count = NODES if job["name"] == "node" else spec.get("parallelism", 1)
        for index in range(count):
            variables = {variable["name"]: variable["value"] for variable in container.get("env", [])}
            args = container.get("args", [])
            if trainer and job["name"] == "node":
                args = trainer["args"]
                variables |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": str(index),
                              "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                              "PET_MASTER_ADDR": "dsv3-node-0-0.dsv3", "PET_MASTER_PORT": str(port)}
            if spec.get("completionMode") == "Indexed":
                variables["JOB_COMPLETION_INDEX"] = str(index)
            pods.append(_on_this_machine(f"{job['name']}-{index}", container, args, variables, folder, port))
    return pods


def _on_this_machine(name: str, container: dict[str, Any], args: list[str], variables: dict[str, str], folder: Path,
                     port: int) -> Pod:
    """A pod with folders for volumes, this machine's address for names, and a run of small size."""
    places = {mount["mountPath"]: str(folder / (f"{name}-alive" if mount["name"] == "alive" else mount["name"]))
              for mount in container.get("volumeMounts", []) if mount["name"] != "shm"}

    def local(text: str) -> str:
        for place, path in places.items():
            text = re.sub(rf"(^|(?<=\s)){place}(?=/|\s|$)", path, text)
        return re.sub(r"^dsv3-\w+-0-0\.dsv3$", "127.0.0.1", text)

    small = {"NNODES": str(NODES), "PET_NNODES": str(NODES), "NPROC_PER_NODE": "1", "PET_NPROC_PER_NODE": "1",
             "ELASTIC_MIN": "1", "SHUTDOWN_TIMEOUT": "60"}
    variables = {key: small.get(key, local(value)) for key, value in variables.items()}
    if args and args[0] == "--preset":
        kept = args[2:]
        at = kept.index("--tokenizer-model")
        args = [*SMALL, *kept[:at], *kept[at + 2:]]
    kept_here = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment = kept_here | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "",
                               "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "MEET_PORT": str(port),
                               "RDZV_CONF": "last_call_timeout=3"} | variables
    probe = container.get("livenessProbe", {}).get("exec", {}).get("command")
    return Pod(name, [*entrypoint(), *map(local, args)], environment, [*map(local, probe)] if probe else None)


def start(pods: list[Pod], folder: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Start pods in their order, each with its own log."""
    started = {}
    for pod in pods:
        with (folder / f"{pod.name}.log").open("ab") as log:
            started[pod.name] = subprocess.Popen(pod.command, env=pod.environment, stdout=log, stderr=log,
                                                 stdin=subprocess.DEVNULL, start_new_session=True, cwd=folder)
    return started


def logged(folder: Path) -> list[int]:
    """The steps in the run's log, in order."""
    files = list((folder / "logs").rglob("metrics.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["iteration"] for record in records if record["kind"] == "step"]


def codes_of(nodes: dict[str, subprocess.Popen[bytes]], folder: Path) -> dict[str, int]:
    """Exit codes of pods that end."""
    deadline = time.monotonic() + _LIMIT_S
    while any(process.poll() is None for process in nodes.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"pods did not end; see {folder}")
        time.sleep(0.1)
    return {name: process.wait() for name, process in nodes.items()}


def run_chain(name: str, folder: Path) -> list[str]:
    """Run a manifest's pods, drain them, make them again; what was seen.

    Raises:
        AssertionError: something is not as it must be.
    """
    folder.mkdir(parents=True)
    (folder / "data").mkdir()
    for part in ("train", "valid"):
        write_texts(folder / "data" / f"{part}_text_document", 100)
    pods = pods_of(name, folder, free_port())
    nodes = {pod.name for pod in pods if pod.name.startswith("node")}
    seen, processes = [], {}
    try:
        processes = start(pods, folder)
        deadline = time.monotonic() + _LIMIT_S
        while len(logged(folder)) < 5 or len(list(folder.glob("*-alive/rank-0"))) < NODES:  # a watchdog's every 5 s
            assert all(processes[node].poll() is None for node in nodes), f"a node has ended; see {folder}"
            assert time.monotonic() < deadline, f"no step was logged; see {folder}"
            time.sleep(0.1)
        probes = {pod.name: subprocess.run(pod.probe, check=False).returncode for pod in pods if pod.probe}
        assert set(probes) == nodes and not any(probes.values()), probes
        for node in nodes:
            processes[node].send_signal(signal.SIGTERM)
        codes = codes_of({node: processes[node] for node in nodes}, folder)
        assert set(codes.values()) == {STOPPED_CODE}, f"{codes}; see {folder}"
        (checkpoints,) = (folder / "checkpoints").iterdir()
        stopped = latest_iteration(checkpoints)
        assert stopped is not None and stopped >= 5, stopped
        seen.append(f"drained at step {stopped}, codes {codes}, probes {probes}")
        processes |= start([pod for pod in pods if pod.name in nodes], folder)
        codes = codes_of({node: processes[node] for node in nodes}, folder)
        assert set(codes.values()) == {0} and latest_iteration(checkpoints) == STEPS, f"{codes}; see {folder}"
        assert logged(folder) == list(range(1, STEPS + 1)), logged(folder)
        seen.append(f"made again: codes {codes}, steps 1 to {STEPS} once each")
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return seen


def main() -> None:
    """Run the chains that are named, and print what was seen."""
    for name in sys.argv[1:]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="pods-", delete=False) as folder:
            for line in run_chain(name, Path(folder) / name):
                print(f"{name}: {line}", flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s, logs in {folder}", flush=True)


if __name__ == "__main__":
    main()
