"""Checkpoints move between CPU and GPU, and between local and Transformer Engine modules, bit for bit."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu

PRECISIONS = ["fp32", "bf16"]
# The next step's loss, of about 8 nats: another device, or another choice of kernels.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_from_cpu_to_gpu(runs, on_cpu, tmp_path, precision):
    written = on_cpu("write", tmp_path, precision)
    read = runs.read_checkpoint(tmp_path, precision)
    assert runs.differences(written["state"], read["state"]) == []
    assert read["next_loss"] == pytest.approx(written["next_loss"], abs=LOSS_TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_from_gpu_to_cpu(runs, on_cpu, tmp_path, precision):
    written = runs.write_checkpoint(tmp_path, precision)
    read = on_cpu("read", tmp_path, precision)
    assert runs.differences(written["state"], read["state"]) == []
    assert read["next_loss"] == pytest.approx(written["next_loss"], abs=LOSS_TOLERANCE[precision])


@pytest.mark.parametrize("source, target", [("local", "transformer_engine"), ("transformer_engine", "local"),
                                            ("transformer_engine", "transformer_engine")])
def test_between_implementations(runs, engine, tmp_path, source, target):
    with runs.trainer(runs.run_config(precision="bf16", transformer_impl=source)) as writer:
        writer.step()
        writer.step()
        writer.write(tmp_path)
        state, next_loss = writer.state(), writer.step()
    assert {name.split(":")[0] for name in state} >= {"weight", "param", "exp_avg", "exp_avg_sq", "bias"}
    with runs.trainer(runs.run_config(precision="bf16", transformer_impl=target, seed=5)) as reader:
        reader.read(tmp_path)
        assert runs.differences(state, reader.state()) == []
        assert reader.step() == pytest.approx(next_loss, abs=LOSS_TOLERANCE["bf16"])


def test_resume(runs, tmp_path):
    """Two steps, save, two steps: as going on from the checkpoint, but for the order of atomic additions on a GPU."""
    run = runs.run_config()
    with runs.trainer(run) as straight:
        straight.step()
        straight.step()
        straight.write(tmp_path)
        losses = [straight.step(), straight.step()]
    with runs.trainer(run) as resumed:
        resumed.read(tmp_path)
        assert [resumed.step(), resumed.step()] == pytest.approx(losses, abs=LOSS_TOLERANCE["fp32"])
