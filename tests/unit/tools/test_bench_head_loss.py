"""bench_head_loss where there is no GPU: its comparison, and what it says."""

import pytest
import torch

from tools.bench import bench_head_loss


def test_smoke(capsys):
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    assert bench_head_loss.main(["--smoke", "--no-csv"]) == 0
    printed = capsys.readouterr().out
    for name in ("fused", "chunked", "torch"):
        assert f"{name}: " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_head_loss.main([]) == 2
    assert "bench_head_loss needs one CUDA device" in capsys.readouterr().err


def test_a_wrong_loss_ends_it_if_it_is_ours_and_is_left_out_if_not(capsys):
    case = bench_head_loss.operands(8, 16, 20, torch.device("cpu"))

    def wrong(given):
        return (given.hidden @ given.weight.t()).float().logsumexp(1).mean()

    with pytest.raises(SystemExit, match="fused differs from the formula: loss by"):
        bench_head_loss.measured("fused", wrong, case, case, False)
    assert bench_head_loss.measured("liger", wrong, case, case, False) is None
    assert "liger cannot be compared: liger differs from the formula" in capsys.readouterr().out
