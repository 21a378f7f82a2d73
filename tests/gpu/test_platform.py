"""With CUDA nothing of torch or Megatron-Core is replaced."""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_prepare_selects_the_gpu(runs, gpu):
    device = runs.prepare()
    assert device.is_cuda and device.backend == "nccl"
    assert device.torch_device == gpu and torch.cuda.current_device() == gpu.index
    assert device.name == torch.cuda.get_device_name(gpu)


def test_nothing_is_replaced(runs, attributes_before):
    from dsv3_megatron.platform import cpu

    runs.prepare()
    assert not cpu.installed()
    for index, stand_in in enumerate(cpu.STAND_INS):
        if index in attributes_before:
            assert getattr(stand_in.owner, stand_in.name) is attributes_before[index], stand_in.name
        else:
            attribute = getattr(importlib.import_module(stand_in.owner), stand_in.name)
            assert attribute is not stand_in.replacement, stand_in.name
            assert not getattr(attribute, "__module__", "").startswith("dsv3_megatron"), stand_in.name


def test_stand_ins_refuse_a_machine_with_cuda(gpu):
    from dsv3_megatron.platform import cpu

    with pytest.raises(RuntimeError, match="this one has CUDA"):
        cpu.install_stand_ins()
    assert not cpu.installed()
