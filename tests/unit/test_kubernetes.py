"""examples/kubernetes: what a pod of each manifest starts the launcher with, that its flags are a run's, and its probe.

Against published schemas the manifests are checked by tests/kubernetes_schemas.py, which needs packages of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.world_size import largest_world_size

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "kubernetes"
MEET = "dsv3-meet-0-0.dsv3"


def manifest(name: str, number: int = 0) -> dict[str, Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))[number]


def pods(jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {job["name"]: job["template"]["spec"]["template"]["spec"] for job in jobs}


FIXED = pods(manifest("jobset-fixed.yaml")["spec"]["replicatedJobs"])
ELASTIC = pods(manifest("jobset-elastic.yaml")["spec"]["replicatedJobs"])
RUNTIMES = [pods(manifest("runtime.yaml", number)["spec"]["template"]["spec"]["replicatedJobs"]) for number in (0, 1)]
TRAINER = manifest("trainjob.yaml")["spec"]["trainer"]
# What Kubeflow Trainer's torch plugin sets in the container `node`.
PET = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "dsv3-node-0-0.dsv3",
       "PET_MASTER_PORT": "29500"}


def started(tmp_path: Path, pod: dict[str, Any], *flags: str, **given: str) -> dict[str, str]:
    """What node.sh starts the launcher with, in the environment of a pod: its variables and its flags."""
    examples = tmp_path / "examples"
    (examples / "kubernetes").mkdir(parents=True)
    shutil.copy(FOLDER / "node.sh", examples / "kubernetes")
    (examples / "pretrain_dsv3.sh").write_text('env -0 >"$SAID"; printf "%s\\0" "FLAGS=$*" >>"$SAID"\n')
    (container,) = pod["containers"]
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    own["DSV3_ALIVE"] = str(tmp_path / own["DSV3_ALIVE"].lstrip("/"))
    said = tmp_path / "said"
    subprocess.run(["bash", str(examples / "kubernetes" / "node.sh"), *(flags or container["args"])], check=True,
                   env={"PATH": os.environ["PATH"], "SAID": str(said)} | own | given)
    return dict(pair.split("=", 1) for pair in said.read_text().split("\0") if "=" in pair)


@pytest.mark.parametrize("name", ["JobSet", "TrainJob"])
def test_nodes_that_stay(tmp_path: Path, name: str) -> None:
    if name == "JobSet":
        found = started(tmp_path, FIXED["node"], JOB_COMPLETION_INDEX="3")
    else:
        found = started(tmp_path, RUNTIMES[0]["node"], *TRAINER["args"], **PET, JOB_COMPLETION_INDEX="3")
    assert {key: found[key] for key in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")} == {
        "NNODES": "4", "NODE_RANK": "3", "NPROC_PER_NODE": "8", "MASTER_ADDR": "dsv3-node-0-0.dsv3",
        "MASTER_PORT": "29500"}
    assert not any(key.startswith("PET_") for key in found) and found["DSV3_STOPPED_CODE"] == "75"
    run = parse_command(found["FLAGS"].split()).run
    run.validate(32)
    assert run.checkpoint.resume == "auto"


@pytest.mark.parametrize("name", ["JobSet", "TrainJob"])
def test_nodes_that_come_and_go(tmp_path: Path, name: str) -> None:
    if name == "JobSet":
        found = started(tmp_path, ELASTIC["node"], JOB_COMPLETION_INDEX="3")
    else:
        found = started(tmp_path, RUNTIMES[1]["node"], *TRAINER["args"], **PET, JOB_COMPLETION_INDEX="3")
    assert {key: found[key] for key in ("NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")} == {
        "NNODES": "2:4", "NPROC_PER_NODE": "8", "MASTER_ADDR": MEET, "MASTER_PORT": "29500"}
    assert "NODE_RANK" not in found
    run = parse_command(found["FLAGS"].split()).run
    assert [largest_world_size(run, 8 * nodes) for nodes in (2, 3, 4)] == [16, 24, 32]


def test_meeting_places_and_volumes_are_those_that_are_named() -> None:
    claims = {claim["metadata"]["name"] for claim in yaml.safe_load_all((FOLDER / "volumes.yaml").read_text())}
    for found in (FIXED, ELASTIC, *RUNTIMES):
        pod = found["node"]
        assert {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]
                if "persistentVolumeClaim" in volume} == claims
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        grace = int({variable["name"]: variable["value"] for variable in container["env"]}["SHUTDOWN_TIMEOUT"])
        assert grace < pod["terminationGracePeriodSeconds"]
    assert [list(found) for found in (ELASTIC, RUNTIMES[1])] == [["meet", "node"]] * 2
    assert ELASTIC["meet"]["containers"][0]["args"] == ["rendezvous"]


def test_the_probe_fails_where_a_rank_gave_no_sign_of_life(tmp_path: Path) -> None:
    command = FIXED["node"]["containers"][0]["livenessProbe"]["exec"]["command"]
    command = [word.replace("/alive", str(tmp_path)) for word in command]

    def is_alive() -> bool:
        return subprocess.run(command, check=False).returncode == 0

    assert is_alive()  # no rank is at work
    for rank in range(2):
        (tmp_path / f"rank-{rank}").touch()
    assert is_alive()
    long_ago = time.time() - 3600
    os.utime(tmp_path / "rank-1", (long_ago, long_ago))
    assert not is_alive()
