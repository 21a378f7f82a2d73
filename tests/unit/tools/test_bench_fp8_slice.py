"""The slice of V3 in BF16 and FP8, where there is no GPU: its runs, its sizes, its table, and a smoke run."""

import subprocess

import pytest
import torch

from tools.bench import bench_fp8_slice as bench


def options(*arguments):
    return bench.parser().parse_args(arguments)


@pytest.mark.parametrize("name", bench.CONTENDERS)
def test_every_contender_is_a_run_with_v3s_widths(name):
    made = bench.slice_run(options(), name, 32)
    made.validate(1)
    assert (made.model.hidden_size, made.model.moe_ffn_hidden_size, made.model.num_attention_heads) == (7168, 2048, 128)
    assert made.fp8.is_enabled == name.endswith("fp8") and made.training.num_microbatches(1) == 2


def test_as_many_experts_as_fit():
    """One more group of experts would be too much, and BF16 and FP8 train the same model."""
    from dsv3_megatron.metrics.parameters import count_parameters

    for memory in (80e9, 141e9):
        count = bench.experts_that_fit(options(), int(memory))

        def needed(experts):
            return count_parameters(bench.slice_run(options(), "fp8", experts).model).total * bench.BYTES_PER_PARAMETER

        assert count % 8 == 0 and needed(count) <= 0.65 * memory < needed(count + 8)
    with pytest.raises(SystemExit, match="a slice of 3 layers with 16 experts does not fit 16 GB; give fewer --layers"):
        bench.experts_that_fit(options(), int(16e9))


@pytest.mark.parametrize(("fp8_seconds", "verdict"), [(0.7, "met"), (0.8, "missed")])
def test_the_table_and_the_target(capsys, fp8_seconds, verdict):
    results = {"bf16": bench.Result([1.0, 1.2, 0.9], 60 * 10**9, 9.7, "a GPU"),
               "fp8": bench.Result([fp8_seconds] * 3, 55 * 10**9, 9.7, "a GPU", "triton")}
    rows = bench.report(options(), results, 32)
    printed = capsys.readouterr().out
    assert f"target 1.3x: {verdict}" in printed and f"{1 / fp8_seconds:.2f}x its BF16 step" in printed
    speedup = next(row for row in rows if row.metric == "speed against bf16")
    assert speedup.name == "fp8 triton" and speedup.value == pytest.approx(1 / fp8_seconds)
    flops = next(row for row in rows if row.name == "bf16" and row.metric == "model_flops")
    tokens = next(row for row in rows if row.name == "bf16" and row.metric == "throughput")
    assert tokens.value == 4 * 4096 and 5 < flops.value / tokens.value * 1e3 < 15  # GFLOP of a token of three layers


def test_a_failed_contender_is_no_result(capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 3, "", "a\nno memory")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: failed)
    assert bench.main(["--device", "cpu", "--smoke", "--no-csv", "--contenders", "fp8"]) == 1
    assert "fp8: ended with code 3: a no memory" in capsys.readouterr().err


def test_smoke(capsys):
    status = bench.main(["--device", "cpu", "--smoke", "--no-csv", "--contenders", "fp8", "--steps", "1", "--warm-up",
                         "0", "--micro-batch-size", "1"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "\nfp8      reference" in captured.out and "1 steps" in captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_it_needs(capsys):
    assert bench.main(["--no-csv"]) == bench.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "bench_fp8_slice needs CUDA: one Hopper GPU; --device cpu --smoke shows that it runs\n"
        "--device cpu runs narrow widths only; add --smoke\n")


def test_memory_is_compared_with_the_planner_and_the_rehearsal(capsys, monkeypatch):
    """The session's slice has been rehearsed; another has not, and that is said."""
    from tools.bench import slice_memory
    from tools.gpu_session import SLICE

    session = options(*SLICE)
    for name in session.contenders:
        run = bench.slice_run(session, name, session.experts)
        planned = slice_memory.planned_bytes(run)
        rehearsed = slice_memory.rehearsed_bytes(name, bench.config_text(session, run))
        assert rehearsed is not None, "python -m tools.bench.slice_memory rehearses it"
        assert 40e9 < rehearsed < 130e9 and abs(planned / rehearsed - 1) < 0.05
        peak = int(1.1 * rehearsed)
        ratios = dict(bench.compare_memory(session, name, session.experts, bench.Result([1.0], peak, 9.7, "a GPU")))
        assert ratios["peak_memory against rehearsal"] == pytest.approx(1.1)
        assert ratios["peak_memory against planner"] == pytest.approx(peak / planned)
    capsys.readouterr()
    bench.compare_memory(options("--layers", "4"), "bf16", 16, bench.Result([1.0], 10**10, 9.7, "a GPU"))
    assert "not rehearsed (tools/bench/slice_memory.py)" in capsys.readouterr().out
