"""The architecture as one table: a row for every weight, and the few questions that the library asks of the rows.

A row says how a weight is called, how long its axes are, which component of the model it belongs to, how the ranks
split it, which tensors of a Hugging Face checkpoint it is, and whether FP8 may compute it. Nothing else writes this
down: counts of parameters, bytes of a rank, balanced stages, plans, the FP8 map, the names of exports, benchmark shapes
and the page of names are queries of this table. To add a weight, add a row here and the parameter to its module
(docs/contributing/add_a_weight.md).

Names of modules and of Hugging Face's tensors are relative to the part of the model that a row stands in; `Section`
puts the number of the layer or of the MTP module before them. "{expert}" stands for a routed expert's number.

Source: DeepSeek-V3 report, sections 2.1.1 (eq. 1-11), 2.1.2 and 2.2, and the published checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig

# -- what the columns of the table say ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Width:
    """A width of the model in terms of the fields of `ModelConfig`; sums and products of widths are widths.

    Attributes:
        text: The width as a formula of field names, such as "kv_lora_rank + qk_rope_head_dim".
        of: The width of a given model, in elements; a field that is none counts as 0.
    """

    text: str
    of: Callable[[ModelConfig], int]

    def __add__(self, other: Width) -> Width:
        return Width(f"{self.text} + {other.text}", lambda model: self.of(model) + other.of(model))

    def __mul__(self, other: Width) -> Width:
        texts = (f"({width.text})" if " + " in width.text else width.text for width in (self, other))
        return Width(" * ".join(texts), lambda model: self.of(model) * other.of(model))


def field(name: str) -> Width:
    """Make a width of one field of `ModelConfig`."""
    return Width(name, lambda model: getattr(model, name) or 0)


class Split(Enum):
    """How tensor-parallel ranks share a matrix [out, in]; routed experts are shared by expert-tensor-parallel ranks."""

    REPLICATED = "every rank holds all of it"
    COLUMN = "by output features: the rows of the matrix; of parts on top of each other, the rows of each part"
    ROW = "by input features: the columns of the matrix"


class Fp8(Enum):
    """Whether FP8 may compute a weight's products, and whether the published checkpoint stores it in FP8."""

    NEVER = "never"
    ON_REQUEST = "where an override of the run says so; stored as the rest"
    AS_PUBLISHED = "unless an override says otherwise; stored in FP8 with scales in 128 x 128 blocks"


class Place(Enum):
    """The part of the model that a row stands in, in the order of the forward pass."""

    EMBEDDING = "before the first layer; an MTP module begins with the same weight"
    ATTENTION = "the attention of each transformer layer, those of MTP modules too, and the norm before it"
    FFN_INPUT = "each transformer layer, behind its attention"
    DENSE_LAYER = "the FFN of a layer that has one"
    MOE_LAYER = "router and experts of a layer that has them"
    AFTER_LAYERS = "behind the last layer"
    HEAD = "at the end; an MTP module ends with the same weight"
    MTP_BEGIN = "an MTP module before its layer"
    MTP_END = "an MTP module behind its layer"


# The places of transformer layers.
IN_LAYERS = (Place.ATTENTION, Place.FFN_INPUT, Place.DENSE_LAYER, Place.MOE_LAYER)
# Components, in the order in which a layer's are listed.
COMPONENTS = ("embedding", "attention", "dense_ffn", "router", "routed_experts", "shared_experts", "norms",
              "final_norm", "head", "mtp")


def _always(model: ModelConfig) -> bool:
    return True


def _has_query_latent(model: ModelConfig) -> bool:
    return model.q_lora_rank is not None


def _has_full_rank_queries(model: ModelConfig) -> bool:
    return model.q_lora_rank is None


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
        name: Name below the section's module, without a number: "mlp.experts.{expert}.linear_fc1.weight".
        widths: Lengths of the axes of one of the weight's parts; a matrix is [out, in].
        parts: Names of the Hugging Face tensors that the weight is made of, below the section there. Several are of one
            shape and lie on top of each other in the weight, the first one in its upper rows.
        component: The component that the weight belongs to, one of COMPONENTS.
        line: Line of the table of counts that it is counted in; "": that of its component.
        split: How tensor-parallel ranks share the weight.
        fp8: Whether FP8 may compute the products with it.
        when: Whether a model has the weight.
        is_trained: A gradient trains it. If not, it is a buffer in fp32 and no parameter.
        fused_into: Linear after a norm, into which Transformer Engine fuses the norm's weight; "": none.
        copied_as: Name of the tensor by which each MTP module stores it again at Hugging Face; "": none does.
    """

    name: str
    widths: tuple[Width, ...]
    parts: tuple[str, ...]
    component: str
    line: str = ""
    split: Split = Split.REPLICATED
    fp8: Fp8 = Fp8.NEVER
    when: Callable[[ModelConfig], bool] = _always
    is_trained: bool = True
    fused_into: str = ""
    copied_as: str = ""

    def __post_init__(self) -> None:
        assert self.component in COMPONENTS, f"{self.name}: component {self.component} is none of {COMPONENTS}"
        assert self.split is Split.REPLICATED or self.is_matrix, f"{self.name}: only a matrix is split"
        assert self.fp8 is Fp8.NEVER or self.is_matrix, f"{self.name}: only a matrix has products"

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is the matrix of a product or a table, not a vector."""
        return len(self.widths) == 2

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the weight is the matrix of a product with hidden states, not with a latent or with heads."""
        return self.is_matrix and self.widths[1] is _HIDDEN

    @property
    def is_expert(self) -> bool:
        """Whether each routed expert has one."""
        return "{expert}" in self.name

    @property
    def counted_as(self) -> str:
        """The line of the table of counts."""
        return self.line or self.component

    @property
    def module(self) -> str:
        """Name of the module that holds the weight; the experts of a layer are held by one."""
        return self.name.replace("{expert}.", "").removesuffix(".weight")

    @property
    def engine_name(self) -> str:
        """Name of a norm's weight where Transformer Engine has fused the norm into the linear after it."""
        return f"{self.fused_into}.layer_norm_weight"

    def part_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Lengths of the axes of one part; of one expert."""
        return tuple(width.of(model) for width in self.widths)

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Lengths of the axes of the whole weight; of one expert."""
        rows, *columns = self.part_shape(model)
        return (len(self.parts) * rows, *columns)

    def numel(self, model: ModelConfig) -> int:
        """Elements of the whole weight; of one expert."""
        return math.prod(self.shape(model))

    def local_shape(self, model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
        """Lengths of the axes of what one tensor-parallel rank holds; of one expert."""
        ranks = parallel.expert_tensor_parallel_size if self.is_expert else parallel.tensor_model_parallel_size
        shape = list(self.shape(model))
        if self.split is not Split.REPLICATED:
            shape[0 if self.split is Split.COLUMN else 1] //= ranks
        return tuple(shape)

    def local_matrix(self, model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
        """Rows (out) and columns (in) of what one tensor-parallel rank holds of a matrix; of one expert."""
        rows, columns = self.local_shape(model, parallel)
        return rows, columns

    def local_numel(self, model: ModelConfig, parallel: ParallelConfig) -> int:
        """Elements that one rank holds: its part, of each of its experts."""
        experts = model.num_experts // parallel.expert_model_parallel_size if self.is_expert else 1
        return experts * math.prod(self.local_shape(model, parallel))


# -- the table ---------------------------------------------------------------------------------------------------

_HIDDEN, _VOCABULARY = field("hidden_size"), field("vocab_size")
_HEADS, _EXPERTS = field("num_attention_heads"), field("num_experts")
_QUERY_LATENT, _KEY_VALUE_LATENT, _ROTARY = field("q_lora_rank"), field("kv_lora_rank"), field("qk_rope_head_dim")
_QUERIES = _HEADS * (field("qk_nope_head_dim") + _ROTARY)
_KEYS_AND_VALUES = _HEADS * (field("qk_nope_head_dim") + field("v_head_dim"))
_DENSE, _EXPERT = field("ffn_hidden_size"), field("moe_ffn_hidden_size")
_SHARED = field("num_shared_experts") * _EXPERT

WEIGHTS: dict[Place, tuple[Weight, ...]] = {
    Place.EMBEDDING: (
        Weight("embedding.word_embeddings.weight", (_VOCABULARY, _HIDDEN), ("model.embed_tokens.weight",), "embedding",
               split=Split.COLUMN, copied_as="embed_tokens.weight"),
    ),
    Place.ATTENTION: (
        Weight("input_layernorm.weight", (_HIDDEN,), ("input_layernorm.weight",), "norms", "layer_norms"),
        Weight("self_attention.linear_q_proj.weight", (_QUERIES, _HIDDEN), ("self_attn.q_proj.weight",), "attention",
               "q_proj", Split.COLUMN, Fp8.AS_PUBLISHED, _has_full_rank_queries),
        Weight("self_attention.linear_q_down_proj.weight", (_QUERY_LATENT, _HIDDEN), ("self_attn.q_a_proj.weight",),
               "attention", "q_a_proj", Split.REPLICATED, Fp8.AS_PUBLISHED, _has_query_latent),
        Weight("self_attention.q_layernorm.weight", (_QUERY_LATENT,), ("self_attn.q_a_layernorm.weight",), "norms",
               "layer_norms", when=_has_query_latent, fused_into="self_attention.linear_q_up_proj"),
        Weight("self_attention.linear_q_up_proj.weight", (_QUERIES, _QUERY_LATENT), ("self_attn.q_b_proj.weight",),
               "attention", "q_b_proj", Split.COLUMN, Fp8.AS_PUBLISHED, _has_query_latent),
        Weight("self_attention.linear_kv_down_proj.weight", (_KEY_VALUE_LATENT + _ROTARY, _HIDDEN),
               ("self_attn.kv_a_proj_with_mqa.weight",), "attention", "kv_a_proj", Split.REPLICATED, Fp8.AS_PUBLISHED),
        Weight("self_attention.kv_layernorm.weight", (_KEY_VALUE_LATENT,), ("self_attn.kv_a_layernorm.weight",),
               "norms", "layer_norms", fused_into="self_attention.linear_kv_up_proj"),
        Weight("self_attention.linear_kv_up_proj.weight", (_KEYS_AND_VALUES, _KEY_VALUE_LATENT),
               ("self_attn.kv_b_proj.weight",), "attention", "kv_b_proj", Split.COLUMN, Fp8.AS_PUBLISHED),
        Weight("self_attention.linear_proj.weight", (_HIDDEN, _HEADS * field("v_head_dim")),
               ("self_attn.o_proj.weight",), "attention", "o_proj", Split.ROW, Fp8.AS_PUBLISHED),
    ),
    Place.FFN_INPUT: (
        Weight("pre_mlp_layernorm.weight", (_HIDDEN,), ("post_attention_layernorm.weight",), "norms", "layer_norms",
               fused_into="mlp.linear_fc1"),
    ),
    Place.DENSE_LAYER: (
        Weight("mlp.linear_fc1.weight", (_DENSE, _HIDDEN), ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
               "dense_ffn", "", Split.COLUMN, Fp8.AS_PUBLISHED),
        Weight("mlp.linear_fc2.weight", (_HIDDEN, _DENSE), ("mlp.down_proj.weight",),
               "dense_ffn", "", Split.ROW, Fp8.AS_PUBLISHED),
    ),
    Place.MOE_LAYER: (
        Weight("mlp.router.weight", (_EXPERTS, _HIDDEN), ("mlp.gate.weight",), "router"),
        Weight("mlp.router.expert_bias", (_EXPERTS,), ("mlp.gate.e_score_correction_bias",), "router",
               is_trained=False),
        Weight("mlp.experts.{expert}.linear_fc1.weight", (_EXPERT, _HIDDEN),
               ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
               "routed_experts", "", Split.COLUMN, Fp8.AS_PUBLISHED),
        Weight("mlp.experts.{expert}.linear_fc2.weight", (_HIDDEN, _EXPERT), ("mlp.experts.{expert}.down_proj.weight",),
               "routed_experts", "", Split.ROW, Fp8.AS_PUBLISHED),
        Weight("mlp.shared_experts.linear_fc1.weight", (_SHARED, _HIDDEN),
               ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
               "shared_experts", "", Split.COLUMN, Fp8.AS_PUBLISHED),
        Weight("mlp.shared_experts.linear_fc2.weight", (_HIDDEN, _SHARED), ("mlp.shared_experts.down_proj.weight",),
               "shared_experts", "", Split.ROW, Fp8.AS_PUBLISHED),
    ),
    Place.AFTER_LAYERS: (
        Weight("decoder.final_layernorm.weight", (_HIDDEN,), ("model.norm.weight",), "final_norm"),
    ),
    Place.HEAD: (
        Weight("output_layer.weight", (_VOCABULARY, _HIDDEN), ("lm_head.weight",), "head", split=Split.COLUMN,
               copied_as="shared_head.head.weight"),
    ),
    Place.MTP_BEGIN: (
        Weight("enorm.weight", (_HIDDEN,), ("enorm.weight",), "mtp", "input_norms"),
        Weight("hnorm.weight", (_HIDDEN,), ("hnorm.weight",), "mtp", "input_norms"),
        Weight("eh_proj.weight", (_HIDDEN, _HIDDEN + _HIDDEN), ("eh_proj.weight",), "mtp", "eh_proj", Split.COLUMN,
               Fp8.ON_REQUEST),
    ),
    Place.MTP_END: (
        Weight("final_layernorm.weight", (_HIDDEN,), ("shared_head.norm.weight",), "mtp", "final_norm"),
    ),
}


# -- questions ---------------------------------------------------------------------------------------------------


def weights_at(model: ModelConfig, *places: Place, has_empty: bool = False) -> tuple[Weight, ...]:
    """Rows of these parts of a model, in the table's order.

    Args:
        model: The model; rows that it does not have are left out.
        places: Parts of the model.
        has_empty: List also weights without elements, which the shared experts of a model without any are.
    """
    return tuple(weight for place in places for weight in WEIGHTS[place]
                 if weight.when(model) and (has_empty or weight.numel(model)))


def layer_weights(model: ModelConfig, *, is_moe: bool, has_empty: bool = False) -> tuple[Weight, ...]:
    """Rows of one transformer layer with experts, or with a dense FFN."""
    return weights_at(model, Place.ATTENTION, Place.FFN_INPUT, Place.MOE_LAYER if is_moe else Place.DENSE_LAYER,
                      has_empty=has_empty)


@dataclass(frozen=True)
class Section:
    """A numbered part of a model, with its weights.

    Attributes:
        ours: What comes before the names of its modules: "decoder.layers.5.", or nothing.
        theirs: What comes before the names of its Hugging Face tensors.
        weights: Rows of the table.
        copies: Rows whose tensor an MTP module stores again at Hugging Face, here.
    """

    ours: str
    theirs: str
    weights: tuple[Weight, ...]
    copies: tuple[Weight, ...] = ()


def sections(model: ModelConfig, *, has_empty: bool = False) -> Iterator[Section]:
    """All parts of a model, in the order of the forward pass; MTP module k is layer `num_layers + k` at Hugging Face.

    Args:
        model: Any architecture.
        has_empty: List also weights without elements.
    """
    yield Section("", "", weights_at(model, Place.EMBEDDING))
    for layer in range(model.num_layers):
        yield Section(f"decoder.layers.{layer}.", f"model.layers.{layer}.",
                      layer_weights(model, is_moe=layer >= model.num_dense_layers, has_empty=has_empty))
    yield Section("", "", weights_at(model, Place.AFTER_LAYERS, Place.HEAD))
    for depth in range(model.mtp_num_layers):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{model.num_layers + depth}."
        yield Section(ours, theirs, (), weights_at(model, Place.EMBEDDING))
        yield Section(ours, theirs, weights_at(model, Place.MTP_BEGIN))
        # An MTP module's layer is of the kind of the main model's last one.
        yield Section(f"{ours}mtp_model_layer.", theirs,
                      layer_weights(model, is_moe=model.num_moe_layers > 0, has_empty=has_empty))
        yield Section(ours, theirs, weights_at(model, Place.MTP_END))
        yield Section(ours, theirs, (), weights_at(model, Place.HEAD))


def model_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every whole weight by its global name, routed experts one by one, routers' biases among them."""
    shapes = {}
    for section in sections(model):
        for weight, expert in each_expert(section.weights, model):
            shapes[section.ours + weight.name.format(expert=expert)] = weight.shape(model)
    return shapes


def each_expert(weights: tuple[Weight, ...], model: ModelConfig) -> Iterator[tuple[Weight, int | None]]:
    """Rows in their order with the number of the expert; all rows of an expert come before the next one's."""
    experts = [weight for weight in weights if weight.is_expert]
    for weight in weights:
        if not weight.is_expert:
            yield weight, None
        elif weight is experts[0]:
            yield from ((each, expert) for expert in range(model.num_experts) for each in experts)


_LAYER = re.compile(r"(?:decoder\.layers\.\d+|mtp\.layers\.\d+\.mtp_model_layer)\.")
_MTP = re.compile(r"mtp\.layers\.\d+\.")


def find_weight(name: str) -> Weight:
    """The row of a weight.

    Args:
        name: Global name, with an expert's number or, of the experts that a rank holds as one tensor, without.
    """
    places: tuple[Place, ...] = (Place.EMBEDDING, Place.AFTER_LAYERS, Place.HEAD)
    rest = name
    if found := _LAYER.match(name):
        places, rest = IN_LAYERS, name[found.end():]
    elif found := _MTP.match(name):
        places, rest = (Place.MTP_BEGIN, Place.MTP_END), name[found.end():]
    own = re.sub(r"\.experts\.\d+\.", ".experts.", rest)
    rows = [weight for place in places for weight in WEIGHTS[place] if weight.name.replace("{expert}.", "") == own]
    assert len(rows) == 1, f"weight {name} has {len(rows)} rows in {__name__}; give it one"
    return rows[0]
