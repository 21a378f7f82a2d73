"""Batches out: an iterator over a dataset's samples whose position is one number.

Which samples a step trains on depends on the samples consumed before it and on nothing else: not on the number of
data-parallel ranks, not on the micro-batch size, not on how often the run was interrupted. With `consumed` samples
done, micro-batch m of the next step on data-parallel rank r of `dp` holds, for i in 0..mbs - 1,

    sample  consumed + m * mbs * dp + r * mbs + i

which is Megatron-LM's order. The datasets come from datasets.py. Nor does it depend on whether documents are isolated:
that adds to a batch, and takes from its loss mask, but moves no token.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch

from dsv3_megatron.data.document_ends import document_bounds

_NUM_SAMPLES_IN_CHECK = 4
_STATE_VERSION = 1


class SampleDataset(Protocol):
    """What the iterator needs: samples by number, as samples.py and Megatron-Core's datasets have them.

    A sample that says where its documents end, as conversations' do, has `document_bounds` too, and perhaps `extras`,
    further values of each label by name, and `continued`, as `Batch` has it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `labels_BS[b, s]` is the token after `tokens_BS[b, s]`.

    tokens, labels and position ids are int64 [B, S], the loss mask float32 [B, S] (1 counts), sample ids int64 [B].
    `document_bounds` are plain numbers: a row for each sequence, 0 = b_0 < ... < b_n = S, whose documents lie from b_i
    to b_(i+1); None where documents are not isolated. `extras_BS` are further values of each label, float32 [B, S] by
    name, which a loss of its own kind reads. `continued` are plain numbers too, a row for each sequence: of each
    document the number of the one that it goes on from, or its own. A document that others go on from goes on from
    none; they see it, and not each other. An empty row: none of the sequence does. None: none of the batch.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    sample_ids_B: torch.Tensor
    document_bounds: tuple[tuple[int, ...], ...] | None = None
    extras_BS: Mapping[str, torch.Tensor] = field(default_factory=dict)
    continued: tuple[tuple[int, ...], ...] | None = None

    def to(self, device: torch.device | str, *, is_non_blocking: bool = False) -> Batch:
        """Copy the batch to a device; what is said of its documents stays plain numbers."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        bounds, continued, extras_BS = (tensors.pop(name) for name in ("document_bounds", "continued", "extras_BS"))
        moved, extras_BS = ({name: tensor.to(device, non_blocking=is_non_blocking) for name, tensor in each.items()}
                            for each in (tensors, extras_BS))
        return Batch(**moved, document_bounds=bounds, extras_BS=extras_BS, continued=continued)


def read_token_sequences(dataset: SampleDataset, start: int, stop: int) -> np.ndarray:
    """Tokens of samples start..stop - 1 as int64 [stop - start, S + 1]: inputs and the label after the last one."""
    rows = []
    for index in range(start, stop):
        sample = dataset[index]
        rows.append(np.append(sample["tokens"].numpy(), sample["labels"][-1].item()))
    if not rows:
        width = len(dataset[0]["tokens"]) + 1 if len(dataset) else 0
        return np.empty((0, width), dtype=np.int64)
    return np.stack(rows).astype(np.int64)


def _continued(samples: list[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...] | None:
    """What the documents of each sample go on from; None where none of any does."""
    rows = tuple(tuple(sample.get("continued", ())) for sample in samples)
    return rows if any(rows) else None


class BatchIterator(Iterator[Batch]):
    """Yields one data-parallel rank's micro-batches, step after step, until less than a whole step is left.

    See the top of this module for the order. All ranks of one model replica (tensor, pipeline, expert) use the same
    data_parallel_rank. `consumed_samples` counts over all ranks and moves at the end of each step.

    Args:
        dataset: Read at any index.
        micro_batch_size: Samples per micro-batch.
        global_batch_size: Samples per step over all ranks and micro-batches.
        data_parallel_rank: 0..data_parallel_size - 1.
        data_parallel_size: Ranks that share a step's samples.
        consumed_samples: Samples taken before the first step, over all ranks.
        eod_id: Give each batch the bounds of its documents, which end with this token; None: those that its samples
            say, or none.

    Raises:
        ValueError: the sizes do not divide, or the rank or the position is out of range.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        eod_id: int | None = None,
    ) -> None:
        if micro_batch_size < 1 or data_parallel_size < 1:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} and data_parallel_size={data_parallel_size} must be at least 1"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data_parallel_rank={data_parallel_rank} must lie in 0..{data_parallel_size - 1} "
                f"(data_parallel_size={data_parallel_size})"
            )
        self.dataset = dataset
        self.eod_id = eod_id
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self._micro_batch = 0
        self._consumed_samples = 0
        self.set_global_batch_size(global_batch_size)
        self.set_consumed_samples(consumed_samples)

    @property
    def consumed_samples(self) -> int:
        """Samples of all finished steps, over all ranks."""
        return self._consumed_samples

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on this rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def set_global_batch_size(self, global_batch_size: int) -> None:
        """Change the step's size from the next step on (batch-size ramps).

        Raises:
            ValueError: the size is not a multiple of micro_batch_size x data_parallel_size, or a step is under way.
        """
        self._require_step_boundary("change the global batch size")
        unit = self.micro_batch_size * self.data_parallel_size
        if global_batch_size < 1 or global_batch_size % unit:
            below = global_batch_size // unit * unit
            choices = " or ".join(str(size) for size in (below, below + unit) if size > 0)
            raise ValueError(
                f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size x data_parallel_size = "
                f"{self.micro_batch_size} x {self.data_parallel_size} = {unit}; try {choices}"
            )
        self.global_batch_size = global_batch_size

    def set_consumed_samples(self, consumed_samples: int) -> None:
        """Move to a position between steps; also for ranks that take no batches themselves.

        Raises:
            ValueError: outside the dataset.
        """
        if not 0 <= consumed_samples <= len(self.dataset):
            raise ValueError(
                f"consumed_samples={consumed_samples} must lie in 0..{len(self.dataset)}, the samples of the dataset"
            )
        self._consumed_samples = consumed_samples
        self._micro_batch = 0

    def __next__(self) -> Batch:
        if self._consumed_samples + self.global_batch_size > len(self.dataset):
            raise StopIteration
        first = self._consumed_samples + self.micro_batch_size * (
            self._micro_batch * self.data_parallel_size + self.data_parallel_rank
        )
        sample_ids = range(first, first + self.micro_batch_size)
        samples = [self.dataset[index] for index in sample_ids]
        self._micro_batch += 1
        if self._micro_batch == self.num_micro_batches:
            self._micro_batch = 0
            self._consumed_samples += self.global_batch_size
        tokens_BS = torch.stack([sample["tokens"] for sample in samples])
        return Batch(
            tokens_BS=tokens_BS,
            labels_BS=torch.stack([sample["labels"] for sample in samples]),
            loss_mask_BS=torch.stack([sample["loss_mask"] for sample in samples]),
            position_ids_BS=torch.stack([sample["position_ids"] for sample in samples]),
            sample_ids_B=torch.tensor(sample_ids, dtype=torch.int64),
            document_bounds=self._bounds(samples, tokens_BS),
            extras_BS={name: torch.stack([sample["extras"][name] for sample in samples])
                       for name in samples[0].get("extras", ())},
            continued=_continued(samples),
        )

    def _bounds(self, samples: list[Mapping[str, Any]], tokens_BS: torch.Tensor) -> tuple[tuple[int, ...], ...] | None:
        if "document_bounds" in samples[0]:
            return tuple(sample["document_bounds"] for sample in samples)
        return None if self.eod_id is None else document_bounds(tokens_BS.numpy(), self.eod_id)

    def _require_step_boundary(self, what: str) -> None:
        if self._micro_batch:
            raise ValueError(
                f"cannot {what} after micro-batch {self._micro_batch} of {self.num_micro_batches}: finish the step "
                "first"
            )

    def _hash_last_samples(self) -> str:
        start = max(0, self._consumed_samples - _NUM_SAMPLES_IN_CHECK)
        return hashlib.sha256(read_token_sequences(self.dataset, start, self._consumed_samples).tobytes()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank, with a hash of the last samples before it.

        Raises:
            ValueError: a step is under way.
        """
        self._require_step_boundary("save the position")
        return {
            "version": _STATE_VERSION,
            "consumed_samples": self._consumed_samples,
            "last_samples_sha256": self._hash_last_samples(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, after any change of micro-batch or data-parallel size.

        Raises:
            ValueError: the dataset's order differs from the one the position was saved in.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"data position of version {state.get('version')}, this release reads {_STATE_VERSION}")
        self.set_consumed_samples(int(state["consumed_samples"]))
        if self._hash_last_samples() != state["last_samples_sha256"]:
            raise ValueError(
                f"the {self._consumed_samples} samples consumed before the checkpoint are not those of this dataset: "
                "the data, its split or blend, seq_length or seed has changed, or the library takes samples in another "
                "order; restore them, or give --allow-data-change to read the data from their first sample"
            )
