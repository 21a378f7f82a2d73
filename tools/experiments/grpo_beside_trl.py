"""One step of GRPO beside TRL's GRPOTrainer: loss and gradients of the exported model on the same kept rollout.

    python -m tools.experiments.grpo_beside_trl --base CHECKPOINTS --tokenizer-model TOKENIZER \
        --prompts prompts.jsonl --rollout DIR/rollout-000000.parquet

Needs TRL (pip install trl), which this library and its tests do not. The rollout is one that `dsv3 grpo` kept. Noise is
added to both kinds of its log-probabilities, so that ratios differ from 1, some are clipped, and the divergence is not
0. The model is exported to Hugging Face's form in fp32, and both begin with the exported one. GRPOTrainer computes the
loss of all answers at once, padded; this library takes a step from the rollout (`--replay`), packed. MTP modules are
left out on both sides.

The same step is computed a third time, in float64, from the formulas and the slow reference model, which shares no code
with either: it says how much of a difference is whose rounding. Printed are, for the two levels that TRL defines too,
the largest relative differences of the loss and of each parameter's gradient between the three. A layer's experts are
one parameter, as in Transformers: an expert that hardly a token went to has a gradient that is zero but for rounding,
and nothing of its own to be measured by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.streams import run_command
from dsv3_megatron.post_training.kept import read_rollout, write_rollout
from dsv3_megatron.post_training.rollout import Answer, Rollout
from tools.experiments.sft_beside_trl import gradients_by_tensor, relative, separate

# Levels of this library, and what TRL calls them.
LOSS_TYPES = {"answer": "grpo", "token": "bnpo"}
EPSILON, BETA, NOISE = 0.2, 0.04, 0.2
EXPERT = re.compile(r"\.experts\.\d+\.")
# A loss, and gradients by the names of a checkpoint in Hugging Face's form.
Step = tuple[float, dict[str, torch.Tensor]]


def trl_trainer(model_folder: str, tokenizer_folder: str, rows: list[dict[str, Any]], folder: str, *,
                precision: str = "fp32", is_eager: bool = True, **settings: Any) -> Any:
    """A GRPOTrainer of the exported model, on the CPU, whose rewards compare the last number.

    Args:
        model_folder: Folder of the model in fp32.
        tokenizer_folder: Folder of the tokenizer, with its chat template.
        rows: Prompts with their answers.
        folder: Folder that the trainer may write to.
        precision: "bf16": computes in bf16 with fp32 weights.
        is_eager: Use the plainest attention and experts instead of what Transformers chooses.
        settings: Further settings of GRPOConfig.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from dsv3_megatron.post_training.rewards import numeric

    def judge(completions: list[Any], answer: list[Any], **_rest: Any) -> list[float]:
        return [numeric(completion[0]["content"], {"answer": expected})
                for completion, expected in zip(completions, answer, strict=True)]

    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"} if is_eager else {}
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **kinds)
    config = GRPOConfig(output_dir=folder, use_cpu=True, bf16=precision == "bf16", report_to=[], save_strategy="no",
                        gradient_checkpointing=False, router_aux_loss_coef=0.0, epsilon=EPSILON, beta=BETA,
                        use_bias_correction_kl=False, temperature=1.0, **settings)
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    return GRPOTrainer(model=model, reward_funcs=judge, args=config, train_dataset=Dataset.from_list(prompts),
                       processing_class=AutoTokenizer.from_pretrained(tokenizer_folder))


def padded(rows: list[Any], *, is_left: bool, filling: Any) -> torch.Tensor:
    """Rows of different lengths as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[filling] * (width - len(row)) * is_left + list(row) + [filling] * (width - len(row)) * (
        not is_left) for row in rows])


def trl_step(trainer: Any, answers: list[Answer], filling: int) -> Step:
    """Loss and gradients of GRPOTrainer on all answers at once."""
    prompts, ids = [answer.prompt_ids for answer in answers], [answer.ids for answer in answers]
    ones = [[1] * len(row) for row in prompts], [[1] * len(row) for row in ids]
    inputs = {
        "prompt_ids": padded(prompts, is_left=True, filling=filling),
        "prompt_mask": padded(ones[0], is_left=True, filling=0),
        "completion_ids": padded(ids, is_left=False, filling=filling),
        "completion_mask": padded(ones[1], is_left=False, filling=0),
        "advantages": torch.tensor([answer.advantage for answer in answers]),
        "old_per_token_logps": padded([answer.logprobs_T.tolist() for answer in answers], is_left=False, filling=0.0),
        "ref_per_token_logps": padded([np.asarray(answer.reference_logprobs_T).tolist() for answer in answers],
                                      is_left=False, filling=0.0),
        "num_items_in_batch": torch.tensor(sum(map(len, ids)))}
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), separate(gradients)


def our_run(model_folder: str, tokenizer: str, prompts: str, folder: str, level: str, answers: list[Answer],
            group_size: int) -> RunConfig:
    """The run of one step from the kept rollout."""
    from dsv3_megatron.commands.grpo import parse

    return parse([
        "--pretrained-checkpoint", model_folder, "--seq-length", "256", "--tokenizer-model", tokenizer,
        "--prompts", prompts, "--replay", folder,
        "--grpo-level", level, "--group-size", str(group_size), "--global-batch-size", str(len(answers)),
        "--micro-batch-size", "1", "--clip-epsilon", str(EPSILON), "--kl-coefficient", str(BETA), "--train-iters", "1",
        "--max-new-tokens", str(max(len(answer.ids) for answer in answers)), "--precision", "fp32",
        "--mtp-num-layers", "0", "--clip-grad", "0"]).run


def our_step(run: RunConfig) -> Step:
    """Loss and gradients of this library, gradients by Hugging Face's names."""
    from dsv3_megatron.runs.rank import prepare_rank

    run.validate(1)
    prepare_rank()
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

    trainer = PolicyTrainer(run)
    report, _ = trainer.train_step()
    gradients = gradients_by_tensor(trainer)
    trainer.claim.release()
    assert report.lm_loss is not None and report.extras["grpo/clip-fraction"] > 0
    return report.lm_loss, gradients


def float64_step(model_folder: str, architecture: object, answers: list[Answer], level: str) -> Step:
    """Loss and gradients in float64: the reference model on each answer, and the objective as its formulas stand.

    Args:
        model_folder: Folder of the model in Hugging Face's form.
        architecture: Object with the architecture's fields.
        answers: The answers with their advantages and both kinds of log-probabilities.
        level: "answer" or "token".
    """
    from safetensors.torch import load_file

    from dsv3_megatron.certification.reference import linear, main_model
    from dsv3_megatron.certification.reference_weights import Architecture, is_router_bias

    weights = {name: value.double().requires_grad_(not is_router_bias(name))
               for path in sorted(Path(model_folder).glob("*.safetensors")) for name, value in load_file(path).items()}
    ids_BS = padded([(*answer.prompt_ids, *answer.ids) for answer in answers], is_left=False, filling=0)
    hidden_BSH, _, _ = main_model(weights, Architecture.of(architecture), ids_BS)
    losses = []
    for hidden_SH, ids_S, answer in zip(hidden_BSH, ids_BS, answers, strict=True):
        first, last = len(answer.prompt_ids), len(answer)
        logprobs_TV = linear(hidden_SH[first - 1: last - 1], weights["lm_head.weight"]).log_softmax(dim=-1)
        now_T = logprobs_TV.gather(-1, ids_S[first:last, None])[:, 0]
        ratio_T = (now_T - torch.from_numpy(answer.logprobs_T).double()).exp()
        clipped_T = ratio_T.clip(1 - EPSILON, 1 + EPSILON)
        gain_T = torch.minimum(ratio_T * answer.advantage, clipped_T * answer.advantage)
        log_r_T = torch.from_numpy(np.asarray(answer.reference_logprobs_T)).double() - now_T
        losses.append(BETA * (log_r_T.exp() - log_r_T - 1) - gain_T)
    loss = torch.stack([each.mean() for each in losses]).mean() if level == "answer" else torch.cat(losses).mean()
    loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return float(loss.detach()), gradients


def differences(mine: Step, theirs: Step) -> dict[str, Any]:
    """The relative difference of two losses, and the largest of the gradients with its parameter's name."""
    gradients, expected = by_parameter(mine[1]), by_parameter(theirs[1])
    errors = {name: relative(gradients[name], expected[name]) for name in gradients}
    worst = max(errors, key=lambda name: errors[name])
    return {"loss, relative": abs(mine[0] - theirs[0]) / abs(theirs[0]), "gradient, largest relative": errors[worst],
            "of": worst}


def by_parameter(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients in which the experts of a layer are one tensor, [experts, out, in]; the others as they are."""
    together: dict[str, list[torch.Tensor]] = {}
    for name in sorted(gradients):
        together.setdefault(EXPERT.sub(".experts.", name), []).append(gradients[name])
    return {name: torch.stack(parts) if len(parts) > 1 else parts[0] for name, parts in together.items()}


def main(arguments: list[str] | None = None) -> int:
    """Compare one step at each level; returns 1 where this library is further from float64 than asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="checkpoints of the model")
    parser.add_argument("--tokenizer-model", required=True, help="its tokenizer, with a chat template")
    parser.add_argument("--prompts", required=True, help="the prompts that the rollout answers")
    parser.add_argument("--rollout", required=True, help="a kept rollout, of that tokenizer")
    parser.add_argument("--group-size", type=int, default=8, help="answers to a prompt (8)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference from float64 (1e-5)")
    options = parser.parse_args(arguments)
    from dsv3_megatron.commands import convert

    kept, draws = read_rollout(options.rollout), np.random.default_rng(0)
    results: dict[str, dict[str, Any]] = {}

    def noisy(values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        return (values + NOISE * draws.standard_normal(len(values))).astype(np.float32)

    answers = [dataclasses.replace(
        answer, logprobs_T=noisy(answer.logprobs_T), reference_logprobs_T=noisy(answer.logprobs_T),
        advantage=float(draws.choice([-1.0, 0.5, 1.0]))) for answer in kept.answers]
    with open(options.prompts, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:8]
    with tempfile.TemporaryDirectory() as folder:
        write_rollout(folder, Rollout(0, tuple(answers), kept.rules, kept.tokenizer))
        assert convert.main(["megatron-to-hf", "--input", options.base, "--output", f"{folder}/hf", "--dtype", "fp32",
                             "--no-mtp"]) == 0
        for level, loss_type in LOSS_TYPES.items():
            trainer = trl_trainer(f"{folder}/hf", options.tokenizer_model, rows, f"{folder}/trl", loss_type=loss_type,
                                  per_device_train_batch_size=8, num_generations=8, max_completion_length=8)
            theirs = trl_step(trainer, answers, 0)
            run = our_run(f"{folder}/hf", options.tokenizer_model, options.prompts, folder, level, answers,
                          options.group_size)
            ours, exact = our_step(run), float64_step(f"{folder}/hf", run.model, answers, level)
            assert ours[1].keys() == theirs[1].keys() == exact[1].keys(), ours[1].keys() ^ theirs[1].keys()
            results[level] = {"answers": len(answers), "gradients": len(by_parameter(exact[1])),
                              "ours from TRL's": differences(ours, theirs),
                              "ours from float64": differences(ours, exact),
                              "TRL's from float64": differences(theirs, exact)}
    print(json_text(results, indent=2))
    mine = [each["ours from float64"] for each in results.values()]
    worst = max(max(each["gradient, largest relative"], each["loss, relative"]) for each in mine)
    return 0 if worst <= options.tolerance else 1


if __name__ == "__main__":
    run_command(main)
