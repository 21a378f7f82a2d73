"""What the papers say of the model: widths, counts, parameters, operations of a token, bytes of its cache."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.papers.claim import COMPANION, PUBLISHED_CONFIG, REPORT, WEIGHTS_README, Claim

_PRINT = "dsv3 train --preset dsv3-671b --print-model"
_CACHE = "dsv3 report --slow"
_HERE = "dsv3 report"
_SEQ_LENGTH = 4096  # companion, table 2


def v3() -> ModelConfig:
    """DeepSeek-V3 as the preset has it."""
    return preset("dsv3-671b").model


@lru_cache(maxsize=1)
def v2() -> ModelConfig:
    """DeepSeek-V2 of 236B parameters, in this library's fields. Source: config_236B.json of the published code."""
    return dataclasses.replace(
        v3(), num_layers=60, num_dense_layers=1, hidden_size=5120, ffn_hidden_size=12288, num_experts=160,
        moe_ffn_hidden_size=1536, moe_router_topk=6, num_shared_experts=2, moe_router_num_groups=8,
        moe_router_group_topk=3, moe_router_topk_scaling_factor=16.0, vocab_size=102400, mtp_num_layers=0)


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """Bytes of a token in the latent cache that generation allocates, BF16; nothing is allocated here."""
    import torch

    from dsv3_megatron.generation.cache import LatentCache

    model = v3()
    widths = cast(Any, SimpleNamespace(kv_lora_rank=model.kv_lora_rank, qk_pos_emb_head_dim=model.qk_rope_head_dim))
    return LatentCache(widths, num_layers=model.num_layers, num_rows=1, capacity=1, dtype=torch.bfloat16,
                       device=torch.device("meta")).bytes_per_token


def _setting(subject: str, said: str, field: str, *, place: str = "4.2", source: str = REPORT, why: str = "") -> Claim:
    def gives() -> float | str:
        value = getattr(v3(), field)
        return value if isinstance(value, str) else float(value)
    return Claim(subject, source, place, said, gives, command=_PRINT, why=why)


ARCHITECTURE = (
    _setting("Transformer layers", "61", "num_layers"),
    _setting("hidden width", "7168", "hidden_size"),
    _setting("attention heads", "128", "num_attention_heads"),
    _setting("width of a head without rotary part", "128", "qk_nope_head_dim"),
    _setting("width of a value head", "128", "v_head_dim"),
    _setting("width of the key/value latent", "512", "kv_lora_rank"),
    _setting("width of the query latent", "1536", "q_lora_rank"),
    _setting("rotary width of a head", "64", "qk_rope_head_dim"),
    _setting("leading layers with a dense FFN", "3", "num_dense_layers"),
    _setting("shared experts of a layer", "1", "num_shared_experts"),
    _setting("routed experts of a layer", "256", "num_experts"),
    _setting("hidden width of an expert", "2048", "moe_ffn_hidden_size"),
    _setting("routed experts of a token", "8", "moe_router_topk"),
    _setting("nodes that a token goes to at most", "4", "moe_router_group_topk",
             why="With 8 groups of experts on 8 nodes (below), so a group is a node."),
    _setting("further tokens predicted (MTP depth)", "1", "mtp_num_layers"),
    _setting("standard deviation of initial weights", "0.006", "init_method_std"),
    _setting("hidden width of the dense FFN", "18432", "ffn_hidden_size", source=PUBLISHED_CONFIG, place="config_671B"),
    _setting("groups of experts", "8", "moe_router_num_groups", source=PUBLISHED_CONFIG, place="config_671B"),
    _setting("factor on the gates", "2.5", "moe_router_topk_scaling_factor", source=PUBLISHED_CONFIG,
             place="config_671B"),
    _setting("score function", "sigmoid", "moe_router_score_function", source=PUBLISHED_CONFIG, place="config_671B"),
    _setting("rows of the embedding", "129280", "vocab_size", source=PUBLISHED_CONFIG, place="config_671B"),
    Claim("vocabulary", REPORT, "4.1", "128K", lambda: float(v3().vocab_size), unit=1e3, command=_PRINT,
          why="The published embedding has 129,280 rows: the 128K tokens, special tokens, and padding."),
)

PARAMETERS = (
    Claim("all parameters", REPORT, "4.2", "671B", lambda: count_parameters(v3()).main_total, 1e9, command=_PRINT),
    Claim("parameters that a token activates", REPORT, "4.2", "37B",
          lambda: count_parameters(v3()).main_active_without_embedding, 1e9, command=_PRINT,
          why="Without the embedding table, of which a token reads one row; 37.6B with it."),
    Claim("parameters that a token activates, with embedding and head", WEIGHTS_README, "1", "36.7B",
          lambda: count_parameters(v3()).main_active, 1e9, command=_PRINT,
          why="A direct count with both tables is 37.55B, and 36.63B without the embedding. Neither rounds to 36.7B."),
    Claim("embedding", WEIGHTS_README, "1", "0.9B", lambda: v3().vocab_size * v3().hidden_size, 1e9, command=_PRINT),
    Claim("parameters of the MTP module alone", WEIGHTS_README, "2", "11.5B", lambda: count_parameters(v3()).mtp_total,
          1e9, command=_PRINT,
          why="11.61B with its projection eh_proj (0.10B), 11.51B without it: the README seems to leave it out."),
    Claim("parameters of the MTP module that a token activates", WEIGHTS_README, "2", "2.4B",
          lambda: count_parameters(v3()).mtp_active + 2 * v3().vocab_size * v3().hidden_size, 1e9, command=_PRINT,
          why="With the shared embedding and head, as the README says. 2.44B without eh_proj."),
    Claim("DeepSeek-V2: all parameters", COMPANION, "table 2", "236B", lambda: count_parameters(v2()).main_total, 1e9,
          command=_HERE,
          why="V2's published widths, in this library's fields."),
    Claim("DeepSeek-V2: parameters that a token activates", REPORT, "table 3", "21B",
          lambda: count_parameters(v2()).main_active, 1e9, command=_HERE),
)

OPERATIONS = (
    Claim("operations of a token of training, 4K sequences", COMPANION, "table 2", "250 GFLOP",
          lambda: flops_per_token(v3(), _SEQ_LENGTH).main, 1e9, command=_PRINT,
          why="Main model alone, causal attention. The MTP module adds 10 GFLOP."),
    Claim("operations of a token of DeepSeek-V2", COMPANION, "table 2", "155 GFLOP",
          lambda: flops_per_token(v2(), _SEQ_LENGTH).main, 1e9, command=_HERE),
    Claim("operations of a token of Qwen-72B (dense)", COMPANION, "table 2", "394 GFLOP",
          why="This library has no dense model with grouped queries; it would take one."),
    Claim("operations of a token of LLaMA-405B (dense)", COMPANION, "table 2", "2448 GFLOP", why="As above."),
    Claim("cache of a token, BF16", COMPANION, "table 1", "70.272 KB", cache_bytes, 1e3, command=_CACHE, is_slow=True,
          why="512 + 64 elements of 2 bytes in each of 61 layers."),
    Claim("cache of Qwen-2.5 72B against it", COMPANION, "table 1", "4.66x", lambda: 327.680e3 / cache_bytes(),
          command=_CACHE, is_slow=True, why="Of the 327.680 KB that the table prints for Qwen."),
    Claim("cache of LLaMA-3.1 405B against it", COMPANION, "table 1", "7.28x", lambda: 516.096e3 / cache_bytes(),
          command=_CACHE, is_slow=True,
          why="The table's own two numbers, 516.096 KB and 70.272 KB, make 7.34; 7.28 seems to be a slip."),
)
