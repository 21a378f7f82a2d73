"""The Slurm scripts around a made-up cluster: when a job goes back into the queue, and when it must not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.planning.precheck import check_memory

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
SCRIPT, SMALL = FOLDER / "pretrain_dsv3_2048.sbatch", FOLDER / "pretrain_dsv3_16b_64.sbatch"
LAST_STEP = 100


class Cluster:
    """A repository, Slurm's commands and a Python that are scripts; a "run" is a line of shell."""

    def __init__(self, folder: Path) -> None:
        self.output, self.requeued, self.started = folder / "run", folder / "requeued", folder / "started"
        self.checkpoints = self.output / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self.bin = folder / "bin"
        for name, text in {
            "repo/examples/pretrain_dsv3.sh": "true",
            "repo/examples/setup_environment.sh": f"echo {self.bin}/python",
            "repo/examples/slurm/job.sh": (FOLDER / "job.sh").read_text(),
            "bin/python": f'case "$*" in *--print-schedule*) echo \'{{"num_steps_before_stop": {LAST_STEP}}}\' ;; '
                          f'*) exec {sys.executable} "$@" ;; esac',
            "bin/scontrol": f'case "$1" in show) echo node0 ;; requeue) echo "$2" >>{self.requeued} ;; esac',
            "bin/srun": f'echo "$*" >>{self.started}; cd {self.checkpoints}; eval "$RUN"',
        }.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"#!/bin/bash\n{text}\n")
            file.chmod(0o755)
        self.repository = folder / "repo"

    def submit(self, run: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
        """One start of the job, in which `run` is what happens in the folder of checkpoints."""
        return subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, timeout=60,
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", "DSV3_REPO": str(self.repository), "RUN": run,
                 "OUTPUT": str(self.output), "DATA": "d", "VALID": "v", "TOKENIZER": "t", "SLURM_JOB_ID": "7",
                 "SLURM_SUBMIT_DIR": "/nowhere", "SLURM_JOB_NUM_NODES": "256", "SLURM_JOB_NODELIST": "node[0-255]"})


def saved(step: object) -> str:
    return f"echo {step} >latest_checkpointed_iteration.txt"


def directives(script: Path) -> dict[str, str]:
    """Slurm's options in a script."""
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


@pytest.mark.parametrize(("script", "num_gpus"), [(SCRIPT, 2048), (SMALL, 64)], ids=lambda value: str(value)[-16:])
def test_the_layout_fits_the_machine_that_it_is_for(tmp_path: Path, script: Path, num_gpus: int) -> None:
    """The flags that srun is given are those of a valid run on the job's GPUs, within what an H800 leaves to a run."""
    assert int(directives(script)["nodes"]) * int(directives(script)["gpus-per-node"]) == num_gpus
    cluster = Cluster(tmp_path)
    cluster.submit("exit 2", script)
    words = shlex.split(cluster.started.read_text())
    flags = words[words.index("--preset"):]
    run = parse_command(flags).run
    run.validate(num_gpus)
    (told,) = check_memory(run, num_gpus, hardware="h800")
    assert not told.is_warning and "of the 84.9 GB of an h800" in told.text
    (told,) = check_memory(run.override(transformer_impl="local"), num_gpus, hardware="h800")
    assert not told.is_warning


def test_both_jobs_end_alike() -> None:
    """What Slurm is told is the same but for the name and the number of nodes."""
    large, small = directives(SCRIPT), directives(SMALL)
    assert {name for name in large if large[name] != small.get(name)} == {"job-name", "nodes"}
    assert large.keys() == small.keys()


@pytest.mark.parametrize(("run", "is_requeued", "said"), [
    (f"{saved(60)}; exit 0", True, "saved at step 60 of 100: back into the queue"),
    (f"{saved(60)}; exit 143", True, "ended with exit code 143, saved at step 60 of 100: back into the queue"),
    (f"{saved(60)}; exit 4", True, "back into the queue"),
    (f"{saved(100)}; exit 0", False, "saved at step 100 of 100: done"),
    ("exit 1", False, "not requeued, nothing new was saved since step 50"),
    (f"{saved(60)}; exit 3", False, "not requeued, a guard ended the run"),
    # The node that srun ended because another one had ended.
    (f"{saved(60)}; echo >ended-by-guard.txt; exit 143", False, "not requeued, a guard ended the run"),
    (f"{saved(60)}; exit 2", False, "not requeued, a setting or an input is wrong"),
    (f"{saved('release')}; exit 1", False, "not requeued, nothing new was saved"),
])
def test_a_job_goes_back_into_the_queue_only_if_it_gets_on(tmp_path: Path, run: str, is_requeued: bool, said: str
                                                          ) -> None:
    cluster = Cluster(tmp_path)
    (cluster.checkpoints / "latest_checkpointed_iteration.txt").write_text("50\n")
    result = cluster.submit(run)
    assert said in result.stdout, result.stdout + result.stderr
    assert cluster.requeued.exists() == is_requeued
    assert result.returncode == int(run.rsplit(" ", 1)[1])


def test_an_earlier_guards_end_does_not_keep_a_job_that_gets_on_out_of_the_queue(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    (cluster.checkpoints / "ended-by-guard.txt").write_text("an earlier start\n")
    assert "back into the queue" in cluster.submit(f"{saved(60)}; exit 143").stdout
    assert cluster.requeued.read_text() == "7\n"
