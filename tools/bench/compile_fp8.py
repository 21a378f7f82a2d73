"""Compiles the FP8 kernels for Hopper on a machine without a GPU: registers, spills, shared memory, instructions.

Not a measurement: it shows that the GEMM compiles to Hopper's matrix instructions (wgmma) fed by TMA, that its tiles
fit registers and shared memory, and that quantization uses the GPU's own conversion to E4M3.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def compile_for_hopper() -> None:
    """Compile the GEMM and the quantization kernels; print a line for each."""
    _compile_gemm()
    _compile_quantization()


def _compile_gemm() -> None:
    """The guessed configurations, single, grouped and adding."""
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
            kernel = _compiled(_gemm_kernel, signature, constants, config.warps)
            ptx = kernel.asm["ptx"]
            print(f"{config} grouped={grouped} add={add}: {_resources(kernel)}, {kernel.metadata.shared} bytes of "
                  f"shared memory, {ptx.count('wgmma.mma_async')} wgmma, {ptx.count('cp.async.bulk.tensor')} TMA loads")


def _compile_quantization() -> None:
    """Tiles, SwiGLU, weights, columns of each stored form, E5M6, records; of bf16."""
    from dsv3_megatron.kernels import fp8_packed_rows, fp8_quantize
    from dsv3_megatron.kernels.launch import QUANTIZATION_WARPS

    exact = {"POWER_OF_2": False, "EXACT_FIRST": False}
    e4m3, wide, scales = "*fp8e4nv", "*bf16", "*fp32"
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("tiles", fp8_quantize._tiles_kernel, {"x_ptr": wide, "values_ptr": e4m3, "scales_ptr": scales},
         {"ROWS": 32, **exact}),
        ("tiles in E5M6", fp8_quantize._e5m6_kernel, {"x_ptr": wide, "packed_ptr": "*u8", "scales_ptr": scales},
         {"ROWS": 32, "POWER_OF_2": True}),
        ("SwiGLU and its input", fp8_quantize._swiglu_kernel,
         {"hidden_ptr": wide, "gates_ptr": scales, "values_ptr": e4m3, "scales_ptr": scales, "kept_ptr": e4m3,
          "kept_scales_ptr": scales}, {"HAS_GATES": True, "KEEP": True, "ROWS": 32, "KEPT_POWER_OF_2": False, **exact}),
        ("weight, both layouts", fp8_quantize._blocks_kernel,
         {"w_ptr": wide, "values_ptr": e4m3, "turned_ptr": e4m3, "scales_ptr": scales}, {"TURN": True, **exact}),
        ("records in the order of experts", fp8_packed_rows._pack_kernel,
         {"x_ptr": wide, "rows_ptr": "*i32", "values_ptr": e4m3, "scales_ptr": scales},
         {"CHOICES": 8, "PERMUTED": True, "ROWS": 32, "EXACT_FIRST": False}),
        ("rows of records", fp8_packed_rows._unpack_kernel, {"values_ptr": e4m3, "scales_ptr": scales, "x_ptr": wide},
         {"ROWS": 32}),
    ]
    cases += [(f"columns of {stored}", fp8_quantize._columns_kernel,
               {"x_ptr": pointer, "x_scales_ptr": scales, "values_ptr": e4m3, "scales_ptr": scales},
               {"FORMAT": stored, "COLUMNS": 32, **exact})
              for stored, pointer in (("wide", wide), ("e4m3", e4m3), ("e5m6", "*u8"))]
    for name, function, pointers, constants in cases:
        kernel = _compiled(function, pointers, constants, QUANTIZATION_WARPS)
        print(f"quantization of {name}: {_resources(kernel)}, {kernel.metadata.shared} bytes of shared memory, "
              f"{kernel.asm['ptx'].count('cvt.rn.satfinite.e4m3x2')} conversions of two values")


def _compiled(function: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    """A kernel for Hopper; arguments that have no type here are 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in function.arg_names} | dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(fn=function, signature=signature, constexprs=constants),
                          target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


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
