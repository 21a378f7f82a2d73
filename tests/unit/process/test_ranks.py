"""Torchrun's variables as this library reads them, and the cores it counts."""

from __future__ import annotations

import socket

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.process.ranks import Processes, require_free_port, wait_for_port


def test_a_process_alone() -> None:
    processes = Processes.from_environment({})
    assert (processes.rank, processes.world_size, processes.local_rank, processes.address) == (0, 1, 0, None)
    processes.require_rank()


def test_torchruns_variables() -> None:
    processes = Processes.from_environment({
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0",
        "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_RESTART_COUNT": "2"})
    assert processes == Processes(9, 16, 1, "node0", 1234, True, "run/2", local_size=8)
    assert processes.place == f"rank 9 of 16, on {socket.gethostname()}"


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "1"}, "RANK='1' is set without WORLD_SIZE: give the number of processes too, or unset RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK='2' must be a whole number from 0 to 1 \(WORLD_SIZE=2\)"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' must be a whole number from 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be a whole number from 1 to "),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be a whole number from 1 to "),
    ({"RANK": "0", "WORLD_SIZE": "02"}, "WORLD_SIZE='02' must be"),
    ({"RANK": "0", "WORLD_SIZE": " 2"}, "WORLD_SIZE=' 2' must be"),
    ({"RANK": "0", "WORLD_SIZE": "\u0662"}, "must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, r"LOCAL_RANK='2' must be a whole number from 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"},
     r"LOCAL_RANK='2' must be a whole number from 0 to 1 \(LOCAL_WORLD_SIZE=2\)"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT='99999' must be a whole number from 1 to "),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "MASTER_ADDR='' must be the name or address"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a b"}, "MASTER_ADDR='a b' must be the name or address"),
])
def test_what_cannot_be_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Processes.from_environment(variables)


def test_one_process_of_several_needs_a_rank_and_an_address() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set without RANK"):
        Processes.from_environment({"WORLD_SIZE": "2"}).require_rank()
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set with RANK=1 and WORLD_SIZE=2: give the"):
        Processes.from_environment({"RANK": "1", "WORLD_SIZE": "2"}).require_address()


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} cannot be listened on, .*another process listens"):
            require_free_port(port, "node0")
        assert wait_for_port("127.0.0.1", port, 5.0) is None
    require_free_port(port, "node0")
    assert wait_for_port("127.0.0.1", port, 0.0) is not None


def test_a_host_that_has_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR='no-such-host.invalid' names no host"):
        wait_for_port("no-such-host.invalid", 29500, 0.0)
