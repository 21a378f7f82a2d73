"""What a launch builds, compiled for Hopper on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json
import torch
from dsv3_megatron.kernels.fp8_gemm import gemm
from tools.bench.compile_fp8 import compiled_by, figures

def product(rows):
    def call():
        a, b = (torch.empty(size, 512, dtype=torch.float8_e4m3fn, device="meta") for size in (rows, 256))
        scales = torch.empty(4, rows, device="meta").t()
        gemm(a, scales, b, torch.empty(2, 4, device="meta"), dtype=torch.bfloat16)
    return call

made = [compiled_by(product(rows))[0] for rows in (48, 64, 16 * 77)]
print(json.dumps([[each.programs, each.kernel.hash, figures(each)] for each in made]))
"""


def test_few_tiles_compile_nothing_new_and_figures_are_those_of_the_binary():
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert [programs for programs, _, _ in made] == [2, 2, 40], "a program a tile, while there are processors"
    assert len({kernel for _, kernel, _ in made}) == 1
    found = made[0][2]
    assert found["wgmma"] >= 4 and found["TMA loads"] >= 2 and 0 < found["registers"] <= 255
    assert found["bytes of stack"] == 0 and 4 * (64 + 128) * 128 <= found["bytes of shared memory"] < 227 << 10
    assert 100 < found["instructions of a step of K"] < 1000
