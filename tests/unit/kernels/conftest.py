"""Kernels on a CPU, under Triton's interpreter, which tests/conftest.py chooses."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Skip where kernels would not be interpreted."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    from dsv3_megatron.kernels.launch import IS_INTERPRETED

    if not IS_INTERPRETED:
        pytest.skip("there is a GPU, or TRITON_INTERPRET=0: tests/gpu compares the kernels on a GPU")


@pytest.fixture
def backend():
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    return TritonBackend()
