"""Processes that start a run together meet before they do: an error of one is everybody's, and nobody waits for it.

torch's own rendezvous waits for a process that has ended long ago. Here each comes to a store when it has checked what
it was asked for: the last to come says "go", one that found something wrong says what, and all hear the first that
was said. Ranks meet in the store that they start torch.distributed with; the launcher's checks, one a node, meet before
torchrun starts, at the same address.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import socket
import sys
import time

from torch.distributed import PrefixStore, TCPStore

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.process.loopback import loopback_store_class
from dsv3_megatron.process.ranks import Processes, require_free_port, wait_for_port

__all__ = ["PeerError", "RollCall", "let_go", "meet_nodes", "meet_ranks", "say_once", "stand_by"]

# Stores that this process serves, by address and port: they must live as long as ranks may ask, and torch's own
# rendezvous at the same port shares them.
_servers: dict[tuple[str, int], TCPStore] = {}

_GO = "go"
# Patience with processes that come late, and between lines that say who is missing.
_MEET_S, _TELL_S = 1800.0, 30.0
_POLL_S, _LAST_POLL_S = 0.02, 0.5
_CONNECT_S = 60.0
# One that found something wrong looks so long for the others, and rank 0, which they ask, stays so long for them.
_EXCUSE_S, _LINGER_S = 5.0, 10.0
_NUM_LISTED = 8


logger = logging.getLogger(__name__)


class PeerError(RuntimeError):
    """Another process of the run has ended, or did not come; the text says which and why."""


class RollCall:
    """A meeting of `size` processes in the store of rank 0's host.

    Args:
        name: Name of the meeting; its processes give the same.
        address: Host of rank 0.
        port: Port on that host at which the store listens.
        rank: This process's, 0 to size - 1.
        size: Processes that meet.
        has_server: The store is served by somebody else (torchrun); otherwise rank 0 serves it.
        unit: What a process stands for in messages.
        patience_s: Seconds to look for the store.

    Raises:
        ConfigError: rank 0 cannot listen there.
        PeerError: the store was not found in time.
    """

    def __init__(self, name: str, address: str, port: int, rank: int, size: int, *, has_server: bool = False,
                 unit: str = "rank", patience_s: float = _MEET_S) -> None:
        self.rank, self.size, self.unit = rank, size, unit
        self.where = f"{address}:{port}"
        self.is_host = rank == 0 and not has_server
        # torch's own client writes stacks while it waits: look with a plain socket first.
        if not self.is_host and (reason := wait_for_port(address, port, patience_s)) is not None:
            raise PeerError(f"{unit} 0 was not found at {self.where} within {patience_s:g} s ({reason})")
        key = address, port
        if self.is_host and key not in _servers:
            require_free_port(port, address)
        # A second store of this process is served by the first one's server.
        kind = loopback_store_class() if self.is_host and key not in _servers else TCPStore
        self._server = kind(address, port, None, self.is_host, datetime.timedelta(seconds=_CONNECT_S),
                            wait_for_workers=False, multi_tenant=self.is_host)
        if self.is_host:
            _servers[key] = self._server
        self._store = PrefixStore(f"dsv3_megatron_roll_call/{name}", self._server)

    def meet(self) -> None:
        """Come, and wait until all have.

        Raises:
            ConfigError: two processes have this rank.
            PeerError: one found something wrong, or did not come.
        """
        if self._store.add(f"here/{self.rank}", 1) > 1:
            text = f"two processes came as {self.unit} {self.rank} of {self.size}; give each its own"
            self.excuse(text)
            raise ConfigError(text)
        if self._store.add("here", 1) == self.size:
            self._store.compare_set("verdict", "", _GO)
        started = told_s = time.monotonic()
        poll_s = _POLL_S
        while (verdict := self._hear()) is None:
            now = time.monotonic()
            if now - started > _MEET_S:
                self.excuse(f"{self._missing()} did not come to {self.where} within {_MEET_S:g} s")
            elif now - told_s > _TELL_S and self.rank == 0:
                told_s = now
                print(f"waiting at {self.where} for {self._missing()}, {now - started:.0f} s so far", file=sys.stderr)
            time.sleep(poll_s)
            poll_s = min(_LAST_POLL_S, 1.5 * poll_s)
        self._heard()
        if verdict != _GO:
            raise PeerError(verdict)

    def excuse(self, text: str) -> None:
        """Tell the others that this process does not come, and why; rank 0 stays until they have heard it."""
        self._store.compare_set("verdict", "", text)
        self._heard()

    def wait_for_end(self) -> int:
        """Wait for the exit code that `end` tells.

        Raises:
            PeerError: the store is gone before.
        """
        try:
            self._store.add("waiting", 1)
            while not self._store.check(["end"]):
                time.sleep(_LAST_POLL_S)
            code = int(self._store.get("end"))
            self._store.add("heard", 1)
        except RuntimeError as error:
            raise PeerError(f"{self.unit} 0 ended ({type(error).__name__})") from error
        return code

    def end(self, code: int) -> None:
        """Tell those that wait an exit code, and stay until they have heard it or had the time to."""
        self._store.set("end", str(code))
        deadline = time.monotonic() + _LINGER_S
        while self._store.add("heard", 0) < self._store.add("waiting", 0) and time.monotonic() < deadline:
            time.sleep(0.05)

    def count(self, key: str) -> int:
        """How many processes have counted under a key, this one included."""
        return self._store.add(key, 1)

    def _hear(self) -> str | None:
        try:
            return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None
        except RuntimeError as error:
            return f"{self.unit} 0 ended before all had come ({type(error).__name__})"

    def _heard(self) -> None:
        """Count who has heard the verdict; the host of the store waits for all that came, and may then end."""
        try:
            num_heard = self._store.add("heard", 1)
            deadline = time.monotonic() + _LINGER_S
            while self.is_host and num_heard < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
                num_heard = self._store.add("heard", 0)
        except RuntimeError:
            return  # the host has ended, which it does after all have heard or had the time to

    def _missing(self) -> str:
        missing = [rank for rank in range(self.size) if not self._store.add(f"here/{rank}", 0)]
        names = ", ".join(map(str, missing[:_NUM_LISTED])) + (", ..." if len(missing) > _NUM_LISTED else "")
        return f"{self.unit} {names} of {self.size}"


def meet_ranks(processes: Processes) -> None:
    """Meet the other ranks of a run before torch.distributed starts.

    Raises:
        ConfigError, PeerError: rank 0 cannot listen, or another rank did not come or has an error, as `RollCall` says.
    """
    if processes.world_size > 1:
        _open(processes, _MEET_S).meet()


def say_once(text: str, processes: Processes, *, tells: bool = True) -> None:
    """Print an error with rank and host, unless a rank that torchrun started has printed the same; tell the others.

    Args:
        text: The error.
        processes: This process's place.
        tells: The other ranks, who may still come to meet, are told; False: they have met.
    """
    if processes.address is None or processes.world_size == 1:
        print_error(text)
        return
    line = f"error: {text} ({processes.place})"
    if not processes.has_agent:  # started by hand, each in a terminal of its own
        print(line, file=sys.stderr, flush=True)
        if not tells:
            return
    try:
        call = _open(processes, _EXCUSE_S)
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        if processes.has_agent and call.count(f"said/{digest}") == 1:
            print(line, file=sys.stderr, flush=True)
        if tells:
            call.excuse(f"rank {processes.rank}, on {socket.gethostname()}: {text}")
    except (ConfigError, RuntimeError) as error:  # nobody there: then nobody waits either
        if processes.has_agent:
            print(line, file=sys.stderr, flush=True)
        logger.debug("rank %d: the others were not told (%s)", processes.rank, error)


def meet_nodes(processes: Processes, node_rank: int, num_nodes: int, error: str | None) -> None:
    """Meet the launcher's checks of the other nodes, or tell them what is wrong here.

    Args:
        processes: The node's processes, which name the host and port of the run's rank 0.
        node_rank: Number of this node, 0 to num_nodes - 1.
        num_nodes: Nodes that meet.
        error: What is wrong here; None: nothing.

    Raises:
        ConfigError, PeerError: rank 0 cannot listen, or another node did not come or has an error, as `RollCall` says.
    """
    call = RollCall("nodes", processes.require_address(), processes.port, node_rank, num_nodes, unit="node",
                    patience_s=_MEET_S if error is None else _EXCUSE_S)
    if error is None:
        call.meet()
    else:
        call.excuse(f"node {node_rank}, {socket.gethostname()}: {error}")


def stand_by(processes: Processes) -> int:
    """Wait, as a process that the run has no use for, until rank 0's ends; its exit code.

    Args:
        processes: This process's place among all that torchrun started.

    Raises:
        ConfigError, PeerError: rank 0 is not found, or is gone without a word.
    """
    return RollCall("standing by", processes.require_address(), processes.port, processes.rank, processes.world_size,
                    has_server=True, unit="rank").wait_for_end()


def let_go(processes: Processes, code: int) -> None:
    """Tell the processes that stand by this run's exit code; called by rank 0, which serves their store."""
    RollCall("standing by", processes.require_address(), processes.port, 0, processes.world_size,
             has_server=True).end(code)


def _open(processes: Processes, patience_s: float) -> RollCall:
    return RollCall(processes.attempt, processes.require_address(), processes.port, processes.rank,
                    processes.world_size, has_server=processes.has_agent, patience_s=patience_s)
