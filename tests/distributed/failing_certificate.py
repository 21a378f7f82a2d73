"""`dsv3 certify` of a layout of which one rank raises in its step."""

from __future__ import annotations

import sys

from dsv3_megatron.certification import certified_layout
from dsv3_megatron.commands.certify import main


def fail(job: object, folder: object, given: object, other: object, hooks: object = None) -> object:
    import torch

    if torch.distributed.get_world_size() > 1 and torch.distributed.get_rank() == 1:
        raise MemoryError("planted: no memory")
    return own(job, folder, given, other, hooks)  # type: ignore[arg-type]


own = certified_layout.run_layout

if __name__ == "__main__":
    from dsv3_megatron.platform import prepare

    prepare()
    from dsv3_megatron.certification import certify

    certify.run_layout = fail  # type: ignore[assignment]
    sys.exit(main(["--preset", "tiny", "--expert-model-parallel-size", "2", "--world-size", "2"]))
