"""The model as a table: parameters by component, FLOPs per token, bytes per rank. Nothing is allocated.

What `python -m dsv3_megatron train --preset NAME --print-model [--json]` prints. No torch.

Usage:
    stages = stage_layouts(run.model, run.parallel)
    print(model_table(run, world_size, stages, as_json=False))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.flops import FlopsPerToken, flops_per_token
from dsv3_megatron.metrics.parameters import (
    Component,
    ParameterTable,
    RankParameters,
    count_parameters,
    optimizer_bytes_per_parameter,
    rank_parameters,
    weight_bytes_per_parameter,
)
from dsv3_megatron.metrics.rank_state import RankState, rank_states

if TYPE_CHECKING:
    from dsv3_megatron.parallel.layout import StageLayout


def model_table(run: RunConfig, world_size: int | None, stages: Sequence[StageLayout], as_json: bool = False) -> str:
    """Describe a run's model and what its layout puts on each rank.

    Args:
        run: A validated run.
        world_size: Number of processes; None: the fewest the layout runs on.
        stages: Layout of the stages, as `parallel.layout.stage_layouts(run.model, run.parallel)` gives it.
        as_json: One JSON object with stable keys (see `model_summary`) instead of text.

    Returns:
        Text without a newline at its end.
    """
    size = run.parallel.minimum_world_size if world_size is None else world_size
    if as_json:
        return json_text(model_summary(run, size, stages), indent=2)
    table = count_parameters(run.model)
    flops = flops_per_token(run.model, run.training.seq_length)
    blocks = [_heading(run), _component_lines(table), _total_lines(table), _flops_lines(run, flops),
              _rank_lines(run, size, stages)]
    return "\n\n".join("\n".join(block) for block in blocks)


def describe_model(run: RunConfig, world_size: int | None, *, as_json: bool) -> str | dict[str, Any]:
    """The table of a run in its own layout, as text or as plain values.

    Args:
        run: A validated run.
        world_size: Number of processes; None: the fewest the layout runs on.
        as_json: Plain values.
    """
    from dsv3_megatron.parallel.layout import stage_layouts

    stages = stage_layouts(run.model, run.parallel)
    if as_json:
        return model_summary(run, run.parallel.minimum_world_size if world_size is None else world_size, stages)
    return model_table(run, world_size, stages)


def model_summary(run: RunConfig, world_size: int, stages: Sequence[StageLayout]) -> dict[str, Any]:
    """The table's numbers as plain values; keys are stable, counts are exact integers."""
    table = count_parameters(run.model)
    flops = flops_per_token(run.model, run.training.seq_length)
    parallel = run.parallel
    return {
        "preset": run.name,
        "parameters": {
            "components": [_component_summary(c) for c in table.main],
            "mtp_components": [_component_summary(c) for c in table.mtp],
            "parts": table.parts(),
            "main_total": table.main_total,
            "main_active": table.main_active,
            "main_active_without_embedding": table.main_active_without_embedding,
            "mtp_total": table.mtp_total,
            "mtp_active": table.mtp_active,
            "total": table.total,
        },
        "flops_per_token": {
            "seq_length": run.training.seq_length,
            "main_linear": flops.main_linear,
            "main_attention_causal": flops.main_attention,
            "main_causal": flops.main,
            "main_noncausal": flops.main_noncausal,
            "mtp_linear": flops.mtp_linear,
            "mtp_attention_causal": flops.mtp_attention,
            "mtp_causal": flops.mtp,
            "mtp_noncausal": flops.mtp_noncausal,
            "training_causal": flops.training,
        },
        "layout": {
            "world_size": world_size,
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "num_virtual_stages_per_pipeline_rank": parallel.num_virtual_stages_per_pipeline_rank,
            "pipeline_schedule": parallel.schedule,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
            "data_parallel_size": parallel.data_parallel_size(world_size),
            "expert_data_parallel_size": parallel.expert_data_parallel_size(world_size),
            "weight_bytes_per_parameter": weight_bytes_per_parameter(run.training.precision),
            "gradient_bytes_per_parameter": 4,
            "optimizer_bytes_per_parameter": optimizer_bytes_per_parameter(run.training),
        },
        "ranks": [_rank_summary(held, state) for held, state in _ranks(run, world_size, stages)],
    }


def _ranks(run: RunConfig, world_size: int, stages: Sequence[StageLayout]) -> list[tuple[RankParameters, RankState]]:
    return list(zip(rank_parameters(run, stages), rank_states(run, world_size, precision=run.training.precision),
                    strict=True))


def _component_summary(component: Component) -> dict[str, Any]:
    return {
        "part": component.part,
        "name": component.name,
        "parameters_per_unit": component.parameters_per_unit,
        "num_units": component.num_units,
        "num_active_units": component.num_active_units,
        "total": component.total,
        "active": component.active,
    }


def _rank_summary(held: RankParameters, state: RankState) -> dict[str, Any]:
    return {
        "pipeline_rank": held.pipeline_rank,
        "stages": list(held.stages),
        "layer_ids": list(held.layer_ids),
        "dense_parameters": held.dense_parameters,
        "expert_parameters": held.expert_parameters,
        "weight_bytes": state.parameter_bytes,
        "gradient_bytes": state.gradient_bytes,
        "optimizer_bytes": state.optimizer_bytes,
        "total_bytes": state.total_bytes,
        "host_bytes": state.average_bytes,
    }


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines of equal columns; the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if column < left else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _heading(run: RunConfig) -> list[str]:
    model = run.model
    queries = "full-rank queries" if model.q_lora_rank is None else f"q_lora_rank {model.q_lora_rank}"
    return [
        f"{run.name}: {model.num_layers} layers ({model.num_dense_layers} dense, {model.num_moe_layers} MoE) + "
        f"{model.mtp_num_layers} MTP, hidden {model.hidden_size}, vocabulary {model.vocab_size:,}",
        f"  attention: {model.num_attention_heads} heads, {queries}, kv_lora_rank {model.kv_lora_rank}, "
        f"qk {model.qk_nope_head_dim}+{model.qk_rope_head_dim}, v {model.v_head_dim}",
        f"  experts:   {model.num_experts} routed of width {model.moe_ffn_hidden_size}, top-{model.moe_router_topk} in "
        f"{model.moe_router_group_topk} of {model.moe_router_num_groups} groups, {model.num_shared_experts} shared; "
        f"dense FFN {model.ffn_hidden_size}",
    ]


def _component_lines(table: ParameterTable) -> list[str]:
    rows = [["component", "per unit", "units", "active", "parameters", "active per token"]]

    def row(component: Component, label: str) -> list[str]:
        return [label, f"{component.parameters_per_unit:,}", f"{component.num_units:,}",
                f"{component.num_active_units:,}", f"{component.total:,}", f"{component.active:,}"]

    def total(label: str, parameters: int, active: int) -> list[str]:
        return [label, "", "", "", f"{parameters:,}", f"{active:,}"]

    for component in table.main:
        rows.append(row(component, component.name if component.part != "attention" else f"attention {component.name}"))
    rows.append(total("main model", table.main_total, table.main_active))
    num_main = len(rows)
    for component in table.mtp:
        name = component.name if component.part != "attention" else f"attention {component.name}"
        rows.append(row(component, f"MTP {name}"))
    if table.mtp:
        rows.append(total("MTP, unique", table.mtp_total, table.mtp_active))
    lines = aligned(rows)
    rule = "-" * max(len(line) for line in lines)
    parts = [lines[:1], lines[1:num_main - 1], lines[num_main - 1:num_main], lines[num_main:-1], lines[-1:]]
    if not table.mtp:
        parts = parts[:3]
    return [line for index, part in enumerate(parts) for line in ([rule] if index else []) + part]


def _total_lines(table: ParameterTable) -> list[str]:
    return aligned([
        ["all parameters (main + MTP)", f"{table.total:,}"],
        ["activated, embedding and head counted", f"{table.main_active:,}"],
        ["activated, without the embedding table", f"{table.main_active_without_embedding:,}"],
    ])


def _gflops(flops: int) -> str:
    giga = flops / 1e9
    return f"{giga:,.2f} GF" if giga >= 0.1 else f"{giga * 1000:,.3f} MF"


def _flops_lines(run: RunConfig, flops: FlopsPerToken) -> list[str]:
    rows = [
        [f"FLOPs per token at {run.training.seq_length}", "linear", "attention", "causal", "non-causal"],
        ["main model", _gflops(flops.main_linear), _gflops(flops.main_attention), _gflops(flops.main),
         _gflops(flops.main_noncausal)],
    ]
    if run.model.mtp_num_layers:
        rows.append(["MTP, head counted", _gflops(flops.mtp_linear), _gflops(flops.mtp_attention), _gflops(flops.mtp),
                     _gflops(flops.mtp_noncausal)])
        rows.append(["training step", "", "", _gflops(flops.training),
                     _gflops(flops.main_noncausal + flops.mtp_noncausal)])
    return aligned(rows)


def format_bytes(count: int) -> str:
    """Bytes with three decimals at most: 1.234 GB is 1.234e9 bytes."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count} B"


def _id_ranges(ids: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    ranges: list[list[int]] = []
    for value in ids:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _held(stage: StageLayout) -> str:
    words = ["embedding"] if stage.has_embedding else []
    words += [_id_ranges(stage.layer_ids)] if stage.layer_ids else []
    words += ["MTP"] if stage.mtp_layer_ids else []
    words += ["head"] if stage.has_loss else []
    return " + ".join(words)


def _rank_lines(run: RunConfig, world_size: int, stages: Sequence[StageLayout]) -> list[str]:
    parallel, training = run.parallel, run.training
    has_average = bool(training.ema_decay)
    rows = [["pipeline rank", "layers", "parameters", "weights", "main grads", "optimizer", "sum",
             *["in CPU memory"] * has_average]]
    for held, state in _ranks(run, world_size, stages):
        rows.append([str(held.pipeline_rank), " | ".join(_held(stages[stage]) for stage in held.stages),
                     f"{held.parameters:,}",
                     format_bytes(state.parameter_bytes), format_bytes(state.gradient_bytes),
                     format_bytes(state.optimizer_bytes), format_bytes(state.total_bytes),
                     *[format_bytes(state.average_bytes)] * has_average])
    weights = "fp32" if training.precision == "fp32" else "bf16"
    counted = " (precision=auto counted as bf16)" if training.precision == "auto" else ""
    master = "" if training.precision == "fp32" else "fp32 master weights, "
    moments = (f"two {training.exp_avg_dtype} moments" if training.exp_avg_dtype == training.exp_avg_sq_dtype
               else f"moments {training.exp_avg_dtype} and {training.exp_avg_sq_dtype}")
    context = f"CP {parallel.context_parallel_size}, " if parallel.context_parallel_size > 1 else ""
    return [
        f"bytes per rank on {world_size} rank{'s' * (world_size != 1)}: TP {parallel.tensor_model_parallel_size}, "
        f"{context}PP {parallel.pipeline_model_parallel_size}, EP {parallel.expert_model_parallel_size}, "
        f"expert-TP {parallel.expert_tensor_parallel_size}, DP {parallel.data_parallel_size(world_size)}, "
        f"expert-DP {parallel.expert_data_parallel_size(world_size)}",
        *aligned(rows, left=2),
        f"weights {weights}{counted}; main gradients fp32; optimizer: {master}{moments},",
        *["in CPU memory: the fp32 average of the weights; both"] * has_average,
        f"split over the {'context- and ' * bool(context)}data-parallel ranks, and its scratch; padding is counted, "
        "activations and buffers are not",
    ]
