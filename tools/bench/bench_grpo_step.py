"""Time of a step of GRPO beside TRL's GRPOTrainer: same model, prompts, number and length of answers, and settings.

A step is a rollout (answers generated and judged, the reference's log-probabilities), forward, backward and AdamW. Ours
is what `dsv3 grpo` does, with the bits of training (cache "training") and without (cache "latent"). TRL generates with
Transformers, whose model it trains too; that is the model exported by `dsv3 convert`, without MTP modules on both
sides. Objective, rewards and constants are those that both define alike (docs/guides/reinforcement_learning.md). Each
contender is a process of its own; steps alternate. Answers end early where an end token is drawn, which a model that
was not fine-tuned hardly does: give such one, and the tokens that were really drawn are in the results.

How much longer prompts are than answers decides much: answers to one prompt share it here. Their mean length in tokens
is in the results. Where other work disturbs the machine, ratios of CPU time say more than those of time.

Needs TRL (pip install trl), which this library and its tests do not; without it leave "trl" out of --contenders.

Usage:
    python -m tools.bench.bench_grpo_step --load CHECKPOINTS --tokenizer-model TOKENIZER --prompts FILE --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.contenders import Contender, Step, add_arguments, run_benchmark, serve
from tools.bench.records import Measurement

OURS, LATENT, TRL = "dsv3_megatron", "dsv3_megatron-latent-cache", "trl"
LEARNING_RATE = 1e-6
_ENDLESS = 1_000_000


@dataclass(frozen=True)
class Setting:
    """What one process measures; `model` is a Hugging Face folder, `folder` one for what a contender writes."""

    contender: str
    model: str
    tokenizer: str
    prompts: str
    folder: str
    precision: str
    answers: int
    new_tokens: int
    threads: int
    group_size: int
    seq_length: int
    micro_batch_size: int
    prompt_tokens: int
    num_parameters: int

    @property
    def config(self) -> str:
        """Name of what is measured in the results."""
        return (f"{self.num_parameters / 1e6:.1f}M parameters, {self.answers} answers of {self.new_tokens} tokens to "
                f"prompts of {self.prompt_tokens} in groups of {self.group_size}, {self.precision}, "
                f"threads={self.threads}")


def ours_step(setting: Setting) -> Step:
    """A step of `dsv3 grpo`, rollout and update."""
    from dsv3_megatron.commands.grpo import parse
    from dsv3_megatron.runs.rank import prepare_rank

    run = parse([
        "--pretrained-checkpoint", setting.model, "--seq-length", str(setting.seq_length),
        "--tokenizer-model", setting.tokenizer, "--prompts", setting.prompts,
        "--reward", "numeric", "--rollouts", f"{setting.folder}/{setting.contender}",
        "--grpo-level", "answer", "--group-size", str(setting.group_size), "--global-batch-size", str(setting.answers),
        "--micro-batch-size", str(setting.micro_batch_size), "--max-new-tokens", str(setting.new_tokens),
        "--lr", str(LEARNING_RATE),
        "--min-lr", str(LEARNING_RATE), "--train-iters", str(_ENDLESS), "--precision", setting.precision,
        "--mtp-num-layers", "0", "--rollout-kv-cache", "latent" if setting.contender == LATENT else "training"]).run
    run.validate(1)
    prepare_rank()
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

    trainer = PolicyTrainer(run)
    return lambda: {"tokens": trainer.train_step()[0].extras["grpo/length"] * setting.answers}


def trl_step(setting: Setting) -> Step:
    """A step of TRL's own training loop, which waits in another thread between two of them."""
    from transformers import TrainerCallback

    from tools.experiments.grpo_beside_trl import trl_trainer

    go, done, told = threading.Semaphore(0), threading.Semaphore(0), dict[str, float]()

    class Turns(TrainerCallback):
        """Lets a step begin when it is asked for."""

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            go.acquire()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            done.release()

        def on_log(self, *args: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            told["tokens"] = logs.get("completions/mean_length", 0.0) * setting.answers

    with open(setting.prompts, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    trainer = trl_trainer(
        setting.model, setting.tokenizer, rows, f"{setting.folder}/trl", loss_type="grpo", max_steps=_ENDLESS,
        per_device_train_batch_size=setting.answers, num_generations=setting.group_size, logging_steps=1,
        max_completion_length=setting.new_tokens, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        precision=setting.precision, is_eager=False)
    trainer.add_callback(Turns())
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()

    def step() -> dict[str, float]:
        go.release()
        while not done.acquire(timeout=5):
            if not thread.is_alive():
                raise RuntimeError("TRL's training loop ended")
        return dict(told)

    return step


def report(contenders: list[Contender[Setting]]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows = []
    median = {c.setting.contender: statistics.median(c.seconds) for c in contenders if c.seconds}
    cpu_median = {c.setting.contender: statistics.median(c.cpu_seconds) for c in contenders if c.seconds}
    for c in contenders:
        name, config = c.setting.contender, c.setting.config
        if not c.seconds:
            print(f"{name:28} {config:72} no step: {c.error}")
            continue
        ratio, cpu_ratio = (medians[TRL] / medians[name] if TRL in medians else float("nan")
                            for medians in (median, cpu_median))
        cpu = cpu_median[name]
        print(f"{name:28} {config:72} {median[name]:7.2f} s ({min(c.seconds):.2f}-{max(c.seconds):.2f}, "
              f"{len(c.seconds)} steps) {cpu:7.2f} cpu-s  TRL takes {ratio:.2f}x, "
              f"{cpu_ratio:.2f}x the CPU time")
        rows += [Measurement(name, config, metric, value, unit) for metric, value, unit in (
            ("step_time_median", median[name], "s"), ("step_time_min", min(c.seconds), "s"),
            ("step_time_max", max(c.seconds), "s"), ("step_cpu_time_median", cpu, "s"),
            ("num_steps", len(c.seconds), "1"))]
    return rows


def prompt_tokens(tokenizer: str, prompts: str) -> int:
    """Mean number of tokens of the prompts, with the chat template around them.

    Args:
        tokenizer: Folder of the tokenizer.
        prompts: JSON lines with a text `prompt` each.
    """
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(tokenizer)
    with open(prompts, encoding="utf-8") as file:
        lengths = [len(reader.apply_chat_template([{"role": "user", "content": json.loads(line)["prompt"]}],
                                                  add_generation_prompt=True, return_dict=False)) for line in file]
    return round(statistics.fmean(lengths))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", help="checkpoints of the model")
    parser.add_argument("--tokenizer-model", help="its tokenizer, with a chat template")
    parser.add_argument("--prompts", help="JSON lines of prompts with their answers")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--contenders", nargs="+", default=[OURS, LATENT, TRL], choices=(OURS, LATENT, TRL))
    parser.add_argument("--answers", type=int, default=64, help="answers of a step (64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--group-size", type=int, default=8, help="answers to a prompt (8)")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens of a packed sequence of ours (1024)")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="packed sequences of ours at once (1)")
    add_arguments(parser, steps=5, warm_up=1, budget_s=120.0, limit_s=300.0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a contender failed."""
    options = _parse(arguments)
    if options.serve:
        setting = Setting(**json.loads(options.serve))
        serve(lambda: (trl_step if setting.contender == TRL else ours_step)(setting))
        return 0
    for flag in ("load", "tokenizer_model", "prompts"):
        if getattr(options, flag) is None:
            print(f"--{flag.replace('_', '-')} must be given", file=sys.stderr)
            return 2
    from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
    from dsv3_megatron.checkpoint.hf.model_card import count_exported
    from dsv3_megatron.commands import convert

    with tempfile.TemporaryDirectory() as folder:
        if convert.main(["megatron-to-hf", "--input", options.load, "--output", f"{folder}/hf", "--dtype", "fp32",
                         "--no-mtp"]):
            return 1

        length = prompt_tokens(options.tokenizer_model, options.prompts)
        size = count_exported(HuggingFaceDirectory(f"{folder}/hf").model).main

        def groups() -> Iterator[list[Setting]]:
            for precision in options.precisions:
                here = Path(folder) / precision
                here.mkdir()
                yield [Setting(name, f"{folder}/hf", options.tokenizer_model, options.prompts, str(here), precision,
                               options.answers, options.new_tokens, options.threads, options.group_size,
                               options.seq_length, options.micro_batch_size, length, size)
                       for name in options.contenders]

        settings: Iterable[list[Setting]] = groups()
        return run_benchmark(__file__, settings, report, "grpo_step.csv", options)


if __name__ == "__main__":
    sys.exit(main())
