"""The data that a run reads at the time, and its place in them: opened, described for a checkpoint, compared with one.

A run counts its samples from its first step on; the data of a phase, or data that a resumed run was changed to, begin
in the midst of that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.batches import BatchIterator, SampleDataset
from dsv3_megatron.data.chat.prompts import ChatPrompts, open_run_prompts
from dsv3_megatron.data.datasets import build_datasets, dataset_config
from dsv3_megatron.data.identity import run_identity
from dsv3_megatron.data.samples import ENDLESS

if TYPE_CHECKING:
    from dsv3_megatron.config.recipe import PlannedPhase
    from dsv3_megatron.config.run import RunConfig


@dataclass(frozen=True)
class CurrentData:
    """Datasets, and where a run began to read them.

    Attributes:
        train: Training samples.
        valid: Validation samples, the first of several; None where there are none.
        eod_id: Token that ends a document; None where nothing depends on it.
        identity: What the order of the training samples follows from.
        first_sample: Samples that the run had taken, or jumped over, when it began to read.
        named_valid: Validation samples by name; empty where they have none.
    """

    train: SampleDataset
    valid: SampleDataset | None
    eod_id: int | None
    identity: Mapping[str, Any]
    first_sample: int
    named_valid: Mapping[str, SampleDataset] = field(default_factory=dict)

    @property
    def validation_sets(self) -> dict[str, SampleDataset]:
        """Validation samples by name, in order; "" is the name of those that have none."""
        return dict(self.named_valid) or ({} if self.valid is None else {"": self.valid})

    def position(self, num_samples: int) -> int:
        """Place in the training samples of a run that has taken, or jumped over, so many in all."""
        return max(0, num_samples - self.first_sample)

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Identity and place for a checkpoint, as plain values, with a hash of the last samples before the place."""
        return {"identity": self.identity, "first_sample": self.first_sample,
                "position": self._iterator(self.position(num_samples)).state_dict()}

    def check(self, position: Mapping[str, Any], load: str | None) -> None:
        """Compare the samples before a checkpoint's place with those that were there when it was made.

        Args:
            position: Position in the data that a checkpoint's `state_dict` says.
            load: Folder of the checkpoint, for the message.

        Raises:
            ConfigError: the samples are others than those.
        """
        try:
            self._iterator(0).load_state_dict(position)
        except ValueError as error:
            raise ConfigError(f"load={load}: {error}") from error

    def _iterator(self, consumed_samples: int) -> BatchIterator:
        return BatchIterator(self.train, micro_batch_size=1, global_batch_size=1, consumed_samples=consumed_samples)


def open_current_data(run: RunConfig, phase: PlannedPhase, first_sample: int) -> CurrentData:
    """Open the data that a phase reads.

    Args:
        run: The run.
        phase: The phase of the run's recipe whose data are wanted.
        first_sample: Samples that the run has taken, or jumped over, when it begins to read them.

    Raises:
        ValueError: a file is missing or damaged, or there is less data than one sample needs.
    """
    identity = run_identity(run, phase)
    if run.policy.is_on:
        samples = PromptSamples(open_run_prompts(run), run.policy.group_size, run.training.seed)
        return CurrentData(samples, None, None, identity, first_sample)
    config = dataset_config(run, run.recipe().span_of(phase))
    data = build_datasets(config)
    return CurrentData(data.train, data.valid, config.eod_id, identity, first_sample, data.named_valid)


class PromptSamples:
    """Prompts as samples, one for each answer, so that a checkpoint says which were answered, as it does of texts.

    Args:
        prompts: The prompts.
        group_size: Answers to each.
        seed: Seed of their order.
    """

    def __init__(self, prompts: ChatPrompts, group_size: int, seed: int) -> None:
        self.prompts, self.group_size, self.seed = prompts, group_size, seed
        self._width = max(len(prompt.ids) for prompt in prompts.prompts)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        ids = self.prompts.of_group(index // self.group_size, self.seed).ids
        tokens = torch.tensor([*ids, *[self.prompts.eod_id] * (self._width - len(ids))])
        return {"tokens": tokens, "labels": tokens.roll(-1)}
