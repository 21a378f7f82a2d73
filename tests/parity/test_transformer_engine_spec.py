"""The Transformer Engine spec against the local modules, without a GPU: the same weights, names, keys and functions.

Transformer Engine's modules are played by plain torch ones (`torch_transformer_engine.py`); everything between them is
Megatron-Core's and this library's own. With the real ones, on a GPU: tests/gpu/test_transformer_engine.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parity.architectures import VARIANTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Both sides compute in fp32, with the same products in another order, and cos and sin rounded from fp32 or fp64.
# Largest seen: 5e-6 of a gradient's norm.
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 5e-5, 1e-6
MOVES = [f"{precision} {move}" for precision in ("fp32", "bf16")
         for move in ("local to transformer_engine", "transformer_engine to local")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("comparison") / "found.json"
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.parity.engine_comparison", str(file)], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_same_names_weights_marks_and_checkpoint_keys(found, name):
    assert found["trees"][name] == {"parameters": [], "checkpoint": []}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_losses_and_gradients(found, name):
    step = found["steps"][name]
    assert step["same_gradients"] and step["equal_choices"] == 1.0
    local, engine = step["losses"]
    assert engine == pytest.approx(local, rel=LOSS_TOLERANCE)
    assert step["error"] <= GRADIENT_TOLERANCE, (step["worst_gradient"], step["error"])


@pytest.mark.parametrize("move", MOVES)
def test_checkpoints_move_between_the_trees(found, move):
    assert found["checkpoints"][move] == []


def test_the_context_is_extended_in_place(found):
    """In Transformer Engine's modules as in the local ones: what was built for another context is not told apart."""
    for impl, losses in found["extension"].items():
        assert losses["extended"] == losses["long"] and losses["back"] == losses["plain"], impl
        assert losses["plain"] != losses["long"], impl
    local, engine = (found["extension"][impl]["extended"] for impl in ("local", "transformer_engine"))
    assert engine[0] == pytest.approx(local[0], rel=1e-5)
