"""What examples/pretrain_dsv3.sh makes of its environment: wrong values, GPUs that CUDA shows, cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.test_launcher import LAUNCHER, Launch, Quickstart

WRONG_NUMBERS = ["-1", "two", "08", "1e3", "", " ", " 2", "2 ", "+2", "0x2", "99999999999", "1.5"]
LOWEST_IS_ONE = ["NNODES", "NPROC_PER_NODE", "GPUS_PER_NODE", "MASTER_PORT", "SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS"]


def refused(folder: Path, **variables: str) -> str:
    """The one line of a launch that must not start anything, not even the set-up."""
    launch = Launch(folder)
    code, stdout, stderr = launch.run("--preset", "tiny", **variables)
    assert code == 2 and stdout == "", (code, stderr)
    assert sorted(path.name for path in folder.iterdir()) == ["python"], "something was started"
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("value", WRONG_NUMBERS)
@pytest.mark.parametrize("name", [*LOWEST_IS_ONE, "NODE_RANK"])
def test_what_is_no_number_is_refused(name: str, value: str, tmp_path: Path) -> None:
    line = refused(tmp_path, **{name: value})
    assert f"{name}='{value}' must be a whole number from " in line and "set it so, or unset it" in line


@pytest.mark.parametrize(("name", "value"), [
    *((name, "0") for name in LOWEST_IS_ONE), ("MASTER_PORT", "99999"), ("NPROC_PER_NODE", "99999"),
    ("GPUS_PER_NODE", "99999"), ("SHUTDOWN_TIMEOUT", "99999"), ("OMP_NUM_THREADS", "99999"), ("NODE_RANK", "1"),
    ("NODE_RANK", "99999")])
def test_a_number_out_of_range_is_refused(name: str, value: str, tmp_path: Path) -> None:
    assert f"{name}='{value}' must be a whole number from " in refused(tmp_path, **{name: value})


def test_a_node_has_a_rank_below_the_number_of_nodes(tmp_path: Path) -> None:
    line = refused(tmp_path, NNODES="2", NODE_RANK="2", MASTER_ADDR="node0")
    assert line == ("error: NODE_RANK='2' must be a whole number from 0 to 1, written in digits alone (this node's "
                    "rank among NNODES=2); set it so, or unset it")


@pytest.mark.parametrize("value", ["", " ", "two hosts", "a,b"])
def test_an_address_that_cannot_be_is_refused(value: str, tmp_path: Path) -> None:
    assert f"MASTER_ADDR='{value}' must be the name or address of node 0's host" in refused(tmp_path, MASTER_ADDR=value)


def test_a_temporary_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, TMPDIR=str(tmp_path / "missing"))
    assert f"TMPDIR='{tmp_path}/missing' must be a folder that this user may write to; make it" in line


@pytest.mark.parametrize(("value", "said"), [
    ("", "is blank"), ("  ", "is blank"), ("{}/file", "is no folder"), ("{}/file/below", "is no folder"),
    (str(LAUNCHER.parents[1]), "holds this repository"), (str(LAUNCHER.parents[2]), "holds this repository")])
def test_a_folder_of_the_quickstart_that_cannot_be_is_refused(value: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    launch = Launch(tmp_path)
    code, _, stderr = launch.run(RUN_DIR=value.format(tmp_path))
    assert code == 2 and said in stderr and "RUN_DIR='" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "python"]


def test_fresh_empties_no_folder_of_something_else(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path)
    quickstart.run_dir.mkdir()
    (quickstart.run_dir / "thesis.tex").write_text("years of work")
    code, _, stderr = quickstart.run("--fresh")
    assert code == 2 and "holds other things than a quickstart's; remove them yourself" in stderr
    assert (quickstart.run_dir / "thesis.tex").read_text() == "years of work"


# -- GPUs ----------------------------------------------------------------------------------------


def with_gpus(folder: Path, count: int) -> dict[str, str]:
    """Variables in which nvidia-smi lists so many GPUs."""
    tools = folder.parent / f"{folder.name}-bin"
    tools.mkdir()
    lines = "".join(f"echo 'GPU {index}: H200 (UUID: GPU-{index})'\n" for index in range(count))
    (tools / "nvidia-smi").write_text(f"#!/bin/bash\n{lines}")
    (tools / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("visible", "expected"), [
    (None, 8), ("0", 1), ("3,1", 2), ("1, 2", 2), ("1,-1,0", 1), ("-1", 0), ("-1,0", 0), ("", 0), ("none", 0),
    ("void", 0), ("NoDevFiles", 0), ("0,1,8,2", 2), ("GPU-8932f937-d72c,GPU-1a2b", 2), ("MIG-GPU-8932f937/1/2", 1),
    ("0,GPU-1a2b,-1,3", 2)])
def test_gpus_are_counted_as_cuda_shows_them(visible: str | None, expected: int, tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    del launch.environment["CUDA_VISIBLE_DEVICES"]
    code, _, stderr = launch.run("--preset", "tiny", **with_gpus(tmp_path, 8),
                                 **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert code == 0, stderr
    # Without a GPU it is as many as the layout needs, which the made-up Python puts at 4.
    assert f"--nproc-per-node {expected or 4} " in launch.read("torchrun")


@pytest.mark.parametrize("visible", ["two", "08", "1e3", " ", "0,,1", "all", "0;1", "99999", "0,0", "GPU-a,GPU-a"])
def test_devices_that_name_nothing_are_refused(visible: str, tmp_path: Path) -> None:
    line = refused(tmp_path, CUDA_VISIBLE_DEVICES=visible, **with_gpus(tmp_path, 8))
    assert f"CUDA_VISIBLE_DEVICES='{visible}'" in line and "or nothing for no GPU" in line or "name each once" in line


@pytest.mark.parametrize("name", ["NPROC_PER_NODE", "GPUS_PER_NODE"])
def test_no_more_processes_than_gpus(name: str, tmp_path: Path) -> None:
    line = refused(tmp_path, CUDA_VISIBLE_DEVICES="0,1", **{name: "3"}, **with_gpus(tmp_path, 8))
    assert f"{name}='3' must be a whole number from 1 to 2" in line


# -- cores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["1", "64"])
def test_threads_asked_for_are_not_taken_for_cores(threads: str, tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path)
    assert quickstart.run(OMP_NUM_THREADS=threads)[0] == 0
    assert f"--workers {len(os.sched_getaffinity(0))}\n" in quickstart.read("other")
    assert f"OMP_NUM_THREADS={threads}\n" in quickstart.read("torchrun")


def test_the_quickstart_generates_on_all_cores(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path)
    assert quickstart.run()[0] == 0
    (line,) = [line for line in quickstart.read("threads").splitlines() if "generate.py" in line]
    assert line.endswith(f" OMP_NUM_THREADS={len(os.sched_getaffinity(0))}")
