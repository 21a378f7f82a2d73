"""Which precision a device gets, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from dsv3_megatron.platform import Device, detect_device, has_fast_bf16, resolve_precision
from dsv3_megatron.platform.device import overlaps_reductions

CPU = Device(torch.device("cpu"), "gloo", "some processor")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_named_precision_is_taken_as_it_is(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dsv3_megatron"):
        assert resolve_precision(precision, CPU) == precision
    assert not caplog.messages


@pytest.mark.parametrize(("queries", "expected"), [
    ({"_is_amx_tile_supported": True, "_is_avx512_bf16_supported": True}, "bf16"),
    ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, "bf16"),
    ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, "fp32"),
    ({}, "fp32"),
])
def test_auto_is_bf16_where_the_cpu_multiplies_it(queries: dict[str, bool], expected: str,
                                                  monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    for query in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        if query in queries:
            monkeypatch.setattr(torch.cpu, query, lambda query=query: queries[query], raising=False)
        else:
            monkeypatch.delattr(torch.cpu, query, raising=False)
    with caplog.at_level(logging.INFO, "dsv3_megatron"):
        assert resolve_precision("auto", CPU) == expected
    assert caplog.messages == [f"precision auto: {expected} on some processor"]


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True), (9, True)])
def test_gpus_from_ampere_on_are_fast_in_bf16(major: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert has_fast_bf16(Device(torch.device("cuda", 0), "nccl", "some GPU")) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA is")
def test_without_cuda_every_local_rank_is_the_cpu() -> None:
    device = detect_device(3)
    assert (device.torch_device, device.backend) == (torch.device("cpu"), "gloo")
    assert "cores" in device.name


@pytest.mark.parametrize(("kind", "asked", "expected"), [
    ("cuda", None, True), ("cpu", None, False), ("cpu", "0", False), ("cpu", "1", True)])
def test_reductions_go_under_the_passes_on_a_gpu_or_where_it_is_asked_for(
        kind: str, asked: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV3_OVERLAP_ON_CPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("DSV3_OVERLAP_ON_CPU", asked)
    assert overlaps_reductions(Device(torch.device(kind), "gloo", "any")) is expected
