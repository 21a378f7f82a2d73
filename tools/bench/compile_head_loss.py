"""Compiles the kernels of the fused head and loss for Hopper on a machine without a GPU, as a launch would build them.

    python -m tools.bench.compile_head_loss

It prints what a thread and a program take, and fails where a thread spills, a program does not fit a processor, or the
product is not made of Hopper's matrix instructions fed by TMA. Not a measurement of speed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# A Hopper processor's shared memory for one program, in bytes.
_SHARED_BYTES = 232448


def cases(tokens: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Calls of the library on tensors without memory, by what they are."""
    import torch

    from dsv3_megatron.kernels.head_loss import head_scores, logit_gradients, tiles_here
    from dsv3_megatron.kernels.head_loss_tiles import gradient_columns

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    h, w, targets = empty(tokens, hidden), empty(vocabulary, hidden), empty(tokens, dtype=torch.int64)
    wide, columns = empty(tokens, dtype=torch.float32), gradient_columns(vocabulary, hidden, tiles_here().block_v)
    return {"head, forward": lambda: head_scores(h, w, targets),
            "head, gradients of logits": lambda: logit_gradients(h, w, targets, wide, wide, wide, columns,
                                                                 empty(tokens, columns))}


def is_sound(figures: dict[str, float]) -> bool:
    """Whether a compiled kernel runs on Hopper as it is meant to: `figures` as `compile_fp8.figures` counts them."""
    return (not figures["bytes of stack"] and figures["bytes of shared memory"] <= _SHARED_BYTES
            and figures.get("wgmma", 0) > 0 and figures.get("TMA loads", 0) > 0)


def main() -> int:
    """Print a line for each kernel; exit code 1 where one is not sound."""
    os.environ["TRITON_INTERPRET"] = "0"
    from tools.bench.compile_fp8 import compiled_by, figures
    from tools.bench.shapes import V3

    sound = True
    for name, call in cases(4096, V3.hidden_size, V3.vocab_size).items():
        for compiled in compiled_by(call):
            found = figures(compiled)
            sound &= is_sound(found)
            print(f"{name}: " + ", ".join(f"{value:g} {what}" for what, value in found.items())
                  + ("" if is_sound(found) else ": NOT SOUND"), flush=True)
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
