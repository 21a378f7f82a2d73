"""One process, its groups, and models of it in float64 with the reference's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dsv3_megatron.certification.reference import Weights
from dsv3_megatron.config.model import ModelConfig
from tests.parity.architectures import reference_weights, run_of


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    """Process groups of a run of one process; stand-ins for CUDA that were not there before are taken back."""
    from dsv3_megatron.config.parallel import ParallelConfig
    from dsv3_megatron.platform import prepare
    from dsv3_megatron.platform.cpu import installed, remove_stand_ins

    if torch.cuda.is_available():
        pytest.skip("compares in float64 on the CPU; on a machine with CUDA run it under CUDA_VISIBLE_DEVICES=")
    had_stand_ins = installed()
    device = prepare()
    from dsv3_megatron.parallel.groups import create_groups, destroy_groups, start_process_group

    start_process_group(device)
    yield create_groups(ParallelConfig(), 1)
    destroy_groups()
    if not had_stand_ins:
        remove_stand_ins()


@pytest.fixture
def build(groups: Any) -> Callable[..., tuple[torch.nn.Module, Weights]]:
    """Builds our model of an architecture in the given dtype, in training mode, and the weights it holds."""
    from dsv3_megatron.certification.weight_names import load_reference_weights
    from dsv3_megatron.model.build import build_stages

    def build_model(model: ModelConfig, dtype: torch.dtype = torch.float64, **training: Any
                    ) -> tuple[torch.nn.Module, Weights]:
        stages, _config = build_stages(run_of(model, **training), groups, precision="fp32")
        weights = reference_weights(model)
        load_reference_weights([stages[0].to(dtype).train()], groups, weights, model.num_layers)
        return stages[0], weights

    return build_model
