"""ops/backend.py: which way products are computed, said once."""

import logging

import pytest
import torch

from dsv3_megatron.ops import backend
from dsv3_megatron.ops.backend import choose_product_backend, log_choice, wide_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget():
    """What was chosen and said before."""
    for cached in (backend._choose_automatically, log_choice):
        cached.cache_clear()
    yield
    for cached in (backend._choose_automatically, log_choice):
        cached.cache_clear()


@pytest.mark.parametrize(("has_units", "device", "dtype", "expected"), [
    (False, CPU, torch.bfloat16, "via_fp32"), (False, CPU, torch.float16, "via_fp32"),
    (True, CPU, torch.bfloat16, "native"), (False, GPU, torch.bfloat16, "native"),
    (False, CPU, torch.float32, "native"), (False, CPU, torch.float64, "native")])
def test_auto(monkeypatch, has_units, device, dtype, expected):
    monkeypatch.setattr(backend, "has_bf16_matrix_units", lambda: has_units)
    assert choose_product_backend("auto", device, dtype) == expected


def test_a_name_is_taken_where_there_is_something_to_choose():
    assert choose_product_backend("via_fp32", GPU, torch.bfloat16) == "via_fp32"
    assert choose_product_backend("native", CPU, torch.bfloat16) == "native"
    assert choose_product_backend("via_fp32", CPU, torch.float32) == "native"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="backend='fast' of matrix products must be one of auto, native, via_fp32; "
                                         "try 'auto'"):
        choose_product_backend("fast", CPU, torch.float32)


def test_a_choice_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "has_bf16_matrix_units", lambda: False)
    with caplog.at_level(logging.INFO, "dsv3_megatron.ops.backend"):
        for _ in range(3):
            choose_product_backend("auto", CPU, torch.bfloat16)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["matrix products: backend via_fp32"]
    assert "no bf16 matrix units" in caplog.text


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                                 (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_wide_dtype(dtype, expected):
    assert wide_dtype(dtype) == expected
