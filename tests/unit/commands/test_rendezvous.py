"""`dsv3 rendezvous`: it serves until it is told to stop, and says what is wrong with its port."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

from dsv3_megatron.commands import rendezvous

ROOT = Path(__file__).resolve().parents[3]


def test_it_serves_until_it_is_told_to_stop() -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "dsv3_megatron", "rendezvous", "--port", str(port)], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == f"nodes meet at port {port}\n"
        TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False).set("key", "value")
        assert TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False).get("key") == b"value"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == "stopped by SIGTERM\n"


def test_wrong_ports(capsys) -> None:
    assert rendezvous.main(["--port", "0"]) == 2
    assert "--port=0 must be a whole number from 1 to 65535" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert rendezvous.main(["--port", str(port)]) == 2
        assert f"{port} cannot be listened on" in capsys.readouterr().err
