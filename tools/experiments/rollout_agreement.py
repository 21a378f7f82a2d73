"""Whether log-probabilities of kept rollouts, as their tokens were generated, are those of the training forward.

Rollouts that `dsv3 grpo` kept are computed again by the training forward of a run that replays them, with the weights
that generated them: packed into that run's sequences and micro-batches, under its layout and precision. One line of
JSON for each folder says how many tokens were compared, which share of them has the same bits, and how large the
largest difference is. Only the first rollout of a folder is looked at: the others were made with other weights.

    python -m tools.experiments.rollout_agreement DIR [DIR ...] -- --pretrained-checkpoint CHECKPOINTS \\
        --tokenizer-model TOKENIZER --prompts FILE --group-size 8 --global-batch-size 160 --max-new-tokens 64 \\
        --precision bf16

Flags are those of dsv3 grpo, with the settings of the run that made the rollouts. Several processes are started by
`python -m dsv3_megatron.platform.local_torchrun --nproc-per-node 2 -m tools.experiments.rollout_agreement DIR -- ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_megatron.config.output import json_text
from dsv3_megatron.process.ranks import Processes


def agreement(generated: Sequence[np.ndarray], trained: Sequence[np.ndarray]) -> dict[str, Any]:
    """Tokens, the share of them with equal bits, and the largest difference, of log-probabilities of each answer."""
    mine, theirs = np.concatenate(list(generated)), np.concatenate(list(trained))
    return {"answers": len(generated), "tokens": len(mine), "equal": float((mine == theirs).mean()),
            "largest difference": float(np.abs(mine.astype(np.float64) - theirs).max())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the first rollout of each folder; returns 0 whatever comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of kept rollouts")
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = words.index("--") if "--" in words else len(words)
    folders, flags = parser.parse_args(words[:place]).folders, words[place + 1:]
    from dsv3_megatron.commands.grpo import parse
    from dsv3_megatron.post_training.kept import read_rollout, rollout_file
    from dsv3_megatron.runs.rank import prepare_rank

    processes = Processes.from_environment()
    run = parse([*flags, "--train-iters", "1", "--kl-coefficient", "0", "--replay", folders[0]]).run
    run.validate(processes.world_size)
    prepare_rank()
    from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

    trainer = PolicyTrainer(run)
    for folder in folders:
        answers = read_rollout(rollout_file(folder, 0)).answers
        found = agreement([answer.logprobs_T for answer in answers], trainer.logprobs(answers))
        if trainer.rank == 0:
            print(json_text({"rollout": folder, **found}), flush=True)
    trainer.claim.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
