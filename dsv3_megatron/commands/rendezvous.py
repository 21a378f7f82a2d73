"""The place where the nodes of an elastic run meet: a small server on a host that stays.

Nodes that come and go (NNODES=MIN:MAX bash examples/pretrain_dsv3.sh) find each other through it. It holds a few
kilobytes, and no part of the run. If it ends, nodes that are training go on, but the next one that fails or comes ends
the run. Start it again with the nodes.

Exit status: 0 after SIGTERM or Ctrl-C; 2 for a port that cannot be listened on.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.process.ranks import DEFAULT_PORT, require_free_port
from dsv3_megatron.process.stop import signal_name, stop_calls

_MOST = 65535


def _serve(port: int) -> int:
    """Serve until a signal asks to stop."""
    from torch.distributed import TCPStore

    stopped = threading.Event()
    told: list[int] = []

    def on_signal(number: int) -> None:
        told.append(number)
        stopped.set()

    with stop_calls(on_signal):
        store = TCPStore("0.0.0.0", port, None, True, wait_for_workers=False)
        print(f"nodes meet at port {port}", flush=True)
        stopped.wait()
        del store
    print(f"stopped by {signal_name(told[0])}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = Parser(prog="dsv3 rendezvous", allow_abbrev=False, description=__doc__.partition("\n\n")[0],
                    epilog=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="N", help="port to listen on (%(default)s)")
    try:
        options = parser.parse_args(arguments)
        if not 1 <= options.port <= _MOST:
            raise ConfigError(f"--port={options.port} must be a whole number from 1 to {_MOST}")
        require_free_port(options.port, "0.0.0.0")
        return _serve(options.port)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
