"""Training runs in which something goes wrong on purpose: a corrupted batch, gradients, activations, a rank that stops.

`python -m tests.distributed.faulty_run FAULTS FLAGS...` is `python -m dsv3_megatron train FLAGS...` with faults, a JSON
list of objects with the fields of `Fault`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.platform import prepare
from dsv3_megatron.runs.rank import run_rank

prepare()

from dsv3_megatron.guards.step_losses import StepLosses  # noqa: E402
from dsv3_megatron.optim.router_bias import routers  # noqa: E402
from dsv3_megatron.runs.trainer import Trainer  # noqa: E402

SLEEP_S = 600


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: A method of FaultyTrainer without its "_fault_"; "corrupt": samples are read as one rare token; or
            "uncounted": no token counts, where `where` is "validation" in the validation before the step.
        steps: Iterations at which it does, counted from 1; for "corrupt", samples of the dataset.
        rank: On this rank; -1: on all.
        value: What it takes: a factor, a number to write, seconds.
        where: The end of a module's or parameter's name.
    """

    kind: str
    steps: Sequence[int]
    rank: int = -1
    value: float = float("nan")
    where: str = ""


class CorruptedDataset:
    """A dataset some of whose samples are another text: one token again and again."""

    def __init__(self, dataset: Any, samples: set[int], token: int) -> None:
        self.dataset, self.samples, self.token = dataset, samples, token

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = dict(self.dataset[index])
        if int(index) in self.samples:
            sample |= {name: torch.full_like(sample[name], self.token) for name in ("tokens", "labels")}
        return sample


class FaultyTrainer(Trainer):
    """The trainer, with faults; notes the reports of its steps, and the samples that each read."""

    def __init__(self, run: RunConfig, faults: Sequence[Fault] = ()) -> None:
        self.faults = faults
        self.phase_is_training = True
        self.reports: list[StepReport] = []
        self.samples: list[tuple[int, int]] = []
        if {fault.kind for fault in faults} & {"gradient", "scaled"}:  # nothing can be changed once it is reduced
            run = run.override(overlap_grad_reduce=False)
        super().__init__(run)
        finalize = self.mcore_config.finalize_model_grads_func

        def finalize_after_faults(*args: Any, **kwargs: Any) -> None:
            self.apply("gradient")
            self.apply("scaled")
            finalize(*args, **kwargs)
            self.apply("copy")

        self.mcore_config.finalize_model_grads_func = finalize_after_faults
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                module.register_forward_hook(lambda module, _, output, name=name: self.spoil(name, output))

    def _iterate(self, dataset: Any, consumed_samples: int) -> list[BatchIterator]:
        corrupted = {sample for fault in self.faults if fault.kind == "corrupt" for sample in fault.steps}
        return super()._iterate(CorruptedDataset(dataset, corrupted, self.run.model.vocab_size - 1), consumed_samples)

    def due(self, kind: str) -> list[Fault]:
        """Faults of a kind that strike this rank in the step under way."""
        return [fault for fault in self.faults if fault.kind == kind and self.iteration + 1 in fault.steps
                and fault.rank in (-1, self.rank)]

    def apply(self, kind: str) -> None:
        """Let the faults of a kind happen that are due."""
        for fault in self.due(kind):
            getattr(self, f"_fault_{kind}")(fault)

    def _gradients(self, ending: str) -> list[torch.Tensor]:
        return [parameter.main_grad for chunk in self.chunks for name, parameter in chunk.named_parameters()
                if name.endswith(ending)]

    def _fault_gradient(self, fault: Fault) -> None:
        """One number of a parameter's gradient on this rank."""
        gradients = self._gradients(fault.where)
        assert gradients, f"{fault.where} is no parameter of rank {self.rank}"
        gradients[0].view(-1)[0] = fault.value

    # After the reduction: only this rank's copy of a parameter that tensor-parallel ranks share.
    _fault_copy = _fault_gradient

    def _fault_scaled(self, fault: Fault) -> None:
        """All gradients of this rank times a number."""
        for gradient in self._gradients(""):
            gradient.mul_(fault.value)

    def _fault_sleep(self, fault: Fault) -> None:
        time.sleep(fault.value)

    def _fault_lock(self, fault: Fault) -> None:
        """A C function that keeps the interpreter's lock: no thread of Python goes on."""
        ctypes.PyDLL(None).sleep(int(fault.value))

    def _fault_balance(self, fault: Fault) -> None:
        """The balance loss of the first MoE layer here."""
        _, router = next(routers(self.chunks, self.run.model.num_layers))
        router.balance_loss_sum.fill_(fault.value)

    def spoil(self, name: str, output: Any) -> Any:
        """One number of what a module returns, in place of what it is."""
        for fault in self.due("activation"):
            if fault.where and name.endswith(fault.where):
                first, *rest = output if isinstance(output, tuple) else (output,)
                first = first.clone()
                first.view(-1)[0] = fault.value
                return (first, *rest) if isinstance(output, tuple) else first
        return None

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        for kind in ("sleep", "lock", "stop"):
            self.apply(kind)
        batch = super()._next_batch(batches)
        is_unmasked = any(self.phase_is_training == (fault.where != "validation") for fault in self.due("uncounted"))
        return replace(batch, loss_mask_BS=torch.zeros_like(batch.loss_mask_BS)) if is_unmasked else batch

    def run_microbatches(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run_microbatches(*args, **kwargs)
        self.apply("balance")
        return result

    def _fault_stop(self, _fault: Fault) -> None:
        """As a signal would."""
        self.stop_signal = int(signal.SIGTERM)

    def evaluate(self, name: str | None = None) -> StepLosses:
        self.apply("slow_validation")
        self.phase_is_training = False
        try:
            return super().evaluate(name)
        finally:
            self.phase_is_training = True

    _fault_slow_validation = _fault_sleep

    def train_step(self) -> tuple[StepReport, int]:
        first = self.data_position
        report, stopped = super().train_step()
        self.reports.append(report)
        self.samples.append((first, first + report.batch_size))
        return report, stopped


def main() -> int:
    """Run one process of a training run with faults."""
    faults = [Fault(**values) for values in json.loads(sys.argv[1])]
    run = parse_command(sys.argv[2:]).run
    run.validate(int(os.environ["WORLD_SIZE"]))
    return run_rank(int(os.environ["RANK"]), lambda: FaultyTrainer(run, faults).train())


if __name__ == "__main__":
    sys.exit(main())
