"""The README.md of an export: a model card that the hub and people read.

The block at its top is the hub's: licence, library and kind of model. What follows is what the checkpoint knows: the
architecture, how far it was trained and with what result, and which programs do not read it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.checkpoint.folder import Manifest
from dsv3_megatron.checkpoint.hf.names import Storage, hugging_face_tensors, layer_of
from dsv3_megatron.checkpoint.hf.readers import reader_notes
from dsv3_megatron.checkpoint.hf.weight_files import WeightFile
from dsv3_megatron.config.model import ModelConfig

# The hub's word for a licence that nobody has stated.
UNKNOWN_LICENSE = "unknown"
_DTYPES = {"bf16": "BF16, router biases FP32", "fp32": "FP32",
           "fp8": "FP8 (E4M3) in blocks of 128 x 128 with FP32 scales; embedding, head, routers and norms BF16"}


@dataclass(frozen=True)
class Losses:
    """Last results of a run, in nats per token.

    Attributes:
        training: Next-token cross-entropy of the exported step; None if it is not known.
        validation: Next-token cross-entropy on validation data, of the last validation up to that step; None if it is
            not known.
        validation_iteration: Step of that validation.
    """

    training: float | None = None
    validation: float | None = None
    validation_iteration: int | None = None


@dataclass(frozen=True)
class ExportedCounts:
    """Parameters of a model.

    Attributes:
        main: Parameters without MTP modules; router biases, which no gradient trains, not counted.
        active: Parameters among `main` that a token passes through.
        mtp: Parameters of the MTP modules, without their copies of embedding and head.
    """

    main: int
    active: int
    mtp: int


def count_exported(model: ModelConfig) -> ExportedCounts:
    """Parameters of a model, from the shapes of its tensors."""
    main = active = mtp = 0
    for tensor in hugging_face_tensors(model):
        if tensor.is_copy or tensor.storage is Storage.BIAS:
            continue
        if (layer_of(tensor.name) or 0) >= model.num_layers:
            mtp += tensor.num_elements
            continue
        main += tensor.num_elements
        is_routed = ".mlp.experts." in tensor.name
        # Every expert of a layer is as large as the others.
        active += tensor.num_elements * model.moe_router_topk if is_routed else tensor.num_elements * model.num_experts
    return ExportedCounts(main, active // model.num_experts, mtp)


def model_card(model: ModelConfig, manifest: Manifest, shards: Sequence[WeightFile], *, dtype: str, license_id: str,
               losses: Losses | None, has_tokenizer: bool, is_average: bool) -> str:
    """The text of the card.

    Args:
        model: The architecture as exported.
        manifest: What the exported checkpoint says of itself.
        shards: The files of weights.
        dtype: Dtype of the export: "bf16", "fp8" or "fp32".
        license_id: The hub's name of a licence.
        losses: Last losses of the run, where they are known.
        has_tokenizer: A tokenizer is among the files.
        is_average: The weights are the moving average of the run's.
    """
    counts = count_exported(model)
    lines = ["---", f"license: {license_id}", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
             "- deepseek_v3", "- mixture-of-experts", "---", "", "# Model card", "",
             f"A DeepSeek-V3-style language model of {counts.main:,} parameters, of which a token passes through "
             f"{counts.active:,}" + (f", and {counts.mtp:,} of multi-token prediction" if counts.mtp else "") + ".", ""]
    lines += _table("Architecture", _architecture(model) | {
        "Weights": _DTYPES[dtype], "Files": f"{len(shards)}, {sum(shard.num_bytes for shard in shards):,} bytes"})
    lines += _table("Training", _training(manifest, losses, is_average))
    lines += ["## Use", "", "```python", "from transformers import AutoModelForCausalLM"
              + (", AutoTokenizer" if has_tokenizer else ""), "",
              'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")'
              + ('\ntokenizer = AutoTokenizer.from_pretrained("PATH")' if has_tokenizer else ""), "```", ""]
    notes = reader_notes(model, dtype)
    if notes:
        lines += ["## Programs that do not take all of it", "", *[f"- {note}" for note in notes], ""]
    if license_id == UNKNOWN_LICENSE:
        lines += ["## Licence", "", "Not stated. Give the hub's name of one in the first lines of this file.", ""]
    return "\n".join(lines)


def _table(title: str, rows: dict[str, str]) -> list[str]:
    return [f"## {title}", "", "| | |", "| --- | --- |", *[f"| {name} | {value} |" for name, value in rows.items()], ""]


def _architecture(model: ModelConfig) -> dict[str, str]:
    query = "full rank" if model.q_lora_rank is None else f"latent {model.q_lora_rank}"
    rows = {"Layers": f"{model.num_layers}, of which {model.num_dense_layers} dense",
            "Hidden width": str(model.hidden_size),
            "Attention": f"MLA, {model.num_attention_heads} heads; query {query}, key/value latent "
                         f"{model.kv_lora_rank}, rotary width {model.qk_rope_head_dim}",
            "Experts": f"{model.num_experts}, of which {model.moe_router_topk} a token, and "
                       f"{model.num_shared_experts} shared; width {model.moe_ffn_hidden_size}"}
    if model.mtp_num_layers:
        rows["Multi-token prediction"] = f"{model.mtp_num_layers} module{'s' * (model.mtp_num_layers > 1)}"
    context = f"{model.max_position_embeddings:,} tokens"
    if model.rope_type == "yarn":
        context += f", by YaRN x {model.rotary_scaling_factor:g} from {model.original_max_position_embeddings:,}"
    return rows | {"Context": context, "Vocabulary": f"{model.vocab_size:,} ids"}


def _training(manifest: Manifest, losses: Losses | None, is_average: bool) -> dict[str, str]:
    progress = manifest.progress
    if not progress.iteration:
        return {"Trained": "converted from another checkpoint, not trained since"}
    rows = {"Tokens": f"{progress.consumed_tokens:,}", "Sequences": f"{progress.consumed_samples:,}",
            "Optimizer steps": f"{progress.iteration:,}", "Precision": manifest.precision,
            "Written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items())}
    training = manifest.run["training"]
    if training.get("moe_aux_loss_coeff"):
        name = training.get("moe_router_load_balancing_type", "seq_aux_loss")
        rows["Balance loss"] = f"{name}, weight {training['moe_aux_loss_coeff']:g}"
    if is_average:
        rows["Weights are"] = "the moving average of the run's"
    if (manifest.run.get("policy") or {}).get("prompts"):
        # What such a run logs as its loss is the objective with its sign turned, and no loss of a text.
        return rows | {"Learnt from": "its own answers to prompts, by their rewards (GRPO)"}
    if (manifest.run.get("data") or {}).get("sft"):
        rows["Fine-tuned on"] = "conversations"
    losses = losses or Losses()
    rows["Training loss"] = "not known" if losses.training is None else f"{losses.training:.4f} nats per token"
    rows["Validation loss"] = "not known" if losses.validation is None else (
        f"{losses.validation:.4f} nats per token after step {losses.validation_iteration:,}")
    return rows
