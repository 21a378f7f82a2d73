"""Every tensor of a Hugging Face checkpoint of a model: its name, its shape, and which of our parameters it is.

Arithmetic on a ModelConfig, no torch. A parameter of ours is one of Hugging Face's tensors, or two on top of each
other (gate and up projection). Names of ours are those of `model/parameters.py`; the routers' balancing biases, which
are buffers and not parameters, are named likewise (`decoder.layers.5.mlp.router.expert_bias`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from dsv3_megatron.config.model import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
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
    hidden, vocab = model.hidden_size, model.vocab_size
    plain = Storage.PLAIN
    tensors = [HuggingFaceTensor("model.embed_tokens.weight", (vocab, hidden), plain, EMBEDDING)]
    for layer in range(model.num_layers):
        tensors += _layer(model, layer, f"decoder.layers.{layer}", layer >= model.num_dense_layers)
    tensors += [HuggingFaceTensor("model.norm.weight", (hidden,), plain, "decoder.final_layernorm.weight"),
                HuggingFaceTensor("lm_head.weight", (vocab, hidden), plain, HEAD)]
    # An MTP module's block is of the kind of the main model's last layer.
    is_moe = model.num_moe_layers > 0
    for depth in range(model.mtp_num_layers):
        layer, ours = model.num_layers + depth, f"mtp.layers.{depth}"
        theirs = f"model.layers.{layer}"
        tensors += [
            HuggingFaceTensor(f"{theirs}.embed_tokens.weight", (vocab, hidden), plain, EMBEDDING, is_copy=True),
            HuggingFaceTensor(f"{theirs}.enorm.weight", (hidden,), plain, f"{ours}.enorm.weight"),
            HuggingFaceTensor(f"{theirs}.hnorm.weight", (hidden,), plain, f"{ours}.hnorm.weight"),
            HuggingFaceTensor(f"{theirs}.eh_proj.weight", (hidden, 2 * hidden), plain, f"{ours}.eh_proj.weight"),
            *_layer(model, layer, f"{ours}.mtp_model_layer", is_moe),
            HuggingFaceTensor(f"{theirs}.shared_head.norm.weight", (hidden,), plain,
                              f"{ours}.final_layernorm.weight"),
            HuggingFaceTensor(f"{theirs}.shared_head.head.weight", (vocab, hidden), plain, HEAD, is_copy=True),
        ]
    return tensors


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


def _layer(model: ModelConfig, layer: int, ours: str, is_moe: bool) -> Iterator[HuggingFaceTensor]:
    theirs, hidden = f"model.layers.{layer}", model.hidden_size
    norm = Storage.PLAIN
    yield HuggingFaceTensor(f"{theirs}.input_layernorm.weight", (hidden,), norm, f"{ours}.input_layernorm.weight")
    yield from _attention(model, f"{theirs}.self_attn", f"{ours}.self_attention")
    yield HuggingFaceTensor(f"{theirs}.post_attention_layernorm.weight", (hidden,), norm,
                            f"{ours}.pre_mlp_layernorm.weight")
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if not is_moe:
        yield from _swiglu(theirs, ours, hidden, model.ffn_hidden_size)
        return
    yield HuggingFaceTensor(f"{theirs}.gate.weight", (model.num_experts, hidden), Storage.PLAIN,
                            f"{ours}.router.weight")
    yield HuggingFaceTensor(f"{theirs}.gate.e_score_correction_bias", (model.num_experts,), Storage.BIAS,
                            f"{ours}.router.expert_bias")
    for expert in range(model.num_experts):
        yield from _swiglu(f"{theirs}.experts.{expert}", f"{ours}.experts.{expert}", hidden, model.moe_ffn_hidden_size)
    yield from _swiglu(f"{theirs}.shared_experts", f"{ours}.shared_experts", hidden,
                       model.num_shared_experts * model.moe_ffn_hidden_size)


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[HuggingFaceTensor]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    matrix, norm = Storage.MATRIX, Storage.PLAIN
    query_width = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        yield HuggingFaceTensor(f"{theirs}.q_proj.weight", (query_width, hidden), matrix,
                                f"{ours}.linear_q_proj.weight")
    else:
        rank = model.q_lora_rank
        yield HuggingFaceTensor(f"{theirs}.q_a_proj.weight", (rank, hidden), matrix,
                                f"{ours}.linear_q_down_proj.weight")
        yield HuggingFaceTensor(f"{theirs}.q_a_layernorm.weight", (rank,), norm, f"{ours}.q_layernorm.weight")
        yield HuggingFaceTensor(f"{theirs}.q_b_proj.weight", (query_width, rank), matrix,
                                f"{ours}.linear_q_up_proj.weight")
    rank = model.kv_lora_rank
    yield HuggingFaceTensor(f"{theirs}.kv_a_proj_with_mqa.weight", (rank + model.qk_rope_head_dim, hidden), matrix,
                            f"{ours}.linear_kv_down_proj.weight")
    yield HuggingFaceTensor(f"{theirs}.kv_a_layernorm.weight", (rank,), norm, f"{ours}.kv_layernorm.weight")
    yield HuggingFaceTensor(f"{theirs}.kv_b_proj.weight", (heads * (model.qk_nope_head_dim + model.v_head_dim), rank),
                            matrix, f"{ours}.linear_kv_up_proj.weight")
    yield HuggingFaceTensor(f"{theirs}.o_proj.weight", (hidden, heads * model.v_head_dim), matrix,
                            f"{ours}.linear_proj.weight")


def _swiglu(theirs: str, ours: str, hidden: int, width: int) -> Iterator[HuggingFaceTensor]:
    first, second = f"{ours}.linear_fc1.weight", f"{ours}.linear_fc2.weight"
    yield HuggingFaceTensor(f"{theirs}.gate_proj.weight", (width, hidden), Storage.MATRIX, first)
    yield HuggingFaceTensor(f"{theirs}.up_proj.weight", (width, hidden), Storage.MATRIX, first, first_row=width)
    yield HuggingFaceTensor(f"{theirs}.down_proj.weight", (hidden, width), Storage.MATRIX, second)
