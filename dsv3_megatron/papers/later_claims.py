"""What the report says of post-training, of inference, and of results: mostly not to be checked without a cluster."""

from __future__ import annotations

from dsv3_megatron.config.fine_tuning import EPOCHS, fine_tuned
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.papers.claim import COMPANION, REPORT, Claim
from dsv3_megatron.papers.training_claims import v3_run

_TUNING = "dsv3 sft --preset dsv3-671b --train-iters 1000 --print-schedule"
_EQUATIONS = ("They are what dsv3 grpo does by default, and tests compare it with them in float64. The report gives "
              "neither epsilon, beta, G nor a number of steps.")
_RULES = "The rules are here (dsv3 grpo --reward); a model that judges is not. The data are not published."
_WEIGHTS = "It takes the published weights on eight large GPUs"


def fine_tuning(num_steps: int = 1000) -> RunConfig:
    """A run with the report's settings of fine-tuning; the length is any."""
    return fine_tuned(v3_run()).override(train_iters=num_steps)


def _rate(is_last: bool) -> float:
    phase = fine_tuning().recipe().phases[0]
    place = phase.end if is_last else phase.start
    return phase.learning_rate.at(place.iteration, place.tokens)


POST_TRAINING = (
    Claim("fine-tuning: learning rate at first", REPORT, "5.1", "5e-6", lambda: _rate(False), command=_TUNING),
    Claim("fine-tuning: learning rate at last", REPORT, "5.1", "1e-6", lambda: _rate(True), command=_TUNING),
    Claim("fine-tuning: samples of a sequence do not see one another", REPORT, "5.1", "masked",
          lambda: "masked" if fine_tuning().data.has_document_attention else "not masked", command=_TUNING),
    Claim("fine-tuning: instances", REPORT, "5.1", "1.5M", why="The data are not published."),
    Claim("fine-tuning: epochs", REPORT, "5.1", "2", lambda: EPOCHS, command=_TUNING),
    Claim("GRPO: objective and advantages", REPORT, "5.2.2", "(equations 26 to 28)", why=_EQUATIONS),
    Claim("reward models", REPORT, "5.2.1", "(rules, and a model)", why=_RULES),
)

INFERENCE = (
    Claim("acceptance of the second token", REPORT, "5.4.3", "85% to 90%",
          why=f"{_WEIGHTS}: dsv3 convert, then dsv3 generate with drafts counts what is accepted."),
    Claim("tokens a second with drafts, over those without", REPORT, "5.4.3", "1.8x", why=f"{_WEIGHTS}, and a clock."),
    Claim("prefill unit: GPUs, TP, DP, EP", REPORT, "3.4.1", "32, 4, 8, 32",
          why="This library generates on the ranks of a training layout. It is no server: no redundant experts, no "
              "separate prefill and decoding."),
    Claim("decoding unit: GPUs, TP, DP, EP", REPORT, "3.4.2", "320, 4, 80, 320", why="As above."),
    Claim("largest scale of an experiment on a personal machine", COMPANION, "2.2.2", "20 tokens/s",
          why="It is of another program (KTransformers)."),
)

RESULTS = (
    Claim("benchmarks of the base model", REPORT, "table 3", "(MMLU 87.1 and others)",
          why=f"{_WEIGHTS}, and each benchmark; dsv3 evaluate has loss and perplexity only."),
    Claim("Pile-test of the base model, bits a byte", REPORT, "table 3", "0.548",
          why=f"{_WEIGHTS} and the Pile's test set, which is not distributed any more."),
    Claim("ablation of MTP", REPORT, "table 4", "(better on most)",
          why="It takes two pairs of runs, of 15.7B and 228.7B parameters, over 1.33T and 540B tokens."),
    Claim("ablation of balancing without a loss", REPORT, "table 5", "(better on most)",
          why="As above, over 1.33T and 578B tokens. docs/experiments shows loads of small runs."),
    Claim("validation loss by kind of balancing, 1B model", REPORT, "4.5.3", "2.258, 2.253, 2.253",
          why="It takes the corpus and three runs; sequence-wise, without a loss, batch-wise."),
    Claim("irrecoverable loss spikes, rollbacks", REPORT, "1", "0", why="It takes the run."),
    Claim("needle in a haystack at 128K", REPORT, "figure 8", "(found at all lengths)", why=f"{_WEIGHTS}."),
)
