"""Processes of one machine meet at its loopback address, where no other machine can connect.

torch's store listens on every address, whatever address it is given, and whoever connects can read and change what is
in it. So a store that processes of one machine share gets a socket that is bound already.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Whether an address, or the name localhost, is of this machine alone."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def listen_on_loopback(port: int) -> tuple[int, int]:
    """A socket that listens at the loopback address, for `TCPStore(master_listen_fd=...)`.

    Args:
        port: Port to listen on; 0: a free one.

    Returns:
        The socket's descriptor, which is the caller's to close, and the port.

    Raises:
        OSError: the port is taken.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, port))
        server.listen(4096)
    except OSError:
        server.close()
        raise
    found = int(server.getsockname()[1])
    return server.detach(), found


def free_port() -> int:
    """A TCP port at which nobody listens now at the loopback address; another process may take it first."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def use_loopback_interface() -> None:
    """Have gloo and NCCL of this process, and of those it starts, use the loopback interface, unless they are told."""
    if os.path.exists("/sys/class/net/lo"):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")


def loopback_store_class() -> type[Any]:
    """torch's TCPStore, of which a server of a loopback address listens there alone.

    Where such a class has taken the place of torch's already, it is that one: it would bind its port a second time.
    """
    from torch.distributed import TCPStore

    if getattr(TCPStore, "listens_on_loopback", False):
        return TCPStore

    class LoopbackStore(TCPStore):
        """A TCPStore; its arguments are those of torch's."""

        listens_on_loopback = True

        def __init__(self, host_name: str, port: int, world_size: int | None = None, is_master: bool = False,
                     *arguments: Any, **options: Any) -> None:
            if is_master and is_loopback(host_name):
                options["master_listen_fd"], port = listen_on_loopback(port)
            super().__init__(host_name, port, world_size, is_master, *arguments, **options)

    return LoopbackStore
