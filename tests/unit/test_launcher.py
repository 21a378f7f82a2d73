"""examples/pretrain_dsv3.sh around a made-up Python: what it starts, how it passes on signals and exit codes.

The made-up Python is a shell script that passes for a complete environment; as torchrun it starts two "workers". So
the launcher's own behaviour is tested without torch, in a fraction of a second each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[2] / "examples" / "pretrain_dsv3.sh"

FAKE_PYTHON = """#!/bin/bash
worker() {{ # saves and ends on a signal, as a training process does
    trap 'echo INT >>"{folder}/signals"; {on_signal}' INT
    trap 'echo TERM >>"{folder}/signals"; {on_signal}' TERM
    for name in HUP QUIT USR1 USR2 XCPU ALRM; do
        trap "echo $name >>'{folder}/signals'; {on_signal}" "$name"
    done
    echo $BASHPID >>"{folder}/pids"
    echo started >>"{folder}/started"
    for _ in $(seq {worker_ticks}); do sleep 0.05; done
    [ -z "{told_code}" ] || echo "{told_code}" >"$DSV3_EXIT_CODE_FILE"
    exit {exit_code}
}}
case "$*" in
    *tomllib*) echo "complete" ;;
    *minimum_world_size*) echo 4 ;;
    *--check-only*) echo "$WORLD_SIZE" >"{folder}/world_size"; exit {check_code} ;;
    *local_torchrun*|*torch.distributed.run*)
        echo "$*" >"{folder}/torchrun"
        echo "$*" >>"{folder}/torchruns"
        if [ "{told_code}" = 5 ] && [ "$(wc -l <"{folder}/torchruns")" = 3 ]; then exit 0; fi
        echo "OMP_NUM_THREADS=$OMP_NUM_THREADS" >>"{folder}/torchrun"
        trap 'exit 99' INT TERM
        worker & first=$!
        worker & second=$!
        wait $first; a=$?
        wait $second; b=$?
        exit $((a > b ? a : b))
        ;;
    *{slow_stage}*) echo $$ >"{folder}/slow"; sleep 60 ;;
    *)
        echo "$*" >>"{folder}/other"
        echo "printed by $*"
        echo "$* OMP_NUM_THREADS=${{OMP_NUM_THREADS-unset}}" >>"{folder}/threads"
        ;;
esac
"""


class Launch:
    """The launcher with a made-up Python that records into a folder."""

    def __init__(self, folder: Path, *, worker_ticks: int = 0, exit_code: int = 0, check_code: int = 0,
                 on_signal: str = "exit 0", slow_stage: str = "no such stage", told_code: str = "") -> None:
        self.folder = folder
        python = folder / "python"
        python.write_text(FAKE_PYTHON.format(folder=folder, worker_ticks=worker_ticks, exit_code=exit_code,
                                             check_code=check_code, on_signal=on_signal, slow_stage=f'"{slow_stage}"',
                                             told_code=told_code))
        python.chmod(0o755)
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.environment = inherited | {"PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *flags: str, ignored: tuple[int, ...] = (), launcher: Path = LAUNCHER, **variables: str
              ) -> subprocess.Popen[str]:
        """The launcher in a session of its own, with signals that it is started to ignore."""
        def ignore() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        return subprocess.Popen(["bash", str(launcher), *flags], env=self.environment | variables, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                start_new_session=True, preexec_fn=ignore)

    def run(self, *flags: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*flags, **variables)
        stdout, stderr = process.communicate(timeout=30)
        return process.returncode, stdout, stderr

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def wait_for(self, name: str, lines: int) -> None:
        deadline = time.monotonic() + 20
        while self.read(name).count("\n") < lines:
            assert time.monotonic() < deadline, f"{name} did not get {lines} lines"
            time.sleep(0.02)


def test_without_a_gpu_the_layout_decides_the_number_of_processes(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    code, _, stderr = launch.run("--preset", "tiny", "--pipeline-model-parallel-size", "2")
    assert code == 0, stderr
    assert "--standalone" in launch.read("torchrun")
    assert "--nproc-per-node 4" in launch.read("torchrun")
    assert ("-m dsv3_megatron train --preset tiny --pipeline-model-parallel-size 2 --resume auto\n"
            in launch.read("torchrun"))
    assert launch.read("world_size") == "4\n"


def test_several_processes_get_a_share_of_the_cores(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.run("--preset", "tiny", NPROC_PER_NODE="64")
    assert f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 64)}\n" in launch.read("torchrun")
    launch.run("--preset", "tiny", NPROC_PER_NODE="64", OMP_NUM_THREADS="3")
    assert "OMP_NUM_THREADS=3\n" in launch.read("torchrun")


def test_nodes_come_from_the_environment(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    code, _, stderr = launch.run("--preset", "dsv3-671b", NNODES="256", NODE_RANK="7", MASTER_ADDR="node0",
                                 MASTER_PORT="1234", GPUS_PER_NODE="8")
    assert code == 0, stderr
    assert ("--nnodes 256 --node-rank 7 --master-addr node0 --master-port 1234 --nproc-per-node 8"
            in launch.read("torchrun"))
    assert launch.read("world_size") == "2048\n"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "NODE_RANK"])
def test_several_nodes_need_an_address_and_a_rank(tmp_path: Path, missing: str) -> None:
    given = {"MASTER_ADDR": "node0", "NODE_RANK": "0"}
    del given[missing]
    launch = Launch(tmp_path)
    code, _, stderr = launch.run("--preset", "tiny", NNODES="2", **given)
    assert code == 2
    assert f"{missing} is not set: with NNODES=2 give" in stderr
    assert launch.read("torchrun") == ""


def test_a_wrong_setting_ends_before_torchrun_with_its_exit_code(tmp_path: Path) -> None:
    launch = Launch(tmp_path, check_code=2)
    assert launch.run("--preset", "tiny", "--micro-batch-size", "5")[0] == 2
    assert launch.read("torchrun") == ""


def test_a_launcher_that_changes_on_disk_ends_as_it_began(tmp_path: Path) -> None:
    """bash reads a script as it goes: what is written over it in place would be run when training is over."""
    launch = Launch(tmp_path, worker_ticks=20)
    copy = tmp_path / "checkout" / "examples" / LAUNCHER.name
    copy.parent.mkdir(parents=True)
    copy.write_text(LAUNCHER.read_text())
    (copy.parent / "setup_environment.sh").write_text((LAUNCHER.parent / "setup_environment.sh").read_text())
    process = launch.start("--preset", "tiny", launcher=copy)
    launch.wait_for("started", 2)
    with copy.open("r+b") as stream:
        stream.write(b"echo changed; exit 55\n" * 3000)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, ""), stderr


@pytest.mark.parametrize("name", ["pretrain_dsv3.sh", "post_train_dsv3.sh", "setup_environment.sh"])
def test_scripts_that_work_for_long_are_read_whole_first(name: str) -> None:
    last = (LAUNCHER.parent / name).read_text().splitlines()[-1]
    assert last.split(" #")[0] == 'main "$@"; exit'


def test_exit_code_of_a_failed_run(tmp_path: Path) -> None:
    assert Launch(tmp_path, exit_code=7).run("--preset", "tiny")[0] == 7


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_workers_own_exit_code_comes_through_torchrun(tmp_path: Path, code: int) -> None:
    """torchrun ends with 1 whatever a worker ends with; its own code is in the file that the launcher named."""
    launch = Launch(tmp_path, exit_code=1, told_code=str(code))
    assert launch.run("--preset", "tiny")[0] == code
    assert Launch(tmp_path, exit_code=137, told_code=str(code)).run("--preset", "tiny")[0] == 137


@pytest.mark.parametrize("told", [[], ["--overwrite-run"], ["--resume", "load"], ["--resume=auto"]])
def test_a_run_whose_next_phase_has_another_layout_is_started_again(told: list[str], tmp_path: Path) -> None:
    """Twice here; what it saved is gone on from, and nothing is removed a second time."""
    launch = Launch(tmp_path, exit_code=0, told_code="5")
    assert launch.run("--preset", "tiny", *told, "--seed", "2")[0] == 0
    first, *others = (line.partition(" train ")[2] for line in launch.read("torchruns").splitlines())
    assert first == " ".join(["--preset tiny", *told, "--seed 2", *([] if told else ["--resume auto"])])
    assert others == ["--preset tiny --seed 2 --resume auto"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_worker_once_and_the_run_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    launch = Launch(tmp_path, worker_ticks=400)
    process = launch.start("--preset", "tiny")
    launch.wait_for("started", 2)
    os.killpg(process.pid, number)  # as a terminal does
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0  # torchrun saw its workers end by themselves, it was not signalled itself
    assert launch.read("signals") == f"{number.name[3:]}\n" * 2
    assert f"{number.name}: the run saves a checkpoint and ends; once more ends it at once" in stderr


def test_a_second_signal_ends_a_run_that_does_not_react(tmp_path: Path) -> None:
    launch = Launch(tmp_path, worker_ticks=400, on_signal="true")
    process = launch.start("--preset", "tiny")
    launch.wait_for("started", 2)
    process.send_signal(signal.SIGINT)
    launch.wait_for("signals", 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGKILL


def test_nodes_that_come_and_go(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    code, _, stderr = launch.run("--preset", "tiny", NNODES="2:5", MASTER_ADDR="meet", MASTER_PORT="1234",
                                 NPROC_PER_NODE="2", RDZV_CONF="last_call_timeout=5", RDZV_ID="mine")
    assert code == 0, stderr
    assert launch.read("world_size") == "4\n"
    said = launch.read("torchrun")
    assert ("--nnodes 2:5 --rdzv-backend c10d --rdzv-endpoint meet:1234 --rdzv-id mine --rdzv-conf "
            "is_host=0,last_call_timeout=5 --max-restarts 100 --nproc-per-node 2") in said
    assert said.splitlines()[0].endswith("train --preset tiny --resume auto")


def test_nodes_that_come_and_go_where_the_launcher_begins_again(tmp_path: Path) -> None:
    """Started behind a shell's `&` it ignores signals and begins again without that, in the same environment."""
    launch = Launch(tmp_path)
    process = launch.start("--preset", "tiny", ignored=(signal.SIGINT, signal.SIGQUIT), NNODES="2:5",
                           MASTER_ADDR="meet", NPROC_PER_NODE="2")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "--nnodes 2:5 " in launch.read("torchrun")


@pytest.mark.parametrize(("given", "said"), [
    ({"NNODES": "3:2", "MASTER_ADDR": "meet"}, "NNODES='3:2' must be the fewest and the most nodes of the run"),
    ({"NNODES": "1:", "MASTER_ADDR": "meet"}, "NNODES='1:' must be"),
    ({"NNODES": "1:2"}, "MASTER_ADDR is not set: with NNODES=1:2 give the host on which `dsv3 rendezvous` listens"),
    ({"NNODES": "1:2", "MASTER_ADDR": "meet", "MAX_RESTARTS": "many"}, "MAX_RESTARTS='many' must be a whole number"),
])
def test_wrong_nodes_that_come_and_go(tmp_path: Path, given: dict[str, str], said: str) -> None:
    code, _, stderr = Launch(tmp_path).run("--preset", "tiny", **given)
    assert code == 2 and said in stderr


def test_a_node_that_is_told_to_stop_leaves_and_one_whose_processes_told_a_code_ends_with_it(tmp_path: Path) -> None:
    """torchrun would wait for the other nodes after its processes have ended: it is ended too."""
    elastic = {"NNODES": "1:2", "MASTER_ADDR": "meet"}
    launch = Launch(tmp_path, worker_ticks=200)
    process = launch.start("--preset", "tiny", **elastic)
    launch.wait_for("started", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert launch.read("signals").split() == ["TERM", "TERM"]
    assert Launch(tmp_path, exit_code=3, told_code="3").run("--preset", "tiny", **elastic)[0] == 3


def test_it_goes_on_if_there_is_something_to_go_on_from_unless_it_is_told(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.run("--preset", "tiny")
    assert launch.read("torchrun").splitlines()[0].endswith("train --preset tiny --resume auto")
    for told in (["--resume", "load"], ["--resume=load"], ["--overwrite-run"]):
        launch.run("--preset", "tiny", *told)
        assert launch.read("torchrun").splitlines()[0].endswith(f"train --preset tiny {' '.join(told)}")


@pytest.mark.parametrize("arguments", ["--print-model --json", "--print-schedule", "--plot-schedule a.png",
                                       "--plot-schedule=a.png"])
def test_what_prints_starts_no_torchrun(arguments: str, tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    code, stdout, _ = launch.run("--preset", "laptop", *arguments.split())
    assert code == 0
    assert launch.read("other") == f"-m dsv3_megatron train --preset laptop {arguments}\n"
    assert launch.read("torchrun") == ""


class Quickstart(Launch):
    """The launcher without flags, in a folder of its own."""

    def __init__(self, folder: Path, **options: object) -> None:
        super().__init__(folder, **options)  # type: ignore[arg-type]
        self.run_dir = folder / "run"
        self.environment |= {"RUN_DIR": str(self.run_dir)}


def test_the_quickstart_runs_every_stage_and_skips_what_is_done(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path)
    code, _, stderr = quickstart.run()
    assert code == 0, stderr
    modules = [line.split()[1] if line.startswith("-m") else line.split()[0].rsplit("/", 1)[-1]
               for line in quickstart.read("other").splitlines()]
    assert modules == ["dsv3_megatron.data.corpus", "train_tokenizer.py", "preprocess_data.py",
                       "preprocess_data.py", "dsv3_megatron.reports.summary", "generate.py"]
    assert "--nproc-per-node 4" in quickstart.read("torchrun")
    (tmp_path / "other").unlink()
    (tmp_path / "torchrun").unlink()
    code, _, stderr = quickstart.run()
    assert code == 0
    assert stderr.count("done before") == 4
    summary, generate = quickstart.read("other").splitlines()
    assert summary == f"-m dsv3_megatron.reports.summary {quickstart.run_dir}"
    assert f"tools/generate.py --load {quickstart.run_dir}/checkpoints --prompts" in generate
    assert quickstart.read("torchrun") == ""
    assert quickstart.run("--fresh")[0] == 0
    assert quickstart.read("torchrun") != ""


def test_an_interrupted_quickstart_resumes_its_training(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path, worker_ticks=400)
    process = quickstart.start()
    quickstart.wait_for("started", 2)
    assert "--load" not in quickstart.read("torchrun")
    (quickstart.run_dir / "checkpoints" / "iter_0000100").mkdir(parents=True)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on from here" in stderr
    again = Quickstart(tmp_path)
    code, _, stderr = again.run()
    assert code == 0, stderr
    assert f"--load {quickstart.run_dir}/checkpoints" in again.read("torchrun")


def test_a_quickstart_stopped_before_its_first_checkpoint_starts_anew_in_its_folders(tmp_path: Path) -> None:
    """The run is told that it goes on, so that it takes its own logs for its own; it removes nothing by itself."""
    quickstart = Quickstart(tmp_path, exit_code=5)
    assert quickstart.run()[0] == 5
    log = quickstart.run_dir / "tensorboard" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("a step\n")
    again = Quickstart(tmp_path)
    code, _, stderr = again.run()
    assert code == 0, stderr
    assert f"--load {quickstart.run_dir}/checkpoints" in again.read("torchrun") and log.exists()
    assert "resuming from" not in stderr


def test_a_stage_that_fails_stops_the_quickstart_with_its_exit_code(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path, exit_code=5)
    code, _, stderr = quickstart.run()
    assert code == 5
    assert "[4/6] training on 4 processes: failed with exit code 5" in stderr
    assert "summary" not in quickstart.read("other")


def has_ended(pid: int) -> bool:
    """Whether a process runs no more within 5 s; one whose new parent has not asked for its exit code has ended too."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("stage", ["data.corpus", "preprocess_data.py"])
def test_a_signal_ends_a_stage_and_leaves_nothing_running(tmp_path: Path, stage: str) -> None:
    quickstart = Quickstart(tmp_path, slow_stage=stage)
    process = quickstart.start()
    quickstart.wait_for("slow", 1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on from here" in stderr
    assert has_ended(int(quickstart.read("slow")))
    assert quickstart.read("torchrun") == ""
