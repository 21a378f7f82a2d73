"""Every test here needs a GPU and skips without one; those of Transformer Engine need that package too.

Nothing that imports Megatron-Core is imported before the check, so that collecting costs nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, IS_REHEARSED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU of this process; the CPU where the tests are rehearsed."""
    if not IS_REHEARSED and not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can use")
    return DEVICE


@pytest.fixture(scope="session")
def attributes_before(gpu: torch.device) -> dict[int, Any]:
    """What `platform/cpu.py` would replace, as it was before `prepare()`, by position in its list."""
    from dsv3_megatron.platform.cpu import STAND_INS

    return {index: getattr(stand_in.owner, stand_in.name) for index, stand_in in enumerate(STAND_INS)
            if not isinstance(stand_in.owner, str)}


@pytest.fixture(scope="session")
def runs(gpu: torch.device, attributes_before: dict[int, Any]) -> ModuleType:
    """tests/gpu/runs.py; importing it prepares the platform."""
    from tests.gpu import runs

    return runs


@pytest.fixture(scope="session")
def engine(runs: ModuleType) -> str:
    """The version of Transformer Engine, as Megatron-Core sees it."""
    import importlib.util

    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version

    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed")
    assert HAVE_TE, "transformer_engine is installed and Megatron-Core cannot import it: see its own error"
    return str(get_te_version())


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs `tests.gpu.runs` with some arguments in a process that sees no GPU; returns what it left."""

    def run(*arguments: object) -> Any:
        file = tmp_path_factory.mktemp("on-cpu") / "result.pt"
        paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.runs", *map(str, arguments), str(file)], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(file, weights_only=False)  # our own file

    return run


@pytest.fixture(scope="session")
def cpu_step(on_cpu: Any) -> Any:
    """Loss, gradients and routing of one step in fp32 on the CPU: what every step on the GPU is compared with."""
    return on_cpu("gradients")
