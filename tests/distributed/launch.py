"""Runs a function in several gloo processes on this machine and hands back what each of them returned.

A test calls `run_ranks(4, check_something, argument)`; `check_something` is a module-level function and
finds its process group already started. The first rank that fails ends the others, and its traceback is
the error of the test.

Importing torch and Megatron-Core takes seconds per process, so it is done once: the first call starts a
server process that imports them and forks every rank, of this call and of later ones. Each rank is still
a process of its own on one thread, in which nothing has run before. A command (`run_ranks` with a module's
name, `run_command`) is run in such a process too, as `python -m` would; that it also starts from nothing
is shown by the tests that start it with torchrun or by hand.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

# The server imports the package before it has prepared for it; nothing of Megatron-Core is in this module.
from dsv3_megatron.certification.rank_forks import RankError as RankError
from dsv3_megatron.certification.rank_forks import end_ranks, fork_rank, leave_result, output_of, supervise
from dsv3_megatron.process.parent import freeze_before_forks

ROOT = Path(__file__).resolve().parents[2]
# What runs, evaluations and the tests' own modules import, and what torch imports where it is first used.
_PRELOADED = ("dsv3_megatron.runs.trainer", "dsv3_megatron.runs.evaluator", "dsv3_megatron.commands.train",
              "dsv3_megatron.commands.evaluate", "dsv3_megatron.commands.generate", "torch._dynamo", "pytest",
              "tests.distributed.small_run")

_server: subprocess.Popen | None = None


def run_ranks(num_ranks: int, function_or_module: Callable[..., Any] | str, *args: Any, timeout_s: float = 240.0,
              environment: dict[str, str] | None = None, backend: str | None = None) -> list[Any]:
    """Run `function(*args)` in `num_ranks` processes that share a gloo process group.

    Args:
        num_ranks: Processes.
        function_or_module: A function at the top level of a module, called where `prepare()` and
            `start_process_group()` have run; or the name of a module, run as `python -m NAME *args` would be,
            with torchrun's environment, which starts its own group.
        args: Picklable arguments, the same for every rank.
        timeout_s: Seconds after which the ranks are killed; their stacks are in the error.
        environment: Variables to set besides torchrun's; they win. For a function they are set after torch
            is imported.
        backend: Name of a backend of `tests/nccl_like.py` for the process group of a function; None: gloo.

    Returns:
        What each rank returned, by rank; for a module, what each printed to stdout.

    Raises:
        RankError: a rank raised, exited with an error, or was killed.
        TimeoutError: they took longer than timeout_s.
    """
    import torch

    is_module = isinstance(function_or_module, str)
    assert backend is None or not is_module, "a module starts its own process group"
    # This process holds the ranks' store, so that no port has to be guessed free.
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        if not isinstance(function_or_module, str):
            # By file as well as by name: pytest's import mode gives modules names that only pytest knows.
            module = sys.modules[function_or_module.__module__]
            target = (function_or_module.__module__, module.__file__, function_or_module.__qualname__)
            (folder / "call.pickle").write_bytes(pickle.dumps((target, args)))
        answer = _ask_server({
            "folder": name, "num_ranks": num_ranks, "timeout_s": timeout_s,
            "module": [function_or_module, *map(str, args)] if is_module else None, "backend": backend,
            # As under torchrun: ranks are clients of a store that somebody else serves.
            "environment": {"LOCAL_WORLD_SIZE": str(num_ranks), "WORLD_SIZE": str(num_ranks),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                            "TORCHELASTIC_RUN_ID": "run_ranks", **(environment or {})}})
        if answer["error"] == "timeout":
            raise TimeoutError(answer["text"])
        if answer["error"]:
            raise RankError(answer["text"])
        if is_module:
            return [output_of(folder, rank, "stdout") for rank in range(num_ranks)]
        return [pickle.loads((folder / f"result-{rank}.pickle").read_bytes()) for rank in range(num_ranks)]


def run_command(module: str, *args: Any, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE *args` in one process without torchrun's environment, whatever its exit code is.

    Returns:
        Arguments, exit code, stdout and stderr.

    Raises:
        TimeoutError: it took longer than timeout_s.
    """
    command = [module, *map(str, args)]
    with tempfile.TemporaryDirectory(prefix="command-") as name:
        answer = _ask_server({"folder": name, "num_ranks": 1, "timeout_s": timeout_s, "module": command,
                              "environment": None})
        if answer["error"] == "timeout":
            raise TimeoutError(answer["text"])
        stdout, stderr = (output_of(Path(name), 0, stream) for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, int(answer["code"]), stdout, stderr)


def _ask_server(request: dict[str, Any]) -> dict[str, Any]:
    """Send one request to the server, started if need be, and wait for its answer."""
    global _server
    if _server is None or _server.poll() is not None:
        paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
        variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                     "GLOO_SOCKET_IFNAME": "lo"}
        _server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=variables, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_stop_server)
    assert _server.stdin is not None and _server.stdout is not None
    try:
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        answer = _server.stdout.readline()
    except BaseException:
        _stop_server()
        raise
    if not answer:
        raise RankError(f"the server that starts ranks ended with code {_server.wait()}; see its output")
    return json.loads(answer)


def _stop_server() -> None:
    """End the server; it ends its ranks first."""
    global _server
    if _server is not None:
        _server.terminate()
        _server.wait()
        _server = None


# ---- the server ----


def _serve() -> None:
    """Import what every rank needs, then fork ranks for each request until the asking process ends."""
    from dsv3_megatron.platform import prepare

    prepare()  # before anything imports Megatron-Core, as every entry point does
    for name in _PRELOADED:
        importlib.import_module(name)
    freeze_before_forks()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        folder, num_ranks = Path(request["folder"]), request["num_ranks"]
        running: dict[int, int] = {}
        try:
            for rank in range(num_ranks):
                running[rank] = _start_rank(request, rank, folder, answers)
            answer = asdict(supervise(dict(running), folder, request["timeout_s"], ends_with_parent=True))
        finally:
            end_ranks(running)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _start_rank(request: dict[str, Any], rank: int, folder: Path, answers: IO[str]) -> int:
    """Start one rank; returns its process id, which is its session's as well."""
    given = request["environment"]
    environment: dict[str, str | None] = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if given is not None:
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), **given}

    def body() -> int:
        answers.close()
        if request["module"]:
            return _run_module(*request["module"])
        return leave_result(folder, rank, lambda: _call(folder, request["backend"]))

    return fork_rank(rank, folder, environment, body)


# ---- one rank ----


def _load(target: tuple[str, str, str]) -> Callable[..., Any]:
    """The function in this process, imported under the name its file has below the repository's root."""
    name, file, qualname = target
    path = Path(file).resolve()
    if path.is_relative_to(ROOT):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found: Any = importlib.import_module(name)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _call(folder: Path, backend: str | None) -> Any:
    """Start the group and call the function; returns its result."""
    import torch

    from dsv3_megatron.parallel.groups import destroy_groups, start_process_group
    from dsv3_megatron.platform import prepare

    torch.set_num_threads(1)
    device = prepare()
    if backend is not None:
        from tests.nccl_like import register

        register()
        device = replace(device, backend=backend)
    start_process_group(device)
    target, args = pickle.loads((folder / "call.pickle").read_bytes())
    result = _load(target)(*args)
    torch.distributed.barrier()
    destroy_groups()
    return result


def _run_module(name: str, *arguments: str) -> int:
    """Run a module as `python -m` does; returns its exit code, after what an interpreter does as it ends."""
    sys.argv[:] = [name, *arguments]
    code = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - told as the interpreter tells it
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    # The folder of this file, which holds tests, must not shadow modules.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    _serve()
