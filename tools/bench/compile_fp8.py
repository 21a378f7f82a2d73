"""Compiles the FP8 GEMM for Hopper on a machine without a GPU: registers, spills, shared memory, instructions.

Not a measurement: it shows that the kernel compiles to Hopper's matrix instructions (wgmma) fed by TMA, and that its
tiles fit registers and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def compile_for_hopper() -> None:
    """Compile the guessed configurations, single, grouped and adding; print a line for each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dsv3_megatron.kernels.fp8_gemm import _gemm_kernel
    from dsv3_megatron.kernels.fp8_tuning import GemmConfig

    for config in (GemmConfig(), GemmConfig(64, 128, 4, 4)):
        for grouped, add in ((False, False), (True, False), (False, True)):
            constants = {"A_ROWS": 1, "B_ROWS": 128, "GROUPED": grouped, "ADD": add, "BLOCK_M": config.block_m,
                         "BLOCK_N": config.block_n, "GROUP_M": config.group_m, "PROCESSORS": 132,
                         "STAGES": config.stages}
            signature = {"a_desc": f"tensordesc<fp8e4nv[{config.block_m},128]>",
                         "b_desc": f"tensordesc<fp8e4nv[{config.block_n},128]>", "c_ptr": "*fp32" if add else "*bf16",
                         "a_scales_ptr": "*fp32", "b_scales_ptr": "*fp32", "table_ptr": "*i32"}
            signature |= {name: "i32" for name in _gemm_kernel.arg_names if name not in signature}
            signature |= dict.fromkeys(constants, "constexpr")
            kernel = triton.compile(ASTSource(fn=_gemm_kernel, signature=signature, constexprs=constants),
                                    target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps})
            ptx = kernel.asm["ptx"]
            print(f"{config} grouped={grouped} add={add}: {_resources(kernel)}, {kernel.metadata.shared} bytes of "
                  f"shared memory, {ptx.count('wgmma.mma_async')} wgmma, {ptx.count('cp.async.bulk.tensor')} TMA loads")


def _resources(kernel: Any) -> str:
    """Registers and stack (spills) of a thread, as the compiler's own tool reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return "registers unknown (no cuobjdump)"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return f"{found.get('REG')} registers, {found.get('STACK')} bytes of stack"
