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
import contextlib
import gc
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
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# Ranks that fail because another did fail a moment later: wait for the first error before ending the rest.
_GRACE_S = 1.0
_TAIL_CHARACTERS = 4000
# What runs, evaluations and the tests' own modules import, and what torch imports where it is first used.
_PRELOADED = ("dsv3_megatron.runs.trainer", "dsv3_megatron.runs.evaluator", "dsv3_megatron.commands.train",
              "dsv3_megatron.commands.evaluate", "dsv3_megatron.commands.generate", "torch._dynamo", "pytest",
              "tests.distributed.small_run")

_server: subprocess.Popen | None = None


class RankError(AssertionError):
    """A rank failed; the message holds its traceback and the end of what it printed."""


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
            return [_output(folder, rank, "stdout") for rank in range(num_ranks)]
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
        stdout, stderr = (_output(Path(name), 0, stream) for stream in ("stdout", "stderr"))
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
    gc.collect()
    gc.freeze()  # what is imported is no garbage of a rank's, and need not be looked through there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        folder, num_ranks = Path(request["folder"]), request["num_ranks"]
        running: dict[int, int] = {}
        try:
            for rank in range(num_ranks):
                running[rank] = _fork_rank(request, rank, folder, answers)
            answer = _supervise(dict(running), folder, request["timeout_s"])
        finally:
            for pid in running.values():
                # A rank's session outlives it while a helper process of it (a save's writer) still runs.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork_rank(request: dict[str, Any], rank: int, folder: Path, answers: IO[str]) -> int:
    """Start one rank; returns its process id, which is its session's as well."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        return pid
    try:
        with contextlib.suppress(PermissionError):
            os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answers.close()
        for descriptor, name in ((0, None), (1, f"stdout-{rank}"), (2, f"stderr-{rank}")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(os.devnull, os.O_RDONLY) if name is None else os.open(folder / name, flags), descriptor)
        if request["environment"] is None:
            for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(variable, None)
        else:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **request["environment"]})
        os._exit(_run_module(*request["module"]) if request["module"] else _run_function(
            folder, rank, request["backend"]))
    finally:
        os._exit(1)


def _supervise(running: dict[int, int], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Wait until every rank has ended well, one has failed, or time is up."""
    deadline = time.monotonic() + timeout_s
    parent = os.getppid()
    codes: dict[int, int] = {}
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            sys.exit("the process that asked for the ranks is gone")
        if any(codes.values()):
            return {"error": "failed", "text": _first_error(running, codes, folder), "code": codes[min(codes)]}
        if running and time.monotonic() > deadline:
            for pid in running.values():
                os.kill(pid, signal.SIGUSR1)
            time.sleep(_GRACE_S)
            texts = "\n".join(f"--- rank {rank}:\n{_tail(folder, rank)}" for rank in running)
            return {"error": "timeout", "text": f"rank(s) {list(running)} did not end within {timeout_s} s\n{texts}"}
        time.sleep(0.01)
    return {"error": "", "text": "", "code": 0}


def _first_error(running: dict[int, int], codes: dict[int, int], folder: Path) -> str:
    """The earliest error among the ranks, after those that follow from it had time to appear."""
    if running:
        time.sleep(_GRACE_S)
    num_ranks = len(running) + len(codes)
    for rank, pid in running.items():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[rank] = os.waitstatus_to_exitcode(status)
    errors = []
    for rank, code in codes.items():
        if code:
            file = folder / f"error-{rank}.json"
            # A rank without a report was ended from outside, which comes before what its peers noticed of it.
            when, text = json.loads(file.read_text()) if file.exists() else (0.0, f"exit code {code}, no traceback")
            errors.append((when, rank, text))
    _when, rank, text = min(errors)
    others = [other for _, other, _ in errors if other != rank]
    note = f" (rank(s) {others} failed after it)" if others else ""
    output = _tail(folder, rank) + _output(folder, rank, "stdout")
    return f"rank {rank} of {num_ranks} failed{note}:\n{text}\n--- its output:\n{output}"


def _output(folder: Path, rank: int, stream: str) -> str:
    file = folder / f"{stream}-{rank}"
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _tail(folder: Path, rank: int) -> str:
    """The end of what a rank said."""
    return _output(folder, rank, "stderr")[-_TAIL_CHARACTERS:]


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


def _run_function(folder: Path, rank: int, backend: str | None) -> int:
    """Start the group, call the function, leave its result or its traceback; returns the exit code."""
    import faulthandler

    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
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
        result = pickle.dumps(_load(target)(*args))
        torch.distributed.barrier()
        destroy_groups()
        (folder / f"result-{rank}.pickle").write_bytes(result)
    except BaseException:  # noqa: BLE001 - reported to the parent, which raises it
        partial = folder / f"error-{rank}.partial"
        partial.write_text(json.dumps((time.time(), traceback.format_exc())))
        partial.rename(folder / f"error-{rank}.json")
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code


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
    try:
        _serve()
    finally:
        gc.unfreeze()
