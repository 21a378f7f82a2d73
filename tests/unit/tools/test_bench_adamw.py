"""bench_adamw where there is no GPU: its comparison under the interpreter, and what it says."""

import pytest
import torch

from tools.bench import bench_adamw


def test_smoke(capsys):
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    assert bench_adamw.main(["--smoke", "--no-csv"]) == 0
    printed = capsys.readouterr().out
    assert "equal to rounding" in printed and printed.count(" GB/s") == len(bench_adamw.BYTES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_adamw.main([]) == 2
    assert "bench_adamw needs one CUDA device" in capsys.readouterr().err


def test_a_wrong_update_ends_it(monkeypatch):
    from dsv3_megatron.optim.adamw import NarrowMomentAdamW

    original = NarrowMomentAdamW.step

    def wrong(self, closure=None):
        original(self, closure)
        if self.is_fused:
            self.param_groups[0]["params"][0].data[5] += 1e-3

    monkeypatch.setattr(NarrowMomentAdamW, "step", wrong)
    with pytest.raises(SystemExit, match="one launch differs from block by block: weights by 0.002"):
        bench_adamw.check([300, 20], torch.device("cpu"))
