"""Compiles the kernels of the fused head and loss for Hopper on a machine without a GPU, as the JIT would.

    python -m tools.bench.compile_head_loss

It prints registers, spills and shared memory, and fails where a thread spills, a program does not fit a processor, or
the product is not made of Hopper's matrix instructions fed by TMA. Not a measurement of speed.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Any

# A Hopper processor's shared memory for one program, in bytes.
_SHARED_BYTES = 232448
# Integers that are multiples of 16 at V3's size, which the JIT tells the compiler.
_MULTIPLES_OF_16 = ("T", "H", "V", "C", "first", "tiles_t")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    Attributes:
        name: The kernel's name.
        registers: Registers of a thread.
        spilled_bytes: Stack of a thread.
        shared_bytes: Shared memory of a program.
        instructions: Kinds of Hopper's matrix instructions in it.
        num_tma: Loads through TMA.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    num_tma: int

    @property
    def is_sound(self) -> bool:
        """Whether it runs on Hopper as it is meant to."""
        return (not self.spilled_bytes and self.shared_bytes <= _SHARED_BYTES and bool(self.instructions)
                and self.num_tma > 0)


def compile_for_hopper() -> list[Compiled]:
    """Compile both kernels at their tile sizes."""
    from dsv3_megatron.kernels import head_loss
    from dsv3_megatron.kernels.head_loss_tiles import HeadLossTiles

    tiles = HeadLossTiles()
    constants = {"BLOCK_T": tiles.block_t, "BLOCK_V": tiles.block_v, "BLOCK_H": tiles.block_h,
                 "GROUP_T": tiles.group_t, "PROCESSORS": 132, "STAGES": tiles.stages, "INTERPRETED": False}
    types = {"h_desc": f"tensordesc<bf16[{tiles.block_t},{tiles.block_h}]>",
             "w_desc": f"tensordesc<bf16[{tiles.block_v},{tiles.block_h}]>", "targets_ptr": "*i64", "out_ptr": "*bf16"}
    return [_compiled(function, types, constants, tiles.warps)
            for function in (head_loss._partial_sums_kernel, head_loss._gradients_kernel)]


def _compiled(function: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tools.bench.compile_fp8 import _resources

    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(function.arg_names)
               if name.endswith("_ptr") or name in _MULTIPLES_OF_16}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = kernel.asm["ptx"]
    registers, stack = (int(number) for number in re.findall(r"\d+", _resources(kernel)))
    return Compiled(function.__name__, registers, stack, kernel.metadata.shared,
                    tuple(sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)))),
                    ptx.count("cp.async.bulk.tensor"))


def main() -> int:
    """Print a line for each kernel; exit code 1 where one is not sound."""
    os.environ["TRITON_INTERPRET"] = "0"
    found = compile_for_hopper()
    for kernel in found:
        print(f"{kernel.name}: {kernel.registers} registers, {kernel.spilled_bytes} bytes spilled, "
              f"{kernel.shared_bytes} bytes of shared memory, {kernel.num_tma} TMA loads, "
              f"{', '.join(kernel.instructions) or 'no wgmma'}{'' if kernel.is_sound else ': NOT SOUND'}")
    return int(not all(kernel.is_sound for kernel in found))


if __name__ == "__main__":
    sys.exit(main())
