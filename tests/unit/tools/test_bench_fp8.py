"""bench_fp8 where there is no GPU: what it says, and its comparisons under the interpreter."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tools.bench import bench_fp8, fp8_products


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_fp8.main(["--tokens", "4096"]) == 2
    captured = capsys.readouterr()
    assert "bench_fp8 needs CUDA: one Hopper GPU" in captured.err and not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_its_comparisons_on_a_cpu(capsys):
    pytest.importorskip("triton")
    assert bench_fp8.main(["--check-on-cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal bit for bit") == 16 and printed.count("equal to tolerance") == 4


def test_a_wrong_product_ends_the_run(capsys):
    product = fp8_products.small_products()[0]
    given = fp8_products.operands(product, "cpu")
    right = (given.a.dequantize() @ given.b.dequantize().t()).bfloat16()
    assert checked_speed(product, right, given) == pytest.approx(product.flops * 1e-9)
    wrong = right.clone()
    wrong[3, 4] += right.abs().mean()
    with pytest.raises(SystemExit, match="triton on fprop small e=1 m=37 n=48 k=144: differs from the reference by"):
        checked_speed(product, wrong, given)
    assert checked_speed(product, wrong, given, "scaled_mm") is None
    assert "scaled_mm on fprop small e=1 m=37 n=48 k=144: differs" in capsys.readouterr().out

    def fails():
        raise RuntimeError("no kernel\nfor this")

    assert bench_fp8.checked_speed(product, given, "scaled_mm", fails, lambda _: 1.0) is None
    assert capsys.readouterr().out == f"{product}: scaled_mm cannot run: no kernel; left out\n"


def checked_speed(product, result, given, name="triton"):
    return bench_fp8.checked_speed(product, given, name, lambda: result, lambda _: 1.0)


def test_the_shapes_are_deepseek_v3s():
    chosen = fp8_products.products([4096], [4, 32])
    assert {(p.outputs, p.inputs) for p in chosen if p.name == "attention_out"} == {(7168, 16384)}
    assert {p.experts for p in chosen if p.name == "expert_gate_up" and p.kind == "grouped"} == {4, 32}
    assert {p.published for p in chosen} == {*fp8_products.PUBLISHED.values(), None}
    assert {p.name for p in chosen if p.kind == "wgrad"} >= {"q_up", "kv_up", "attention_out", "expert_down"}


@pytest.mark.parametrize(("speed", "verdicts"), [
    (1400.0, ["  target 1.6x BF16: met (1.75) by deep_gemm",
              "  target 0.85 of the published 1358 TFLOP/s: met (1.03) by deep_gemm"]),
    (1100.0, ["  target 1.6x BF16: missed (1.38) by deep_gemm",
              "  target 0.85 of the published 1358 TFLOP/s: missed (0.81) by deep_gemm"]),
])
def test_targets_are_said(speed, verdicts):
    assert bench_fp8.gemm_verdicts(fp8_products.Product("attention_out", 4096, 7168, 16384), "deep_gemm", speed, 800.0
                                   ) == verdicts
    assert bench_fp8.gemm_verdicts(fp8_products.Product("kv_up", 4096, 32768, 512), "triton", speed, 800.0) == []


@pytest.fixture
def library(monkeypatch):
    """A stand-in for DeepGEMM, with its interface and an alignment of 16 rows; notes the rows it was given."""
    from dsv3_megatron.ops.fp8.quantize import Quantized
    from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
    from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE

    def quantized(pair, group):
        return Quantized(*pair, group, "e4m3", tuple(pair[0].shape))

    def single(a, b, result):
        made.rows.append(len(a[0]))
        result.copy_(REFERENCE.gemm(quantized(a, TILE), quantized(b, SQUARE), dtype=result.dtype))

    def grouped(a, b, result, expert_of_row):
        made.rows.append(len(a[0]))
        assert len(a[0]) % 16 == 0 and expert_of_row.dtype == torch.int32
        counts = torch.bincount(expert_of_row, minlength=len(b[0])).tolist()
        result.copy_(REFERENCE.grouped_gemm(quantized(a, TILE), quantized(b, SQUARE), counts, dtype=result.dtype))

    made = SimpleNamespace(rows=[], fp8_gemm_nt=single, m_grouped_fp8_gemm_nt_contiguous=grouped,
                           get_mk_alignment_for_contiguous_layout=lambda: 16)
    monkeypatch.setitem(sys.modules, "deep_gemm", made)
    monkeypatch.setattr("dsv3_megatron.ops.fp8.triton_backend.is_installed", lambda name: name == "deep_gemm")
    monkeypatch.setattr(fp8_products, "is_installed", lambda name: name == "deep_gemm")
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_a_run_takes_what_was_measured(library, monkeypatch, tmp_path, capsys):
    """Tuning with made-up times, in which DeepGEMM is faster for single products and slower for grouped ones; then
    products of the same shapes, and of others."""
    pytest.importorskip("triton")
    from dsv3_megatron.kernels import fp8_tuning
    from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    monkeypatch.setenv("DSV3_FP8_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(fp8_tuning, "CANDIDATES", (fp8_tuning.GemmConfig(32, 32, 2, 4), fp8_tuning.GemmConfig(16, 32)))
    single, grouped, wgrad = (fp8_products.small_products()[index] for index in (0, 2, 3))

    def timer(milliseconds_of_the_library):
        def time(function):
            before = len(library.rows)
            function()
            return milliseconds_of_the_library if len(library.rows) > before else 2.0

        return time

    bench_fp8.tune([single], timer(1.0), "cpu")
    bench_fp8.tune([grouped, wgrad], timer(3.0), "cpu")
    table = fp8_tuning.read_tuning("cpu")
    assert {key: tuned.implementation for key, tuned in table.items()} == {
        single.tuning_key: "deep_gemm", grouped.tuning_key: "triton", wgrad.tuning_key: "triton"}
    assert "scaled_mm cannot run" in capsys.readouterr().out, "torch's needs a GPU, and tuning goes on"
    monkeypatch.setattr(fp8_tuning, "_table", lambda: table)
    backend, used = TritonBackend(), len(library.rows)
    given = fp8_products.operands(single, "cpu")
    result = backend.gemm(given.a, given.b, dtype=torch.bfloat16)
    assert len(library.rows) == used + 1 and torch.equal(result, REFERENCE.gemm(given.a, given.b, dtype=torch.bfloat16))
    backend.gemm(given.a, given.b, dtype=torch.float32)
    given = fp8_products.operands(grouped, "cpu")
    backend.grouped_gemm(given.a, given.b, given.counts, dtype=torch.bfloat16)
    assert len(library.rows) == used + 1, "fp32 results and what was measured faster stay ours"


@pytest.mark.parametrize("counts", [[16, 0, 32], [5, 17, 1], [0, 0, 3]])
def test_rows_are_set_apart_for_deep_gemm(library, counts):
    from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
    from dsv3_megatron.ops.fp8.scale_groups import SQUARE
    from dsv3_megatron.ops.fp8.triton_backend import deep_gemm_grouped

    stream = torch.Generator().manual_seed(0)
    a = REFERENCE.quantize(torch.randn(sum(counts), 144, generator=stream))
    b = REFERENCE.quantize(torch.randn(3, 48, 144, generator=stream), SQUARE)
    expected = REFERENCE.grouped_gemm(a, b, counts, dtype=torch.bfloat16)
    assert torch.equal(deep_gemm_grouped(a, b, counts), expected)
    assert library.rows == [sum(-(-count // 16) * 16 for count in counts)]


def test_named_configurations_are_compared(capsys, monkeypatch):
    pytest.importorskip("triton")
    from dsv3_megatron.kernels import fp8_tuning

    wide, small = fp8_tuning.GemmConfig(specializes_warps=True), fp8_tuning.GemmConfig(32, 32, 2, 4)
    monkeypatch.setattr(fp8_tuning, "NAMED_CONFIGURATIONS", (small, wide))
    original = bench_fp8.multiply

    def multiply(product, given, config):
        if config is wide:
            raise RuntimeError("no resources\nfor it")
        return original(product, given, config)

    monkeypatch.setattr(bench_fp8, "multiply", multiply)
    product = fp8_products.small_products()[0]
    rows = bench_fp8.compare_configurations([product], lambda _: 1.0, "cpu")
    assert [row.name for row in rows] == ["fp8_gemm triton 32x32 stages=2 warps=4"]
    assert "128x128 stages=4 warps=8 parted warps: no resources\n" in capsys.readouterr().out
