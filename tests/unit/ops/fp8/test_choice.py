"""Which FP8 backend is chosen, what a missing one says, and Transformer Engine's recipe from its module surface."""


import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.ops.fp8 import choice as fp8_choice
from dsv3_megatron.ops.fp8.choice import local_backend, resolve_fp8_backend


@pytest.fixture
def hopper(monkeypatch):
    def install(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")

    return install


def test_auto_on_a_cpu(caplog):
    with caplog.at_level("INFO", "dsv3_megatron"):
        assert resolve_fp8_backend("auto", transformer_impl="local") == "reference"
    assert "fp8_backend auto: reference (no CUDA device)" in caplog.text
    assert local_backend("reference").name == "reference"


def test_auto_on_gpus(hopper):
    hopper((9, 0))
    assert resolve_fp8_backend("auto", transformer_impl="local") == "triton"
    assert resolve_fp8_backend("auto", transformer_impl="local", accumulation="fp22") == "reference"
    assert resolve_fp8_backend("auto", transformer_impl="transformer_engine") == "transformer_engine"
    assert resolve_fp8_backend("triton", transformer_impl="local") == "triton"
    hopper((8, 0))
    assert resolve_fp8_backend("reference", transformer_impl="local") == "reference"
    with pytest.raises(ConfigError, match=r"fp8=blockwise on NVIDIA X needs what is not here: compute capability 9.x "
                                          r"\(Hopper; this is 8.0\); set fp8=none, or fp8_backend=reference"):
        resolve_fp8_backend("auto", transformer_impl="local")
    with pytest.raises(ConfigError, match=r"needs what is not here: compute capability 9.x \(Hopper; this is 8.0\)"):
        resolve_fp8_backend("triton", transformer_impl="local")


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="fp8_backend=triton needs what is not here: CUDA device; use "
                                          "fp8_backend=reference"):
        resolve_fp8_backend("triton", transformer_impl="local")
    with pytest.raises(ConfigError, match="fp8_backend=transformer_engine needs modules from Transformer Engine"):
        resolve_fp8_backend("transformer_engine", transformer_impl="local")
    with pytest.raises(ConfigError, match="this run is built from Transformer Engine's; set transformer_impl=local"):
        resolve_fp8_backend("reference", transformer_impl="transformer_engine")
    monkeypatch.setattr(fp8_choice, "is_installed", lambda _: False)
    with pytest.raises(ConfigError, match="triton package and CUDA device"):
        resolve_fp8_backend("triton", transformer_impl="local")


# -- Transformer Engine: the names and defaults of its recipe module, version 2.20 ----------------------
