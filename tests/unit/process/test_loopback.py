"""Processes of one machine meet where no other machine can connect: seen in the kernel's list of listening sockets."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.platform.local_torchrun import main
from dsv3_megatron.process.loopback import is_loopback, listen_on_loopback, loopback_store_class

LISTENING = "0A"
WORKER = """
import os, pathlib, time
pathlib.Path(f"here-{os.environ['RANK']}-{os.environ['GLOO_SOCKET_IFNAME']}").touch()
while not pathlib.Path("end").exists():
    time.sleep(0.05)
"""


def listening_addresses(pid: int) -> list[str]:
    """Hexadecimal addresses, without ports, at which a process listens."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and words[9] in sockets:
                found.append(words[1].partition(":")[0])
    return found


def children(pid: int) -> list[int]:
    return [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()]


@pytest.mark.parametrize(("address", "is_one"), [
    ("127.0.0.1", True), ("localhost", True), ("127.3.2.1", True), ("::1", True), ("0.0.0.0", False),
    ("10.0.0.1", False), ("node-1", False), ("localhost.example.org", False), ("", False)])
def test_addresses(address: str, is_one: bool) -> None:
    assert is_loopback(address) is is_one


def test_a_store_of_one_machine() -> None:
    kind, timeout = loopback_store_class(), datetime.timedelta(seconds=30)
    before = listening_addresses(os.getpid())
    server = kind("localhost", 0, None, True, timeout, wait_for_workers=False, multi_tenant=True)
    assert sorted(listening_addresses(os.getpid())) == sorted([*before, "0100007F"])
    client = kind("127.0.0.1", server.port, None, False, timeout, wait_for_workers=False)
    client.set("word", "heard")
    assert server.get("word") == b"heard"
    with pytest.raises(OSError, match="Address already in use"):
        listen_on_loopback(server.port)


def test_torchrun_listens_on_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    agent = subprocess.Popen([sys.executable, "-m", "dsv3_megatron.platform.local_torchrun", "--nproc-per-node", "2",
                              "worker.py"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("here-*-lo"))) < 2 and time.monotonic() < deadline and agent.poll() is None:
            time.sleep(0.1)
        assert len(list(tmp_path.glob("here-*-lo"))) == 2, agent.communicate(timeout=5) if agent.poll() else "too slow"
        found = [address for pid in (agent.pid, *children(agent.pid)) for address in listening_addresses(pid)]
        assert found and set(found) == {"0100007F"}
        (tmp_path / "end").touch()
        assert agent.wait(60) == 0
    finally:
        agent.kill()
        agent.communicate()


def test_several_machines_are_refused() -> None:
    with pytest.raises(SystemExit, match="cannot meet at the loopback address; start them with torchrun"):
        main(["--nnodes", "2", "--nproc-per-node", "2", "-m", "dsv3_megatron"])


def test_a_store_that_has_taken_the_place_of_torchs_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As local_torchrun does it; a class around that one would bind its port twice."""
    import torch

    first = loopback_store_class()
    monkeypatch.setattr(torch.distributed, "TCPStore", first)
    assert loopback_store_class() is first
    store = loopback_store_class()("127.0.0.1", 0, None, True, wait_for_workers=False)
    assert store.port > 0
