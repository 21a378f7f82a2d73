"""GRPO whose rollouts have training's probabilities to the bit, beside GRPO with a generator that is not the model.

The generator is spoiled on purpose: while a rollout is made, every weight has its own relative noise, as if another
engine computed it with fewer digits. Either the log-probabilities that the generator had are kept, so that the ratio
knows of the difference, or a training forward computes them again, as is done where two engines are used. What is
learnt from is judged by the likeliest answers of the model itself, without noise, to prompts that are kept apart.

Usage, after examples/post_train_dsv3.sh, which makes the model and the prompts:
    python -m tools.experiments.grpo_generator --work DIR --output docs/experiments/grpo_generator -- \\
        --pretrained-checkpoint CHECKPOINTS --tokenizer-model TOKENIZER --prompts FILE --valid-prompts FILE \\
        --reward numeric --max-new-tokens 8 --train-iters 30 --eval-interval 5 --lr 3e-4
writes docs/experiments/grpo_generator.csv and .png, and prints a table of the rewards.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tools.experiments.variants import Curve, Panel, mean_by_step, plot_bands, train_variants, write_table

if TYPE_CHECKING:
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

AGREES = "the model itself"
# Relative noise of the generator's weights, and whether a training forward gives the log-probabilities that are kept.
SPOILED = {"noise, its own probabilities": "generator", "noise, training's probabilities": "training"}
_COLOURS = ("#2a6fb0", "#0f766e", "#c2410c")
_REWARD, _RATIO = "grpo/reward", "grpo/ratio"
_COLUMNS = (_REWARD, "grpo/kl", "grpo/clip-fraction", _RATIO, "grpo/entropy", "grpo/no-signal", "grad_norm")


@contextlib.contextmanager
def noisy_weights(model: torch.nn.Module, noise: float, seed: int) -> Iterator[None]:
    """Have noise on a model's weights for some work; afterwards they have their bits again.

    Args:
        model: The model.
        noise: Standard deviation of each weight's factor, around 1.
        seed: Seed of the noise.
    """
    draws = torch.Generator().manual_seed(seed)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            factor = 1 + noise * torch.randn(parameter.shape, generator=draws)
            parameter.mul_(factor.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.copy_(before)


def spoiled_trainer(noise: float, probabilities: str) -> type[PolicyTrainer]:
    """The trainer of GRPO with a generator that has noise; defined here because a rank must be prepared before.

    Args:
        noise: Standard deviation of the noise.
        probabilities: "generator" or "training", whose log-probabilities a rollout keeps.
    """
    from megatron.core.utils import unwrap_model

    from dsv3_megatron.model.stage.buckets import finish_gathering
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer
    from dsv3_megatron.post_training.rollout import Answer
    from dsv3_megatron.post_training.sampler import Asked

    class SpoiledTrainer(PolicyTrainer):
        """Answers rollouts with noise, and prompts that are kept apart without."""

        def _answers(self, asked: Sequence[Asked], *, rollout: int | None) -> list[Answer]:
            if rollout is None:
                return super()._answers(asked, rollout=rollout)
            finish_gathering(self.chunks)
            with noisy_weights(unwrap_model(self.chunks[0]), noise, self.run.training.seed * 1000 + rollout):
                answers = super()._answers(asked, rollout=rollout)
            if probabilities == "generator":
                return answers
            return [replace(answer, logprobs_T=values)
                    for answer, values in zip(answers, self.logprobs(answers), strict=True)]

    return SpoiledTrainer


def train_one(arguments: Sequence[str]) -> int:
    """Do one run of the experiment in this process: NOISE PROBABILITIES FLAGS of dsv3 grpo; returns the exit code."""
    from dsv3_megatron.commands.grpo import parse
    from dsv3_megatron.runs.rank import prepare_rank

    noise, probabilities, *flags = arguments
    folder = Path(flags[flags.index("--tensorboard-dir") + 1]) / "rollouts"
    shutil.rmtree(folder, ignore_errors=True)  # of a run of this experiment that did not finish
    run = parse([*flags, "--rollouts", str(folder)]).run
    run.validate(1)
    prepare_rank()
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

    kind = spoiled_trainer(float(noise), probabilities) if float(noise) else PolicyTrainer
    return kind(run).train()


def summary(curves: Sequence[Curve]) -> str:
    """A line a variant: rewards on the prompts kept apart before and after, by seed, and the first steps' ratio."""
    lines = ["| generator | before | after, by seed | mean | rollouts' own reward, last 5 steps |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(curve.variant for curve in curves):
        mine = [curve for curve in curves if curve.variant == name]
        held_out = [[value for _, value in curve.records.validation_column(_REWARD)] for curve in mine]
        after = [values[-1] for values in held_out]
        own = [statistics.fmean(value for _, value in curve.records.column(_REWARD)[-5:]) for curve in mine]
        lines.append(f"| {name} | {statistics.fmean(values[0] for values in held_out):.3f} | "
                     f"{', '.join(f'{value:.3f}' for value in after)} | {statistics.fmean(after):.3f} | "
                     f"{statistics.fmean(own):.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, write the table and the picture, print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs' logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of prompts and draws (1 2 3)")
    parser.add_argument("--noise", type=float, default=0.1, help="relative noise of a weight (%(default)s)")
    parser.add_argument("--spoiled", nargs="*", default=list(SPOILED), choices=SPOILED, help="spoiled kinds (all)")
    parser.add_argument("--output", type=Path, required=True, help="without ending, which the experiment adds")
    parser.add_argument("flags", nargs="*", help="flags of dsv3 grpo, after --")
    options = parser.parse_args(arguments)
    variants = {AGREES: ["0", "generator"],
                **{name: [str(options.noise), SPOILED[name]] for name in options.spoiled}}
    curves = train_variants(variants, common=options.flags, seeds=options.seeds, work=options.work,
                            do=train_one, told=_REWARD)
    write_table(curves, options.output.with_suffix(".csv"), columns=_COLUMNS, every=1)
    held_out = {name: mean_by_step(curves, name, _REWARD, is_validation=True) for name in variants}
    kl = {name: mean_by_step(curves, name, "grpo/kl") for name in variants}
    plot_bands([Panel("reward on prompts kept apart", held_out), Panel("divergence from the reference, nats", kl)],
               dict(zip(variants, _COLOURS, strict=False)), options.output.with_suffix(".png"), preset="tiny",
               seeds=options.seeds, subject=f"GRPO by what generates (noise {options.noise:g})")
    print(summary(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
