"""Programs that read an export, and what each of them does not take: one table for the export's message and the docs.

Read in the sources of the versions named here, and run where `docs/export` says so. A program that is not named in a
row takes that setting. Arithmetic on a ModelConfig: a run can be told before it has weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.weights import Fp8, Place, Weight, weights_at

# What a reader does: will not load it; loads it and computes something else; loads it without a part.
REFUSES, DIFFERS, LEAVES_OUT = "refuses", "other results", "leaves out"
TRANSFORMERS_5, TRANSFORMERS_4, VLLM, SGLANG, LLAMA_CPP, MLX_LM = (
    "Transformers 5.23", "Transformers 4.57", "vLLM 0.32", "SGLang 0.5.23", "llama.cpp (Oct 2026)", "mlx-lm 0.32")
READERS = (TRANSFORMERS_5, TRANSFORMERS_4, VLLM, SGLANG, LLAMA_CPP, MLX_LM)
_BLOCK = 128
# Layer counts that llama.cpp takes for a model with full-rank queries, and no others.
_LITE_LAYERS = (26, 27)
# Widths of a latent and its rotary key together for which vLLM's attention is made.
_LATENT_KEYS = (320, 512, 576)


@dataclass(frozen=True)
class Limit:
    """Something of an export that some readers do not take.

    Attributes:
        subject: The thing that is not taken, in words.
        readers: Programs that do not take it.
        effect: REFUSES, DIFFERS or LEAVES_OUT.
        reason: Why, in a clause.
        found_in: The values of an export that have it, as text; "" if it has it not. Given the architecture (without
            MTP modules where they are left out) and the dtype, one of `shards.DTYPES`.
    """

    subject: str
    readers: tuple[str, ...]
    effect: str
    reason: str
    found_in: Callable[[ModelConfig, str], str]


def reader_notes(model: ModelConfig, dtype: str) -> list[str]:
    """A line for each reader and thing of this export that it does not take.

    Args:
        model: The architecture as exported: without MTP modules where these are left out.
        dtype: Dtype of the export: "bf16", "fp8" or "fp32".
    """
    notes = []
    for limit in LIMITS:
        found = limit.found_in(model, dtype)
        if found:
            notes.append(f"{', '.join(limit.readers)}: {limit.effect}: {found}: {limit.reason}")
    return notes


def readers_table() -> str:
    """The table of the docs, in Markdown: a row for each limit, a column for each reader."""
    lines = [f"| What | {' | '.join(READERS)} | Why |", f"| --- |{' --- |' * (len(READERS) + 1)}"]
    for limit in LIMITS:
        cells = [limit.effect if reader in limit.readers else "takes it" for reader in READERS]
        lines.append(f"| {limit.subject} | {' | '.join(cells)} | {limit.reason} |")
    return "\n".join(lines) + "\n"


def _fields(model: ModelConfig, *names: str) -> str:
    return ", ".join(f"{name}={getattr(model, name)}" for name in names)


def _epsilon(model: ModelConfig, dtype: str) -> str:
    return _fields(model, "layernorm_epsilon") if model.layernorm_epsilon != model.latent_epsilon else ""


def _merged_widths(model: ModelConfig) -> dict[str, int]:
    """Widths of projections that programs put on top of each other, gate on up."""
    return {weight.widths[0].text: weight.widths[0].of(model) for weight in _matrices(model) if len(weight.parts) > 1}


def _matrices(model: ModelConfig) -> list[Weight]:
    """Matrices that an FP8 export has in FP8, a layer of each kind."""
    places = [Place.ATTENTION, Place.FFN_INPUT]
    places += [Place.DENSE_LAYER] if model.num_dense_layers else []
    places += [Place.MOE_LAYER] if model.num_moe_layers else []
    return [weight for weight in weights_at(model, *places) if weight.fp8 is Fp8.AS_PUBLISHED]


def _no_blocks(widths: dict[str, int]) -> str:
    return ", ".join(f"{name}={width}" for name, width in widths.items() if width % _BLOCK)


def _fp8_merged(model: ModelConfig, dtype: str) -> str:
    return _no_blocks(_merged_widths(model)) if dtype == "fp8" else ""


def _fp8_query(model: ModelConfig, dtype: str) -> str:
    return _no_blocks({"q_lora_rank": model.q_lora_rank}) if dtype == "fp8" and model.q_lora_rank else ""


def _has_as_many_blocks(*widths: int) -> bool:
    """Whether matrices of these output widths have as many rows of blocks on top of each other as apart."""
    return sum(math.ceil(width / _BLOCK) for width in widths) == math.ceil(sum(widths) / _BLOCK)


def _fp8_fewer_pairs(model: ModelConfig, dtype: str) -> str:
    """Widths of experts, and of FFNs whose gate and up projection have fewer rows of blocks together than apart."""
    if dtype != "fp8":
        return ""
    return _no_blocks({name: width for name, width in _merged_widths(model).items()
                       if name == "moe_ffn_hidden_size" or not _has_as_many_blocks(width, width)})


def _fp8_moved_pairs(model: ModelConfig, dtype: str) -> str:
    return "" if _fp8_fewer_pairs(model, dtype) else _fp8_merged(model, dtype)


def _has_moved_query(model: ModelConfig) -> bool:
    return _has_as_many_blocks(model.q_lora_rank or 0, model.kv_lora_rank + model.qk_rope_head_dim)


def _fp8_fewer_queries(model: ModelConfig, dtype: str) -> str:
    return "" if _has_moved_query(model) else _fp8_query(model, dtype)


def _fp8_moved_queries(model: ModelConfig, dtype: str) -> str:
    return _fp8_query(model, dtype) if _has_moved_query(model) else ""


def _fp8_uneven(model: ModelConfig, dtype: str) -> str:
    """Widths of FP8 matrices that are more than one block and no whole number of blocks."""
    if dtype != "fp8":
        return ""
    widths = {width.text: width.of(model) for weight in _matrices(model) for width in weight.widths}
    return _no_blocks({name: width for name, width in widths.items() if width > _BLOCK})


def _fp8(model: ModelConfig, dtype: str) -> str:
    return "dtype=fp8" if dtype == "fp8" else ""


def _no_shared_experts(model: ModelConfig, dtype: str) -> str:
    return _fields(model, "num_shared_experts") if not model.num_shared_experts and model.num_moe_layers else ""


def _mscale(model: ModelConfig, dtype: str) -> str:
    if model.rope_type != "yarn" or model.rotary_scaling_factor <= 1 or model.mscale == model.mscale_all_dim != 0:
        return ""
    return _fields(model, "mscale", "mscale_all_dim")


def _mtp(model: ModelConfig, dtype: str) -> str:
    return _fields(model, "mtp_num_layers") if model.mtp_num_layers else ""


def _several_mtp(model: ModelConfig, dtype: str) -> str:
    return _fields(model, "mtp_num_layers") if model.mtp_num_layers > 1 else ""


def _foreign_mtp(model: ModelConfig, dtype: str) -> str:
    is_v3s = model.num_layers == 61 and model.mtp_num_layers == 1
    return _fields(model, "num_layers", "mtp_num_layers") if model.mtp_num_layers and not is_v3s else ""


def _dropped_groups(model: ModelConfig, dtype: str) -> str:
    is_limited = model.moe_router_num_groups > model.moe_router_group_topk and model.num_moe_layers
    return _fields(model, "moe_router_num_groups", "moe_router_group_topk") if is_limited else ""


def _one_expert(model: ModelConfig, dtype: str) -> str:
    return _fields(model, "moe_router_topk") if model.moe_router_topk == 1 and model.num_moe_layers else ""


def _query_of_other_depth(model: ModelConfig, dtype: str) -> str:
    is_lite = model.num_layers in _LITE_LAYERS
    return _fields(model, "q_lora_rank", "num_layers") if (model.q_lora_rank is None) != is_lite else ""


def _latent_key(model: ModelConfig, dtype: str) -> str:
    is_known = model.kv_lora_rank + model.qk_rope_head_dim in _LATENT_KEYS
    return "" if is_known else _fields(model, "kv_lora_rank", "qk_rope_head_dim")


LIMITS = (
    Limit("`--norm-epsilon` other than 1e-6", (VLLM, SGLANG, LLAMA_CPP), DIFFERS,
          "they take it for the latents' norms too, which have 1e-6 in Transformers and DeepSeek's code", _epsilon),
    Limit("FP8, an FFN's or the experts' width no multiple of 128", (SGLANG,), REFUSES,
          "gate and up projection are put on top of each other, and a block must not reach from one into the other; "
          "export bf16, or train with multiples of 128", _fp8_merged),
    Limit("the same, of experts, or of an FFN whose two projections have fewer rows of blocks together than apart",
          (VLLM,), REFUSES, "its scales do not fit; export bf16, or train with multiples of 128", _fp8_fewer_pairs),
    Limit("the same, of an FFN whose two projections have as many rows of blocks together as apart", (VLLM,), DIFFERS,
          "it scales rows of the up projection with the gate's scale; export bf16, or train with multiples of 128",
          _fp8_moved_pairs),
    Limit("FP8, `q_lora_rank` no multiple of 128, and fewer rows of blocks with key/value's below it than apart",
          (VLLM, SGLANG), REFUSES, "the down-projections of query and key/value are put on top of each other, and "
          "their scales do not fit", _fp8_fewer_queries),
    Limit("FP8, `q_lora_rank` no multiple of 128, and as many rows of blocks with key/value's below it as apart",
          (VLLM, SGLANG), DIFFERS, "rows of the key/value's projection are scaled with the query's scale",
          _fp8_moved_queries),
    Limit("FP8, a matrix of several blocks and a part of one, on a machine without a GPU", (TRANSFORMERS_5,), REFUSES,
          "it divides a matrix into blocks of equal size where it dequantizes; where that comes out even it computes "
          "other weights", _fp8_uneven),
    Limit("FP8 on a machine without a GPU", (TRANSFORMERS_4,), REFUSES,
          "it says that a GPU is needed; export bf16", _fp8),
    Limit("`--num-shared-experts 0`", (SGLANG, LLAMA_CPP, MLX_LM), REFUSES,
          "config.json has n_shared_experts=0 and tensors without elements, as Transformers has them",
          _no_shared_experts),
    Limit("`--num-shared-experts 0` (layers of no width)", (VLLM,), REFUSES,
          "it builds the shared experts with a width of 0, for which its kernels are not made: on a CPU its process "
          "ends without a message", _no_shared_experts),
    Limit("YaRN with mscale unlike mscale_all_dim, or with 0", (LLAMA_CPP,), DIFFERS,
          "its converter keeps mscale_all_dim only and takes mscale for the same, and 0 for 1", _mscale),
    Limit("MTP modules", (TRANSFORMERS_5, TRANSFORMERS_4, LLAMA_CPP), LEAVES_OUT,
          "Transformers names their tensors as unexpected; export with --no-mtp for none", _mtp),
    Limit("MTP modules, but for one after 61 layers", (MLX_LM,), REFUSES,
          "it knows layer 61 only as one to leave out; export with --no-mtp", _foreign_mtp),
    Limit("more than one MTP module", (SGLANG,), REFUSES,
          "for drafting; without it, it leaves them out", _several_mtp),
    Limit("groups of experts that a token may not go to", (TRANSFORMERS_4, MLX_LM), DIFFERS,
          "experts of the other groups rank with affinity 0 instead of being excluded: others are chosen where biases "
          "make kept ones negative", _dropped_groups),
    Limit("`--moe-router-topk 1`", (MLX_LM,), DIFFERS,
          "it does not divide the only gate by itself", _one_expert),
    Limit("full-rank queries but in 26 or 27 layers, or a query latent in these", (LLAMA_CPP,), REFUSES,
          "it tells the kind of query by the number of layers", _query_of_other_depth),
    Limit("`kv_lora_rank` and `qk_rope_head_dim` whose sum is not 320, 512 or 576", (VLLM,), REFUSES,
          "its attention is made for these; it loads the model and ends at the first text", _latent_key),
)
