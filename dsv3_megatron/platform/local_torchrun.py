"""torchrun for the processes of one machine: its stores listen at the loopback address alone.

    python -m dsv3_megatron.platform.local_torchrun --nproc-per-node 4 -m dsv3_megatron train FLAGS

Its arguments are those of torchrun. Where none says how processes meet, they meet at a free port (--standalone).
torchrun itself opens two ports on every address of the machine, also with --standalone and --local-addr 127.0.0.1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsv3_megatron.process.loopback import LOOPBACK, loopback_store_class, use_loopback_interface

_MEETING = ("--standalone", "--master-addr", "--master_addr", "--master-port", "--master_port", "--rdzv")
_SEVERAL = ("--nnodes", "--node-rank", "--node_rank")


def main(arguments: Sequence[str]) -> None:
    """Run torchrun on this machine.

    Raises:
        SystemExit: torchrun has ended, or the arguments are for several machines.
    """
    before_program = list(arguments)[: _program(arguments)]
    if any(word.startswith(_SEVERAL) for word in before_program):
        sys.exit("error: processes of several machines cannot meet at the loopback address; start them with torchrun")
    words = list(arguments)
    if not any(word.startswith(_MEETING) for word in before_program):
        words = ["--standalone", "--local-addr", LOOPBACK, *words]
    use_loopback_interface()
    import torch.distributed

    torch.distributed.TCPStore = loopback_store_class()  # type: ignore[misc]  # before torchrun's modules take it
    from torch.distributed.run import main as run

    run(words)


def _program(arguments: Sequence[str]) -> int:
    """The place of the word with which the program begins: what follows are its flags, not torchrun's."""
    return next((place for place, word in enumerate(arguments)
                 if word in ("-m", "--module", "--") or word.endswith(".py")), len(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
