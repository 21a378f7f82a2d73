"""Compiles the kernels for Hopper on a machine without a GPU: registers, spills, shared memory, instructions.

What is compiled is what a launch would build: the library's own functions are called on tensors without memory, of
DeepSeek-V3's shapes, and the kernels that they launch are bound to their arguments by Triton's own rules (which
arguments are multiples of 16, which are 1, which are constants) and compiled instead of started.

Not a measurement of speed: it shows that the GEMM compiles to Hopper's matrix instructions fed by TMA, that its tiles
fit registers and shared memory, how many instructions a step of K takes, and that quantization uses the GPU's own
conversion to E4M3. Rows go to results/compiled_kernels.csv.

Usage:
    python -m tools.bench.bench_fp8 --compile
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tools.bench.records import Measurement, append_rows

PROCESSORS = 132
TOKENS, HIDDEN, WIDTH, EXPERTS = 4096, 7168, 2048, 8


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch would build it, with the number of programs it would start."""

    name: str
    kernel: Any
    programs: int
    warps: int


def compile_for_hopper() -> None:
    """Compile every kernel; print a line for each and append its figures to the table of results."""
    rows: list[Measurement] = []
    for name, launch in cases().items():
        for compiled in compiled_by(launch):
            found = figures(compiled)
            print(f"{name}: " + ", ".join(f"{value:g} {what}" for what, value in found.items()), flush=True)
            rows += [Measurement(f"{compiled.name}", name, what, value, "1") for what, value in found.items()]
    print(f"written: {append_rows('compiled_kernels.csv', rows, 'no GPU: compiled for sm_90a')}")


def cases() -> dict[str, Callable[[], Any]]:
    """Calls of the library, by what they are."""
    return {**_products(), **_quantizations(), **_weight_updates()}


def _weight_updates() -> dict[str, Callable[[], Any]]:
    """The optimizer's update with each form of moments and rounding."""
    import torch

    from dsv3_megatron.kernels.weight_update import PIECE_COLUMNS, Settings, update_pieces

    pieces = torch.empty(1000, PIECE_COLUMNS, dtype=torch.int64, device="meta")
    keys = torch.empty(1000, 2, dtype=torch.int32, device="meta")
    table = torch.empty(1 << 17, dtype=torch.int32, device="meta")
    settings = Settings(1e-4, 0.9, 0.95, 1e-8, 0.1, 10)

    def update(is_stochastic: bool, are_narrow: tuple[bool, bool]) -> Callable[[], Any]:
        return lambda: update_pieces(pieces, keys if is_stochastic else None, (table, table) if is_stochastic else (),
                                     settings, are_narrow=are_narrow, longest=1 << 17)

    return {"AdamW, bf16 moments, stochastic": update(True, (True, True)),
            "AdamW, bf16 moments, to nearest": update(False, (True, True)),
            "AdamW, second moment in bf16, stochastic": update(True, (False, True))}


def _products() -> dict[str, Callable[[], Any]]:
    """The configurations that are guessed, and those that wait for a GPU: single, grouped, added to a gradient."""
    import torch

    from dsv3_megatron.kernels.fp8_gemm import gemm, grouped_gemm
    from dsv3_megatron.kernels.fp8_tuning import NAMED_CONFIGURATIONS

    def narrow(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")

    def scales(rows: int, depth: int, *stack: int) -> torch.Tensor:
        return torch.empty(*stack, -(-depth // 128), rows, device="meta").transpose(-1, -2)

    def single(config: Any) -> Any:
        return lambda: gemm(narrow(TOKENS, HIDDEN), scales(TOKENS, HIDDEN), narrow(WIDTH, HIDDEN),
                            torch.empty(WIDTH // 128, HIDDEN // 128, device="meta"), dtype=torch.bfloat16,
                            config=config)

    def grouped(config: Any) -> Any:
        return lambda: grouped_gemm(narrow(TOKENS, HIDDEN), scales(TOKENS, HIDDEN), narrow(EXPERTS, WIDTH, HIDDEN),
                                    torch.empty(EXPERTS, WIDTH // 128, HIDDEN // 128, device="meta"),
                                    [TOKENS // EXPERTS] * EXPERTS, dtype=torch.bfloat16, config=config)

    def wgrad(config: Any) -> Any:
        return lambda: gemm(narrow(WIDTH, TOKENS), scales(WIDTH, TOKENS), narrow(HIDDEN, TOKENS),
                            scales(HIDDEN, TOKENS), dtype=torch.float32,
                            add_to=torch.empty(WIDTH, HIDDEN, device="meta"), config=config)

    found: dict[str, Callable[[], Any]] = {}
    for config in NAMED_CONFIGURATIONS:
        for kind, make in (("single", single), ("grouped", grouped), ("wgrad", wgrad)):
            found[f"GEMM {config} {kind}"] = make(config)
    return found


def _quantizations() -> dict[str, Callable[[], Any]]:
    """Tiles, SwiGLU, weights, columns of each stored form, E5M6, records; of bf16."""
    import torch

    from dsv3_megatron.kernels import fp8_packed_rows, fp8_quantize

    def wide(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, gates = wide(TOKENS, HIDDEN), torch.empty(TOKENS, device="meta")
    packed = torch.empty(TOKENS * HIDDEN // 2 * 3, dtype=torch.uint8, device="meta")
    narrow = torch.empty(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty(HIDDEN // 128, TOKENS, device="meta").t()
    order = torch.empty(TOKENS, 8, dtype=torch.int32, device="meta")
    records = torch.empty(TOKENS, HIDDEN + HIDDEN // 32, dtype=torch.uint8, device="meta")
    return {
        "tiles": lambda: fp8_quantize.quantize_tiles(x, power_of_2=False),
        "tiles in E5M6": lambda: fp8_quantize.quantize_e5m6(x, power_of_2=True),
        "SwiGLU and its input": lambda: fp8_quantize.swiglu_quantize(
            wide(TOKENS, 2 * WIDTH), gates, power_of_2=False, keep=True),
        "weight, both layouts": lambda: fp8_quantize.quantize_blocks(wide(HIDDEN, WIDTH), power_of_2=False, turn=True),
        "records in the order of experts": lambda: fp8_packed_rows.pack_records(x, order),
        "rows of records": lambda: fp8_packed_rows.unpack_records(records, HIDDEN, torch.bfloat16),
        "columns of wide": lambda: fp8_quantize.quantize_columns(x, None, power_of_2=False),
        "columns of e4m3": lambda: fp8_quantize.quantize_columns(narrow, scales, power_of_2=False),
        "columns of e5m6": lambda: fp8_quantize.quantize_columns(packed, scales, power_of_2=False,
                                                                 shape=(TOKENS, HIDDEN)),
    }


def compiled_by(call: Callable[[], Any]) -> list[Compiled]:
    """The kernels that a call of the library launches, compiled for Hopper instead.

    Args:
        call: Calls a function of the library, on tensors of device "meta".
    """
    found: list[Compiled] = []
    with _compiling_instead(found):
        call()
    return found


@contextlib.contextmanager
def _compiling_instead(found: list[Compiled]) -> Iterator[None]:
    """Let a launch bind its arguments as Triton does and compile, on a GPU of 132 multiprocessors that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from dsv3_megatron.kernels import launch

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kwargs["debug"] = False
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        programs = 1
        for count in grid:
            programs *= int(count)
        found.append(Compiled(self.fn.__name__.strip("_"), kernel, programs, options.num_warps))
        return kernel

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch, "num_processors", lambda: PROCESSORS):
        yield


def figures(compiled: Compiled) -> dict[str, float]:
    """Count what a kernel takes: registers and stack of a thread, bytes, instructions."""
    kernel, ptx = compiled.kernel, compiled.kernel.asm["ptx"]
    found: dict[str, float] = {"programs": compiled.programs, "warps": compiled.warps}
    found |= resources(kernel)
    found |= {"bytes of shared memory": kernel.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"),
              "TMA loads": ptx.count("cp.async.bulk.tensor"),
              "conversions of two values": ptx.count("cvt.rn.satfinite.e4m3x2")}
    if found["wgmma"]:
        found["instructions of a step of K"] = instructions_of_a_step(kernel)
    return {name: value for name, value in found.items() if value or name == "bytes of stack"}


def resources(kernel: Any) -> dict[str, float]:
    """Registers and stack (spills) of a thread, as the compiler's own tool reads them from the binary.

    Raises:
        RuntimeError: Triton's cuobjdump is not there.
    """
    text = _dump(kernel, "-res-usage")
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": float(found["REG"]), "bytes of stack": float(found["STACK"])}


def instructions_of_a_step(kernel: Any) -> float:
    """Count the instructions of the innermost loop with matrix instructions: a step of K, with what a new tile takes.

    A loop is what lies between a branch and the earlier line to which it goes.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", _dump(kernel, "-sass"))
    line_of = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    found = []
    for index, (_, text) in enumerate(lines):
        goal = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        start = line_of.get(int(goal.group(1), 16), index) if goal else index
        if start < index and any("GMMA" in inside for _, inside in lines[start:index]):
            found.append(index - start + 1)
    return float(min(found, default=0))


def _dump(kernel: Any, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        raise RuntimeError(f"triton {triton.__version__} has no {tool}; install the triton of constraints.txt")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout
