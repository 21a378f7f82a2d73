"""One step of fine-tuning beside TRL's SFTTrainer: loss, gradients and masks, of the exported model on the same lines.

    python -m tools.experiments.sft_beside_trl --input chat.jsonl --tokenizer-model tokenizer/ --base CHECKPOINTS

Needs TRL (pip install trl), which this library and its tests do not. The base model, in fp32, is exported to Hugging
Face's form and trained for a step by SFTTrainer with assistant_only_loss on all conversations at once. This library
prepares the same conversations with dsv3 preprocess --sft, packs them, and takes a step of its own (`dsv3 sft`, one
global batch). MTP modules are left out on both sides: Transformers has none in this model. Printed are the largest
differences: of ids and masks in tokens, of the loss and of each weight's gradient relative to its largest entry.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command


def trl_step(model_folder: str, tokenizer_folder: str, rows: list[dict[str, Any]], max_length: int
             ) -> tuple[float, dict[str, torch.Tensor], list[list[int]], list[list[int]]]:
    """Loss and gradients of SFTTrainer on all rows at once, and the ids and masks that it made of them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager",
                                                 experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=len(rows), num_train_epochs=1, max_length=max_length,
            assistant_only_loss=True, packing=False, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            gradient_checkpointing=False, logging_steps=1)
        trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows),
                             processing_class=tokenizer)
        prepared = [trainer.train_dataset[number] for number in range(len(rows))]
        (batch,) = list(trainer.get_train_dataloader())
        model.train()
        counted = int((batch["labels"][:, 1:] != -100).sum())
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(counted))
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    masks = [[int(label != -100) for label in row["labels"]] for row in prepared]
    return float(loss.detach()), gradients, [row["input_ids"] for row in prepared], masks


def our_step(base: str, prefix: str, num_rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of a run over all packed conversations, gradients by Hugging Face's names."""
    from dsv3_megatron.commands.sft import parse
    from dsv3_megatron.runs.rank import prepare_rank

    prepare_rank()
    from dsv3_megatron.runs import trainer as trainers

    run = parse(["--pretrained-checkpoint", base, "--data-path", prefix, "--split", "100,0,0", "--precision", "fp32",
                  "--mtp-num-layers", "0", "--train-iters", "1", "--global-batch-size", str(num_rows),
                  "--micro-batch-size", "1", "--clip-grad", "0"]).run
    run.validate(1)
    trainer = trainers.Trainer(run)
    report, _ = trainer.train_step()
    gradients = gradients_by_tensor(trainer)
    trainer.claim.release()
    assert report.lm_loss is not None
    return report.lm_loss, gradients


def gradients_by_tensor(trainer: Any) -> dict[str, torch.Tensor]:
    """The gradients of a trainer's last step, of one process, by the names of a checkpoint in Hugging Face's format."""
    from dsv3_megatron.checkpoint.hf.names import tensors_by_parameter
    from dsv3_megatron.model.global_names import whole_parameters

    parts, gradients = tensors_by_parameter(trainer.run.model), {}
    for chunk in trainer.chunks:
        for whole in whole_parameters(chunk, trainer.groups):
            gradient: torch.Tensor = whole.parameter.main_grad  # type: ignore[attr-defined]
            gradient = (gradient if whole.expert is None else gradient[whole.expert]).clone()
            tensors = parts[whole.name]
            for tensor, piece in zip(tensors, gradient.chunk(len(tensors)), strict=True):
                gradients[tensor.name] = piece
    return gradients


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def separate(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients by the names of a checkpoint: Transformers stacks a layer's experts in two tensors."""
    found = {}
    for name, value in gradients.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".mlp.experts"):
            found[name] = value
            continue
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for piece, projection in zip(value.chunk(len(kinds), dim=1), kinds, strict=True):
            found |= {f"{prefix}.{number}.{projection}.weight": expert for number, expert in enumerate(piece)}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare one step; returns 1 where a difference is larger than asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="conversations, as JSON lines with messages")
    parser.add_argument("--tokenizer-model", required=True, help="tokenizer with a chat template that has marks")
    parser.add_argument("--base", required=True, help="checkpoints of the base model")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (1e-5)")
    options = parser.parse_args(arguments)
    from dsv3_megatron.checkpoint.open import open_checkpoint
    from dsv3_megatron.commands import convert, preprocess
    from dsv3_megatron.data.chat.packing import pack_lengths
    from dsv3_megatron.data.indexed import map_index, read_header
    from dsv3_megatron.data.inspection import read_document

    rows = [{"messages": json.loads(line)["messages"]} for line in Path(options.input).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        prefix, model_folder = f"{folder}/chat_conversations", f"{folder}/hf"
        assert preprocess.main(["--sft", "--input", options.input, "--tokenizer-model", options.tokenizer_model,
                                "--output-prefix", f"{folder}/chat", "--workers", "1"]) == 0
        assert convert.main(["megatron-to-hf", "--input", options.base, "--output", model_folder, "--dtype", "fp32",
                             "--no-mtp"]) == 0
        lengths = np.asarray(map_index(prefix).lengths_Q).astype(np.int64)
        capacity = open_checkpoint(options.base).seq_length + 1
        if lengths.max() > capacity:
            raise ValueError(f"--input has a conversation of {lengths.max()} tokens; at most {capacity}, a sequence of "
                             "the base model and the token after it, can be compared")
        num_rows = len(pack_lengths(lengths, capacity, key=0))
        loss, gradients = our_step(options.base, prefix, num_rows)
        theirs, their_gradients, ids, masks = trl_step(model_folder, options.tokenizer_model, rows, capacity)
        count = range(read_header(prefix).num_documents)
        wrong_ids = sum(read_document(prefix, number).tolist() != ids[number] for number in count)
        wrong_masks = sum(read_document(f"{prefix}_mask", number).tolist() != masks[number] for number in count)
    their_gradients = separate(their_gradients)
    assert gradients.keys() == their_gradients.keys(), gradients.keys() ^ their_gradients.keys()
    errors = {name: relative(gradients[name], their_gradients[name]) for name in gradients}
    worst = max(errors, key=lambda name: errors[name])
    result = {"conversations": len(rows), "sequences": num_rows, "loss": loss, "loss of TRL": theirs,
              "loss, relative": abs(loss - theirs) / theirs, "conversations with other ids": wrong_ids,
              "conversations with other masks": wrong_masks, "gradients": len(errors),
              "gradient, largest relative": errors[worst], "of": worst}
    print(json_text(result, indent=2))
    is_equal = not wrong_ids and not wrong_masks and math.isfinite(loss) and max(
        errors[worst], abs(loss - theirs) / theirs) <= options.tolerance
    return 0 if is_equal else 1


if __name__ == "__main__":
    run_command(main)
