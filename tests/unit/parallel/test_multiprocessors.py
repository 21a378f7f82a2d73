"""One setting for NCCL, kernels and cuBLAS; on a machine without a GPU each is asked what it was told."""

from __future__ import annotations

import logging

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.parallel import communicators
from dsv3_megatron.parallel.multiprocessors import divide_multiprocessors
from dsv3_megatron.platform import Device

GPU = Device(torch.device("cuda", 0), "nccl", "a GPU")


@pytest.fixture
def launch():
    """The kernels' settings; everything as it was afterwards."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    from dsv3_megatron.kernels import launch

    yield launch
    divide_multiprocessors(ParallelConfig(), GPU)


def heard(launch) -> tuple[int, int | None, int | None]:
    ctas = communicators.communicator_options("nccl").config.max_ctas if torch.distributed.is_nccl_available() else None
    return launch._left_to_communication, ctas, torch._C._get_sm_carveout_experimental()


@pytest.mark.parametrize(("parallel", "count"), [
    (ParallelConfig(), 0), (ParallelConfig(tensor_model_parallel_size=2), 0),
    (ParallelConfig(expert_model_parallel_size=2), 20), (ParallelConfig(pipeline_model_parallel_size=2), 20),
    (ParallelConfig(expert_model_parallel_size=2, num_communication_sms=0), 0),
    (ParallelConfig(num_communication_sms=24), 24)])
def test_all_hear_the_same(launch, parallel, count):
    unlimited = heard(launch)[1]
    divide_multiprocessors(parallel, GPU)
    left, ctas, carveout = heard(launch)
    assert left == count == (carveout or 0)
    assert ctas == (count or unlimited)


def test_another_run_of_this_process_is_told_anew(launch, caplog, monkeypatch):
    unlimited = heard(launch)
    with caplog.at_level(logging.INFO):
        divide_multiprocessors(ParallelConfig(num_communication_sms=24), GPU)
        divide_multiprocessors(ParallelConfig(), GPU)
    assert heard(launch) == unlimited
    assert "multiprocessors for communication: 24; left to it by NCCL and the FP8 kernels and cuBLAS" in caplog.text
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    with caplog.at_level(logging.INFO):
        divide_multiprocessors(ParallelConfig(num_communication_sms=24), GPU)
    assert "not by cuBLAS, which this torch cannot tell" in caplog.text
    monkeypatch.undo()


def test_on_a_cpu_nothing_is_told(launch):
    before = heard(launch)
    divide_multiprocessors(ParallelConfig(num_communication_sms=24), Device(torch.device("cpu"), "gloo", "a CPU"))
    assert heard(launch) == before
