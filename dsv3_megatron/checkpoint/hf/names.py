"""Every tensor of a Hugging Face checkpoint of a model: its name, its shape, and which of our parameters it is.

A query of the table of weights (`config/weights.py`), no torch. A parameter of ours is one of Hugging Face's tensors,
or two on top of each other (gate and up projection). Names of ours are those of `model/global_names.py`; the routers'
balancing biases, which are buffers and not parameters, are named likewise (`decoder.layers.5.mlp.router.expert_bias`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.weights import Fp8, Weight, each_expert, sections

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(linear_fc[12]\.weight)")


class Storage(Enum):
    """How the published checkpoint stores a tensor."""

    MATRIX = "FP8 with scales in 128 x 128 blocks, where the checkpoint is quantized"
    PLAIN = "never quantized: embedding, head, router, eh_proj, norms"
    BIAS = "FP32: a router's balancing bias"


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a Hugging Face checkpoint, and the parameter of ours that it belongs to.

    Attributes:
        name: Name in the Hugging Face checkpoint.
        shape: Lengths of the axes; linear weights are [out, in].
        storage: How the published checkpoint stores it.
        parameter: Global name of our parameter that it is a part of, or of a router's bias.
        first_row: Row of that parameter at which the tensor begins.
        is_copy: The tensor is an MTP module's stored copy of the main model's embedding or head, which may be left out.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    parameter: str
    first_row: int = 0
    is_copy: bool = False

    @property
    def num_elements(self) -> int:
        """Number of elements in the tensor."""
        return math.prod(self.shape)

    @property
    def scale_name(self) -> str:
        """Name of the tensor's block scales, where the published checkpoint stores it in FP8."""
        return self.name + "_scale_inv"


def hugging_face_tensors(model: ModelConfig) -> list[HuggingFaceTensor]:
    """Every tensor of the model, in the order of the forward pass; block scales not listed.

    Where the model has no shared experts theirs are there with a width of 0, as `transformers` has them.

    Source: names and shapes of the published checkpoint; MTP module k is layer `num_layers + k`.
    """
    tensors = []
    for section in sections(model, has_empty=True):
        for weight in section.copies:
            tensors.append(HuggingFaceTensor(section.theirs + weight.copied_as, weight.part_shape(model),
                                             Storage.PLAIN, weight.name, is_copy=True))
        for weight, expert in each_expert(section.weights, model):
            shape, storage = weight.part_shape(model), _storage(weight)
            parameter = section.ours + weight.name.format(expert=expert)
            tensors += [HuggingFaceTensor(section.theirs + part.format(expert=expert), shape, storage, parameter,
                                          first_row=number * shape[0])
                        for number, part in enumerate(weight.parts)]
    return tensors


def _storage(weight: Weight) -> Storage:
    if not weight.is_trained:
        return Storage.BIAS
    return Storage.MATRIX if weight.fp8 is Fp8.AS_PUBLISHED else Storage.PLAIN


def tensors_by_parameter(model: ModelConfig) -> dict[str, tuple[HuggingFaceTensor, ...]]:
    """The tensors that make up each of our parameters and each router's bias, from its first row on.

    Copies in MTP modules and tensors without elements are not listed.
    """
    found: dict[str, tuple[HuggingFaceTensor, ...]] = {}
    for tensor in hugging_face_tensors(model):
        if not tensor.is_copy and tensor.num_elements:
            found[tensor.parameter] = (*found.get(tensor.parameter, ()), tensor)
    return found


def layer_of(name: str) -> int | None:
    """Index of the layer that a Hugging Face name belongs to, None outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def checkpoint_place(parameter: str) -> tuple[str, int | None]:
    """Place of a parameter in a checkpoint of ours: the tensor's key, and the index in its first dimension.

    Routed experts of a layer are stacked in one tensor; the index is the expert's. For all else it is None.
    """
    # Megatron-Core saves an MTP module's layer under the name that it had before it was called mtp_model_layer.
    key = re.sub(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.", r"\1.transformer_layer.", parameter)
    expert = _EXPERT.fullmatch(key)
    if expert is None:
        return key, None
    return f"{expert[1]}.experts.experts.{expert[3]}", int(expert[2])
