"""What the GPU tests run, on the device that `prepare()` finds: so a process without a GPU computes what one with it
is compared with, and everything here can be run on a CPU.

    python -m tests.gpu.runs gradients FILE               loss and gradients of one step
    python -m tests.gpu.runs write DIR PRECISION FILE     train, save a checkpoint, leave the state
    python -m tests.gpu.runs read DIR PRECISION FILE      load a checkpoint, leave the state

Routing is a choice: where two experts score almost alike, rounding decides, and a token that goes to another expert
changes gradients by far more than rounding. So a step can be told to take another step's choices.

Shapes: B sequences, S positions, T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dsv3_megatron.platform import prepare

if not torch.cuda.is_available():
    # Where Transformer Engine is installed, Megatron-Core would take its optimizer, which needs a GPU.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
prepare()  # before Megatron-Core is imported

from megatron.core import parallel_state  # noqa: E402

from dsv3_megatron.checkpoint.folder import RunProgress  # noqa: E402
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint  # noqa: E402
from dsv3_megatron.config.parallel import ParallelConfig  # noqa: E402
from dsv3_megatron.config.presets import preset  # noqa: E402
from dsv3_megatron.config.run import RunConfig  # noqa: E402
from dsv3_megatron.data.current import CurrentData  # noqa: E402
from dsv3_megatron.model.build import build_stages  # noqa: E402
from dsv3_megatron.model.global_names import WholeParameter, whole_parameters  # noqa: E402
from dsv3_megatron.model.init import parameter_seed  # noqa: E402
from dsv3_megatron.model.router import DeepSeekRouter  # noqa: E402
from dsv3_megatron.optim.router_bias import routers  # noqa: E402
from dsv3_megatron.parallel.groups import create_groups, start_process_group  # noqa: E402
from dsv3_megatron.runs.trainer import Trainer  # noqa: E402

BATCH, SEQ_LENGTH = 4, 128
# Checkpoints are moved between devices after this many steps.
CHECKPOINT_STEPS = 2


def run_config(name: str = "tiny", **changes: Any) -> RunConfig:
    """A preset on one process with short sequences, in fp32 on local modules where nothing else is asked for."""
    return preset(name).override(**{
        "seq_length": SEQ_LENGTH, "micro_batch_size": BATCH, "global_batch_size": BATCH, "train_iters": 1000,
        "lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0, "lr_decay_style": "constant", "eval_interval": 0,
        "precision": "fp32", "transformer_impl": "local", **changes})


# ---- loss and gradients of one step ----


@dataclass
class ModelStep:
    """One forward and backward pass, on the CPU in fp32.

    Attributes:
        main: Mean loss, nats per token.
        mtp: The MTP module's, likewise.
        gradients: Of main + lambda * mtp, summed over tokens, by global name; routed experts one by one.
        choices_TK: The experts each router chose, in the order the routers ran.
    """

    main: float
    mtp: float
    gradients: dict[str, torch.Tensor]
    choices_TK: list[torch.Tensor]


def model_step(run: RunConfig, choices_TK: list[torch.Tensor] | None = None) -> ModelStep:
    """One step of the model of `run` from weights that depend on their names alone.

    Args:
        run: With a precision that is not "auto".
        choices_TK: Experts to take instead of the routers' own choices, from another step.
    """
    with process_groups(run) as groups:
        stage = build_stages(run, groups, precision=run.training.precision)[0][0].train()
        device = next(stage.parameters()).device
        set_weights(stage, groups)
        tokens_BS = torch.randint(0, run.model.vocab_size, (BATCH, run.training.seq_length + 1),
                                  generator=torch.Generator().manual_seed(1)).to(device)
        made_TK: list[torch.Tensor] = []
        with mock.patch.object(DeepSeekRouter, "best_experts", _choosing(made_TK, choices_TK)):
            losses = stage(input_ids=tokens_BS[:, :-1], attention_mask=None, labels=tokens_BS[:, 1:],
                           position_ids=torch.arange(run.training.seq_length, device=device).expand(BATCH, -1))
            main = losses.main_BS.sum()
            mtp = sum((losses_BS.sum() for losses_BS in losses.mtp_BS), start=torch.zeros((), device=device))
            (main + run.training.mtp_loss_scaling_factor * mtp).backward()
        assert len(made_TK) == len(list(routers([stage], run.model.num_layers))), "each router chose once"
        num_tokens = losses.main_BS.numel()
        return ModelStep(main.item() / num_tokens, mtp.item() / num_tokens, _gradients(stage, groups), made_TK)


def set_weights(stage: torch.nn.Module, groups: Any) -> None:
    """Weights from generators on the CPU: those of the library's own start depend on the kind of device.

    Matrices keep the scale of what goes through them, the routers' are larger, so that gates differ clearly.
    """
    with torch.no_grad():
        for whole in whole_parameters(stage, groups):
            generator = torch.Generator().manual_seed(parameter_seed(0, whole.name))
            full = torch.randn(whole.shape, generator=generator)
            if len(whole.shape) == 1:
                full = 1.0 + 0.1 * full
            elif "embedding" not in whole.name:
                full *= (3.0 if "router" in whole.name else 1.0) / whole.shape[1] ** 0.5
            whole.local.copy_(full)


def _gradients(stage: torch.nn.Module, groups: Any) -> dict[str, torch.Tensor]:
    found = {}
    for whole in whole_parameters(stage, groups):
        assert whole.parameter.grad is not None, f"{whole.name} got no gradient"
        found[whole.name] = _part(whole, whole.parameter.grad).float().cpu()
    return found


def _choosing(made_TK: list[torch.Tensor], given_TK: list[torch.Tensor] | None) -> Callable[..., Any]:
    """The routers' choice, noted, and replaced by the given one where there are any."""
    own = DeepSeekRouter.best_experts

    def choose(router: DeepSeekRouter, scores_TE: torch.Tensor) -> torch.Tensor:
        made_TK.append(own(router, scores_TE).cpu())
        taken_TK = made_TK[-1] if given_TK is None else given_TK[len(made_TK) - 1]
        return taken_TK.to(scores_TE.device)

    return choose


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what was expected."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def share_of_equal_choices(one: ModelStep, other: ModelStep) -> float:
    """How many of the routers' choices, of all tokens and layers, are in both steps."""
    equal = total = 0
    for a_TK, b_TK in zip(one.choices_TK, other.choices_TK, strict=True):
        equal += int((a_TK.unsqueeze(-1) == b_TK.unsqueeze(-2)).sum())
        total += a_TK.numel()
    return equal / total if total else 1.0


# ---- training, and checkpoints ----


class RandomSamples:
    """Eight sequences of random tokens over and over, which a model soon knows by heart."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.tokens = torch.randint(0, vocab_size, (8, seq_length + 1), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index % len(self.tokens)]
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(len(tokens) - 1),
                "position_ids": torch.arange(len(tokens) - 1)}


class RandomTrainer(Trainer):
    """The trainer on random samples, without reports."""

    def __init__(self, run: RunConfig) -> None:
        samples = RandomSamples(run.model.vocab_size, run.training.seq_length)
        super().__init__(run, data=CurrentData(samples, None, None, {}, 0))

    def _build_reports(self) -> None:
        pass

    def step(self) -> float:
        """One training step; its loss, nats per token."""
        return self.train_step()[0].lm_loss

    def write(self, directory: Path) -> None:
        """Save a checkpoint of this moment."""
        tokens = self.consumed_samples * self.run.training.seq_length
        save_checkpoint(directory, RunProgress(self.iteration, self.consumed_samples, tokens), self.run, self.chunks,
                        self.optimizer, self.groups, keep_last=0)

    def read(self, directory: Path) -> None:
        """Go on from the newest checkpoint of a folder."""
        progress = load_checkpoint(directory, self.run, self.chunks, self.optimizer, self.groups)
        self.iteration, self.consumed_samples = progress.iteration, progress.consumed_samples
        self._iterate_from_here()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, fp32 weights, moments and router biases by global name, on the CPU."""
        shards = {parameter: (part, ranges["param"])
                  for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer])
                  for buffer in part.gbuf_ranges for buckets in buffer.values() for bucket in buckets
                  for parameter, ranges in bucket["param_map"].items()}
        state: dict[str, torch.Tensor] = {}
        for chunk in self.chunks:
            for whole in whole_parameters(chunk, self.groups):
                state[f"weight:{whole.name}"] = whole.local.detach().cpu().clone()
                part, held = shards[whole.parameter]
                for kind, values in part._get_main_param_and_optimizer_states(whole.parameter).items():
                    if torch.is_tensor(values) and values.dim() > 0:
                        assert values.numel() == whole.parameter.numel() == held.end - held.start, "one process"
                        tensor = values.detach().cpu().view(whole.parameter.shape)
                        state[f"{kind}:{whole.name}"] = _part(whole, tensor).clone()
        for row, router in routers(self.chunks, self.run.model.num_layers):
            state[f"bias:{row}"] = router.expert_bias.cpu().clone()
        return state


@contextlib.contextmanager
def trainer(run: RunConfig) -> Iterator[RandomTrainer]:
    """A trainer of this process alone, whose groups end with the block."""
    run.validate(1)
    try:
        yield RandomTrainer(run)
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def process_groups(run: RunConfig) -> Iterator[Any]:
    """The groups of a run of this process alone."""
    start_process_group(prepare())
    try:
        yield create_groups(ParallelConfig(), run.training.seed)
    finally:
        parallel_state.destroy_model_parallel()


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that are in one state only, or whose values differ in a bit."""
    return sorted(one.keys() ^ other.keys()) + [
        name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]


def _part(whole: WholeParameter, tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor shaped like the local parameter belongs to the whole one's name."""
    return tensor if tensor.shape == whole.local.shape else tensor[whole.expert]


# ---- the process without a GPU ----


def write_checkpoint(directory: Path, precision: str) -> dict[str, Any]:
    """Train, save, train on; the state that was saved and the loss of the step after it."""
    with trainer(run_config(precision=precision)) as writer:
        for _ in range(CHECKPOINT_STEPS):
            writer.step()
        writer.write(directory)
        return {"state": writer.state(), "next_loss": writer.step()}


def read_checkpoint(directory: Path, precision: str) -> dict[str, Any]:
    """Load into a run of another seed; the state and the loss of the next step."""
    with trainer(run_config(precision=precision, seed=5)) as reader:
        reader.read(directory)
        return {"state": reader.state(), "next_loss": reader.step()}


def main(arguments: list[str]) -> None:
    """Do one of the things listed at the top of this module; leave the result with torch.save."""
    match arguments:
        case ["gradients", file]:
            torch.save(model_step(run_config()), file)
        case ["write", directory, precision, file]:
            torch.save(write_checkpoint(Path(directory), precision), file)
        case ["read", directory, precision, file]:
            torch.save(read_checkpoint(Path(directory), precision), file)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    # Pickled results name this module as the tests import it, not as "__main__".
    from tests.gpu import runs

    runs.main(sys.argv[1:])
