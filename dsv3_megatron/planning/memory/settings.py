"""What decides how large the tensors of a pass are: widths on one rank, dtypes, and what is kept how.

Widths are one frozen value for all layers of a run, precisions one for each layer: passes are worked out once for each
and remembered.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config, LinearPrecision, precision_map
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.weights import IN_LAYERS, Place, weights_at
from dsv3_megatron.ops.attention_choices import KEEP_RESULT, PADDED, AttentionCase, choose_attention
from dsv3_megatron.ops.row_bytes import gated_bytes, record_bytes

# Of a machine of GPUs; on a CPU a launcher's ranks are on one.
_RANKS_PER_NODE = {"cuda": 8, "cpu": 1 << 20}
WIDE = 4  # bytes of fp32
INDEX = 8  # of int64
# Modules of a layer by the end of their names.
EXPERTS_FC1, EXPERTS_FC2 = "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"


@dataclass(frozen=True, eq=False)
class MatrixWidths:
    """Rows (out) and columns (in) of a model's matrices on one rank. Those that are alike share one object.

    Attributes:
        by_module: Widths by the module's name within a layer or an MTP module; of experts, those of one.
    """

    by_module: tuple[tuple[str, tuple[int, int]], ...]

    def of(self, module: str) -> tuple[int, int]:
        """Look up rows and columns of a module's matrix."""
        return self._found[module]

    def has(self, module: str) -> bool:
        """Whether the model has a module of this name."""
        return module in self._found

    @functools.cached_property
    def _found(self) -> dict[str, tuple[int, int]]:
        return dict(self.by_module)


# Compared by identity: settings are keys of caches.
_shared_widths = functools.cache(MatrixWidths)


def matrix_widths(model: ModelConfig, parallel: ParallelConfig) -> MatrixWidths:
    """Widths of the matrices of a model's layers and MTP modules on one rank."""
    return _shared_widths(tuple((weight.module, weight.local_matrix(model, parallel))
                                for weight in weights_at(model, *IN_LAYERS, Place.MTP_BEGIN, Place.MTP_END)
                                if weight.is_matrix))


@dataclass(frozen=True)
class PassSettings:
    """Sizes on one rank of one micro-batch.

    Attributes:
        device: "cpu" or "cuda".
        is_engine: Modules are Transformer Engine's.
        narrow: Bytes of a weight or an activation.
        is_wide_product: Products of narrow operands are computed on fp32 copies: a CPU without bf16 matrix units.
        sequences: Sequences in a micro-batch, B.
        length: Positions of a sequence on this rank, which is the whole of it unless context-parallel ranks share it.
        cp: Context-parallel ranks; a sequence is split over them everywhere.
        cp_comm: How core attention gets to the tokens of others, as `cp_comm_type`.
        narrows_latents: Latents go to other ranks in FP8.
        tp: Tensor-parallel ranks; a rank's part is split over them outside of attention and FFN.
        ep: Expert-parallel ranks.
        etp: Expert-tensor-parallel ranks.
        hidden: Width of the hidden states, H.
        heads: Attention heads on this rank.
        query: Width of a query or key head, in elements.
        nope: Width of its part without rotary embedding.
        rope: Rotary width of a query or key head.
        value: Width of a value head.
        query_latent: Width of the queries' latent; None: full-rank queries.
        latent: Width of the latent of keys and values.
        experts: Routed experts of a layer, on all ranks.
        top_k: Experts a token goes to.
        groups: Groups that a layer's routed experts are in.
        expert_ffn: Intermediate width of an expert on this rank.
        matrices: Widths of the matrices of layers and MTP modules on this rank.
        vocabulary: Rows of the embedding on this rank.
        recomputed: Names of modules whose outputs are computed again.
        recomputes_layers: Whole layers are.
        pads_values: Values are brought to the keys' width for core attention.
        holds_attention_result: Core attention keeps its result as the projection behind it gets it.
        sends_by_node: Tokens go to their experts once for each node.
        is_piped: Passes run on a tape, in pieces, and weight gradients may wait.
        imbalance: Rows of this rank's experts, as a multiple of the mean over ranks.
    """

    device: str
    is_engine: bool
    narrow: int
    is_wide_product: bool
    sequences: int
    length: int
    cp: int
    cp_comm: str
    narrows_latents: bool
    tp: int
    ep: int
    etp: int
    hidden: int
    heads: int
    query: int
    nope: int
    rope: int
    value: int
    query_latent: int | None
    latent: int
    experts: int
    top_k: int
    groups: int
    expert_ffn: int
    matrices: MatrixWidths
    vocabulary: int
    recomputed: tuple[str, ...]
    recomputes_layers: bool
    pads_values: bool
    holds_attention_result: bool
    sends_by_node: bool
    is_piped: bool
    imbalance: float

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on this rank, or of the ranks that split them: the rows in attention and FFN."""
        return self.sequences * self.length

    @property
    def whole_length(self) -> int:
        """Positions of a whole sequence."""
        return self.length * self.cp

    @property
    def passes_latents(self) -> bool:
        """Whether ranks attend to blocks of other ranks' tokens, made of latents that they pass."""
        return self.cp > 1 and self.cp_comm != "a2a"

    def of_some_heads(self) -> PassSettings:
        """Settings of core attention to whole sequences by a part of the heads, as many numbers as of all and a part.
        """
        return dataclasses.replace(self, length=self.whole_length, heads=self.heads // self.cp, cp=1)

    @property
    def local_tokens(self) -> int:
        """Rows of the hidden states between attention and FFN, on this rank."""
        return self.tokens // self.tp

    @property
    def local_experts(self) -> int:
        """Experts of a layer on this rank."""
        return self.experts // self.ep

    @property
    def sent_rows(self) -> int:
        """Rows that this rank's tokens make."""
        return self.local_tokens * self.top_k

    @property
    def received_rows(self) -> int:
        """Rows that come to this rank from the other expert-parallel ranks, itself included."""
        return round(self.sent_rows * self.imbalance)

    @property
    def expert_rows(self) -> int:
        """Rows that this rank's experts compute: under expert-tensor parallelism those of all its ranks."""
        return self.received_rows * self.etp

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states between layers."""
        return self.local_tokens * self.hidden * self.narrow

    @property
    def gated_row_bytes(self) -> int:
        """Bytes of a routed row with its gate behind it, in the form in which both travel to an expert."""
        return gated_bytes(self.hidden * self.narrow)

    @property
    def record_bytes(self) -> int:
        """Bytes of a row that travels in FP8, without a gate."""
        return record_bytes(self.hidden)

    @property
    def gated_record_bytes(self) -> int:
        """Bytes of a row that travels in FP8 with its gate."""
        return gated_bytes(self.record_bytes)

    @property
    def products_bytes(self) -> int:
        """Bytes of a number in the experts' products."""
        return WIDE if self.is_wide_product else self.narrow

    @property
    def has_remote_experts(self) -> bool:
        """Whether tokens travel to their experts."""
        return self.ep > 1

    @property
    def has_all_experts(self) -> bool:
        """Whether a CPU's rank has every expert whole, and rows go straight into the experts' order."""
        return self.device == "cpu" and self.ep == self.etp == 1

    def is_recomputed(self, name: str) -> bool:
        """Whether modules of this name compute again in backward what others would keep."""
        return name in self.recomputed


def is_engine(run: RunConfig) -> bool:
    """Whether a run's modules on a GPU are Transformer Engine's; `auto` is what this machine's packages make it."""
    if run.training.transformer_impl == "auto":
        is_plain = not run.data.has_document_attention and run.parallel.context_parallel_size == 1
        return is_plain and _engine_is_installed()
    return run.training.transformer_impl == "transformer_engine"


def attention_kernel(run: RunConfig, *, device: str, precision: str) -> str | None:
    """Name what computes core attention in this library's modules on a Hopper GPU; None: something else computes it."""
    if device != "cuda" or is_engine(run):
        return None
    case = AttentionCase("cuda", value_bytes=4 if precision == "fp32" else 2, query_width=run.model.qk_head_dim,
                         value_width=run.model.v_head_dim, has_documents=run.data.has_document_attention)
    return choose_attention(run.training.attention_backend, case)[0]


def pads_values(run: RunConfig, *, device: str, precision: str) -> bool:
    """Whether core attention has its values brought to the keys' width, on a CPU or a Hopper GPU."""
    return attention_kernel(run, device=device, precision=precision) in PADDED


@functools.cache
def _engine_is_installed() -> bool:
    return is_installed("transformer_engine")


def pass_settings(run: RunConfig, *, device: str, precision: str, is_wide_product: bool = False, imbalance: float = 1.0
                  ) -> PassSettings:
    """Settings of a run's passes.

    Args:
        run: A valid run.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32".
        is_wide_product: The CPU has no bf16 matrix units: products of bf16 operands are computed on fp32 copies.
        imbalance: Rows of this rank's experts, as a multiple of the mean over ranks.
    """
    model, parallel, training = run.model, run.parallel, run.training
    tp, matrices = parallel.tensor_model_parallel_size, matrix_widths(model, parallel)
    kernel = attention_kernel(run, device=device, precision=precision)
    return PassSettings(
        device=device, is_engine=device == "cuda" and is_engine(run), narrow=4 if precision == "fp32" else 2,
        is_wide_product=is_wide_product and precision != "fp32", sequences=training.micro_batch_size,
        length=training.seq_length // parallel.context_parallel_size, cp=parallel.context_parallel_size,
        cp_comm=parallel.cp_comm_type, narrows_latents=parallel.cp_fp8_latents, tp=tp,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size, hidden=model.hidden_size, heads=model.num_attention_heads // tp,
        query=model.qk_head_dim, nope=model.qk_nope_head_dim, rope=model.qk_rope_head_dim, value=model.v_head_dim,
        query_latent=model.q_lora_rank, latent=model.kv_lora_rank,
        experts=model.num_experts, top_k=model.moe_router_topk, groups=model.moe_router_num_groups,
        expert_ffn=matrices.of(EXPERTS_FC2)[1], matrices=matrices,
        vocabulary=model.vocab_size // tp, recomputed=recomputed_modules(training),
        recomputes_layers=training.recompute_granularity == "full",
        pads_values=kernel in PADDED,
        holds_attention_result=parallel.passes_latents or (
            kernel in KEEP_RESULT and not run.data.has_document_attention and parallel.context_parallel_size == 1),
        sends_by_node=parallel.token_dispatcher(_RANKS_PER_NODE[device]) == "node",
        is_piped=parallel.pipeline_model_parallel_size > 1, imbalance=imbalance)


@dataclass(frozen=True, eq=False)
class LayerPrecisions:
    """What of one layer, or of one MTP module, is in FP8. Layers that are alike share one object.

    Attributes:
        lines: Lines of the precision map by module, the end of its name; without those that are not in FP8.
        sends_fp8: Tokens travel to its experts in FP8.
    """

    lines: tuple[tuple[str, LinearPrecision], ...] = ()
    sends_fp8: bool = False

    def line(self, module: str) -> LinearPrecision | None:
        """Line of a module; None if it is not in FP8."""
        for name, precision in self.lines:
            if name == module:
                return precision
        return None


# Compared by identity, so that stages are told apart at a glance.
_shared = functools.cache(LayerPrecisions)
NOT_FP8 = _shared((), False)


@dataclass(frozen=True)
class ModelPrecisions:
    """Precisions of every layer, by the layer's number in the model.

    Attributes:
        decoder: Transformer layers.
        mtp: MTP modules.
    """

    decoder: tuple[LayerPrecisions, ...]
    mtp: tuple[LayerPrecisions, ...]


@functools.lru_cache(maxsize=256)
def model_precisions(fp8: Fp8Config, model: ModelConfig) -> ModelPrecisions:
    """Precisions of a model's layers: the table, the run's flags and its overrides, layer by layer."""
    if not fp8.is_enabled:
        return ModelPrecisions((NOT_FP8,) * model.num_layers, (NOT_FP8,) * model.mtp_num_layers)
    found: dict[str, list[dict[str, LinearPrecision]]] = {
        "decoder": [{} for _ in range(model.num_layers)], "mtp": [{} for _ in range(model.mtp_num_layers)]}
    for name, precision in precision_map(fp8, model).items():
        kind, _, number, module = name.split(".", 3)
        if precision.is_fp8:
            found[kind][int(number)][module.removeprefix("mtp_model_layer.")] = precision

    def layer(lines: dict[str, LinearPrecision]) -> LayerPrecisions:
        experts = lines.get(EXPERTS_FC1)
        return _shared(tuple(lines.items()), fp8.dispatches_fp8 and experts is not None and experts.fprop == "fp8")

    return ModelPrecisions(tuple(map(layer, found["decoder"])), tuple(map(layer, found["mtp"])))
