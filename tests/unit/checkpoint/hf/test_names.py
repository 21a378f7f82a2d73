"""Hugging Face's names of the tensors: the published ones, and those of the built modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from dsv3_megatron.certification.reference_weights import weight_shapes
from dsv3_megatron.checkpoint.hf.names import hugging_face_tensors, tensors_by_parameter
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.model.global_names import whole_parameters
from tests.unit.model.test_counts import build_without_memory, megatron_core, one_of

__all__ = ["megatron_core"]  # a fixture

V3 = preset("dsv3-671b")


def test_names_are_the_published_ones():
    """Against the tests' own list, which has no copies."""
    expected = set(weight_shapes(V3.model)) | {"model.layers.61.embed_tokens.weight",
                                               "model.layers.61.shared_head.head.weight"}
    assert {tensor.name for tensor in hugging_face_tensors(V3.model)} == expected


@pytest.fixture
def whole_model(megatron_core: None) -> Iterator[dict[str, tuple[int, ...]]]:
    """Every parameter and router bias of dsv3-671b as one process would hold it, built without memory."""
    run = dataclasses.replace(V3, parallel=ParallelConfig())
    with one_of(1, 0, run.parallel) as groups:
        (stage,) = build_without_memory(run, groups)
        shapes = {whole.name: whole.shape for whole in whole_parameters(stage, groups)}
    shapes |= {name: tuple(buffer.shape) for name, buffer in stage.named_buffers() if name.endswith("expert_bias")}
    yield shapes


def test_the_modules_are_the_inventory(whole_model: dict[str, tuple[int, ...]]):
    """Built on the meta device: each parameter is the tensors that are listed for it, and there is no other."""
    parts = tensors_by_parameter(V3.model)
    assert parts.keys() == whole_model.keys()
    for name, shape in whole_model.items():
        assert (sum(part.shape[0] for part in parts[name]), *parts[name][0].shape[1:]) == shape, name
