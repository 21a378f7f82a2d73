"""This process's place among those of a run: torchrun's variables, read and checked in one place."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError

__all__ = ["DEFAULT_PORT", "Processes", "require_free_port", "wait_for_port"]

_MAX_PORT = 65535
_MAX_PROCESSES = 10_000_000
DEFAULT_PORT = 29500
# Between attempts to connect, for one attempt, and for a name that may be new (a cluster's own).
_RETRY_S, _CONNECT_S, _RESOLVE_S = 0.3, 5.0, 10.0
# Set by torchrun: its own process serves the store in which ranks meet.
_AGENT_STORE, _RUN_ID, _RESTARTS = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Processes:
    """A process's place among those it was started with.

    Attributes:
        rank: Number among all processes, 0 to world_size - 1.
        world_size: Processes of the run.
        local_rank: Number among the processes of this host.
        local_size: Processes of this host; those of the run where nobody said.
        address: Host of rank 0, empty if nobody said; None: the process was started alone, without RANK.
        port: Port at which rank 0, or torchrun on its host, listens.
        has_agent: torchrun started it, and serves the store.
        attempt: Which of torchrun's attempts at the run this is; names of keys in its store begin with it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int = DEFAULT_PORT
    has_agent: bool = False
    attempt: str = "0"
    local_size: int = 1

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Processes:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises:
            ConfigError: one of them cannot be, or goes without one that it needs; with the way out.
        """
        variables = os.environ if variables is None else variables
        if "RANK" not in variables:
            # WORLD_SIZE alone says for how many processes --check-only and --print-model look at a layout.
            size = _number(variables, "WORLD_SIZE", 1, _MAX_PROCESSES, default=1)
            return cls(world_size=size, local_rank=_number(variables, "LOCAL_RANK", 0, size - 1, default=0),
                       local_size=size)
        if "WORLD_SIZE" not in variables:
            raise ConfigError(f"RANK={variables['RANK']!r} is set without WORLD_SIZE: give the number of processes "
                              "too, or unset RANK for one process; torchrun sets both")
        size = _number(variables, "WORLD_SIZE", 1, _MAX_PROCESSES)
        rank = _number(variables, "RANK", 0, size - 1, f"WORLD_SIZE={size}")
        local_size = _number(variables, "LOCAL_WORLD_SIZE", 1, size, f"WORLD_SIZE={size}", default=size)
        # Started by hand, a rank is taken to be alone on its host unless it says otherwise.
        local = _number(variables, "LOCAL_RANK", 0, local_size - 1, f"LOCAL_WORLD_SIZE={local_size}", default=0)
        address = variables.get("MASTER_ADDR", "127.0.0.1" if size == 1 else "")
        if address.split() != [address] and "MASTER_ADDR" in variables:
            raise ConfigError(f"MASTER_ADDR={address!r} must be the name or address of rank 0's host; set it so; "
                              "torchrun sets it")
        has_agent = variables.get(_AGENT_STORE) == "True"
        # Where rank 0 serves the store itself, each start has a new one; and agents count their restarts differently.
        attempt = f"{variables.get(_RUN_ID, 'none')}/{variables.get(_RESTARTS, '0')}" if has_agent else "0"
        return cls(rank, size, local, address, _number(variables, "MASTER_PORT", 1, _MAX_PORT, default=DEFAULT_PORT),
                   has_agent, attempt, local_size)

    def require_rank(self) -> None:
        """Refuse to start one process where WORLD_SIZE says that there are others.

        Raises:
            ConfigError: WORLD_SIZE is above 1, and RANK is not set.
        """
        if self.address is None and self.world_size > 1:
            raise ConfigError(f"WORLD_SIZE={self.world_size} is set without RANK: give this process's rank too, or "
                              "unset WORLD_SIZE for one process; torchrun sets both")

    def require_address(self) -> str:
        """Give the host of rank 0, which must be known.

        Raises:
            ConfigError: MASTER_ADDR is not set.
        """
        if not self.address:
            raise ConfigError(f"MASTER_ADDR is not set with RANK={self.rank} and WORLD_SIZE={self.world_size}: give "
                              "the host of rank 0, or start the processes with torchrun, which sets it")
        return self.address

    @property
    def place(self) -> str:
        """Rank and host, for a message."""
        return f"rank {self.rank} of {self.world_size}, on {socket.gethostname()}"


def require_free_port(port: int, address: str) -> None:
    """Find out whether this process could listen, before something is started that will.

    Raises:
        ConfigError: another process listens on the port, or this user may not.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = "another process listens there" if error.errno == errno.EADDRINUSE else "this user may not"
                raise ConfigError(f"MASTER_PORT={port} cannot be listened on, here at MASTER_ADDR={address}: {reason}; "
                                  "give another port, the same to every process") from error
            raise


def wait_for_port(address: str, port: int, patience_s: float) -> str | None:
    """Look for a process that listens, for `patience_s` seconds; what is in the way if there is none.

    Raises:
        ConfigError: the address names no host, for as long or for _RESOLVE_S.
    """
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
            return None
        except socket.gaierror as error:
            if time.monotonic() - started > min(patience_s, _RESOLVE_S):
                raise ConfigError(f"MASTER_ADDR={address!r} names no host ({error.strerror}); give the name or address "
                                  "of rank 0's") from error
        except OSError as error:
            if time.monotonic() - started > patience_s:
                return error.strerror or str(error)
        time.sleep(_RETRY_S)


def _number(variables: Mapping[str, str], name: str, lowest: int, highest: int, because: str = "", *,
            default: int | None = None) -> int:
    """A variable as a whole number in a range; digits alone, for `int` takes " 1_0 " as well."""
    value = variables.get(name)
    if value is None:
        assert default is not None
        return default
    is_plain = value.isascii() and value.isdigit() and (value == "0" or value[0] != "0")
    if not is_plain or not lowest <= int(value) <= highest:
        why = f" ({because})" if because else ""
        raise ConfigError(f"{name}={value!r} must be a whole number from {lowest} to {highest}{why}, written in digits "
                          "alone; set it so, or unset it; torchrun sets it")
    return int(value)
