"""Scores rows of tokens with a model that is only run forward, under any layout.

The same stages, pipeline schedule and sums of losses as a run's validation, without an optimizer and without buffers
for gradients. A step is `global_batch_size` rows; rows that fill up the last one do not count. Documents are kept
apart, or not, as the run's data settings say; the parts of a document that rows cut are documents, as in training.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dsv3_megatron.checkpoint.agreement import on_first_rank
from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.new_files import open_new
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.slow_work import bar_width
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.data.document_ends import document_bounds, restarted_positions
from dsv3_megatron.data.rows import Rows
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses, sum_over_ranks
from dsv3_megatron.parallel.sequence_parts import SequenceParts
from dsv3_megatron.runs.built_model import BuiltModel
from dsv3_megatron.schedule.forward_backward import ForwardStep, build_forward_backward, iterate_chunks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The losses of a model on some rows.

    Attributes:
        loss: Mean -log p of the next token, nats.
        mtp_losses: Loss of each MTP depth, nats: the sum over the positions that have a target, divided by all tokens,
            as a run's validation reports it (DeepSeek-V3 report, eq. 24).
        tokens: Tokens predicted, without those that `eod_mask_loss` leaves out.
        rows: Rows they were in.
    """

    loss: float
    mtp_losses: tuple[float, ...]
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf


class RowSamples:
    """Rows of ids as samples of one length, as many as fill whole steps; what is added has a loss mask of 0.

    Args:
        rows: Ids of each, 2 to seq_length + 1 of them.
        seq_length: Tokens of a sample.
        num_rows_per_step: Samples of a step.
        data: Whether positions restart and losses are masked where documents end, as a run's datasets do it.
        eod_id: The token that ends a document; None where no switch of `data` is on.
    """

    def __init__(self, rows: Rows, *, seq_length: int, num_rows_per_step: int, data: DataConfig | None = None,
                 eod_id: int | None = None) -> None:
        self.rows, self.seq_length = rows, seq_length
        self.data, self.eod_id = data or DataConfig(), eod_id
        self.num_samples = math.ceil(len(rows) / num_rows_per_step) * num_rows_per_step

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        ids = torch.zeros(self.seq_length + 1, dtype=torch.int64)
        mask_S = torch.zeros(self.seq_length)
        if index < len(self.rows):
            row = np.asarray(self.rows[index]).astype(np.int64)
            ids[: len(row)] = torch.from_numpy(row)
            mask_S[: len(row) - 1] = 1.0
        tokens_S, positions_S = ids[:-1], torch.arange(self.seq_length)
        if self.data.eod_mask_loss:
            mask_S[tokens_S == self.eod_id] = 0.0
        if self.data.reset_position_ids:
            assert self.eod_id is not None
            (bounds,) = document_bounds(tokens_S[None].numpy(), self.eod_id)
            positions_S = torch.from_numpy(restarted_positions(bounds))
        return {"tokens": tokens_S, "labels": ids[1:], "loss_mask": mask_S, "position_ids": positions_S}


class Evaluator:
    """One process's share of an evaluation.

    Args:
        built: The stages, with their weights.
        run: A run of that model, validated against the number of processes: its micro-batch, rows of a step
            (`global_batch_size`), sequence length and document switches are used. None: the one it was built for.
        eod_id: The token that ends a document; None only if no document switch is on.
        shows_progress: Whether the first rank shows a bar.
    """

    def __init__(self, built: BuiltModel, run: RunConfig | None = None, *, eod_id: int | None = None,
                 shows_progress: bool = True) -> None:
        self.run, self.eod_id = run or built.run, eod_id
        assert eod_id is not None or not self.run.data.document_flags
        self.device, self.groups, self.precision = built.device, built.groups, built.precision
        self.rank = torch.distributed.get_rank()
        self.stages: list[Any] = [stage.eval() for stage in built.stages]
        self.forward = build_forward_backward(self.run.parallel, self.groups, built.config)
        self.shows_progress = shows_progress and self.rank == 0

    def evaluate(self, rows: Rows, *, logprobs: str | Path | None = None) -> Evaluation:
        """Score every row; called by every rank with the same rows.

        Args:
            rows: Ids of each, 2 to seq_length + 1 of them.
            logprobs: File to write the log-probability of each next token to, float32 [rows, ids - 1]; all rows must
                be as long as the first. It appears when it is complete.

        Returns:
            The same on every rank.

        Raises:
            CheckpointError: on every rank, if the file cannot be written.
            ConfigError: no token of any row counts, or the loss is not finite.
        """
        training, data, depths = self.run.training, self.run.data, self.run.model.mtp_num_layers
        samples = RowSamples(rows, seq_length=training.seq_length, num_rows_per_step=training.global_batch_size,
                             data=data, eod_id=self.eod_id)
        batches = iterate_chunks(samples, training, self.run.parallel, self.groups,
                                 eod_id=self.eod_id if data.reset_attention_mask else None)
        writer = LogProbsWriter(logprobs, len(rows), len(rows[0]) - 1) if logprobs else None
        totals = [0.0] * (2 + depths)
        started = time.monotonic()
        with _progress_bar(len(rows), is_shown=self.shows_progress) as bar:
            try:
                for first in range(0, len(samples), training.global_batch_size):
                    reports = self._run_step(batches)
                    sums = sum_over_ranks(reports, self.groups, self.device, num_mtp_layers=depths)
                    totals = [total + value for total, value in zip(totals, sums, strict=True)]
                    if writer is not None:
                        writer.write(self._gather_logprobs(reports, first))
                    bar.update(min(training.global_batch_size, len(rows) - first))
                if not totals[0]:
                    raise ConfigError(f"eod_mask_loss=True leaves out the token after each EOD (id {self.eod_id}), and "
                                      "the rows have no other to predict; give --no-eod-mask-loss")
                if writer is not None:
                    writer.publish()
            finally:
                if writer is not None:
                    writer.close()
        tokens, main, *mtp = totals
        if not all(map(math.isfinite, totals)):
            raise ConfigError(f"the loss is not finite ({main / tokens}, MTP {[value / tokens for value in mtp]}): the "
                              f"weights in load={self.run.checkpoint.load} are, so values overflow in "
                              f"{self.precision}; try --precision fp32")
        seconds = time.monotonic() - started
        logger.info("scored %d tokens in %.1f s, %.0f tokens/s", tokens, seconds, tokens / seconds)
        return Evaluation(main / tokens, tuple(value / tokens for value in mtp), int(tokens), len(rows))

    def _run_step(self, batches: list[BatchIterator]) -> list[dict[str, Any]]:
        """This rank's reports on its rows of one step; none but on the last pipeline stage."""
        training = self.run.training
        with torch.no_grad():
            return self.forward(
                forward_step_func=ForwardStep(self._next_batch, self.run.data,
                                              partial(_report, SequenceParts.of(self.groups))),
                data_iterator=batches if len(batches) > 1 else batches[0],
                model=self.stages if len(self.stages) > 1 else self.stages[0],
                num_microbatches=training.num_microbatches(self.groups.dp.size()),
                seq_length=training.seq_length, micro_batch_size=training.micro_batch_size, forward_only=True)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        return next(batches).to(self.device.torch_device)

    def _gather_logprobs(self, reports: list[dict[str, Any]], first: int) -> np.ndarray:
        """[B, S] of a step whose first row is `first`: each row from the rank that has it."""
        training = self.run.training
        logprobs_BS = torch.zeros(training.global_batch_size, training.seq_length, device=self.device.torch_device)
        if self.groups.tp.rank() == 0:
            positions_S = SequenceParts.of(self.groups).positions(training.seq_length, logprobs_BS.device)
            for report in reports:
                logprobs_BS[(report["sample_ids"] - first).unsqueeze(1), positions_S] = report["logprobs"]
        torch.distributed.all_reduce(logprobs_BS)
        return logprobs_BS.cpu().numpy()


def _report(parts: SequenceParts, batch: Batch, losses: TokenLosses
            ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The sums of a micro-batch's losses, and each token's log-probability."""
    total, tokens, report = sum_losses(batch.loss_mask_BS, losses, mtp_weight=0.0, parts=parts)
    logprobs_BS = -TokenLosses(*losses).main_BS.float()
    return total, tokens, {**report, "sample_ids": batch.sample_ids_B, "logprobs": logprobs_BS}


class LogProbsWriter:
    """Writes float32 [rows, columns] in .npy format, row after row, under another name until `publish`.

    Every rank has one and calls its methods; the first writes, and the others hear of its errors.
    """

    def __init__(self, path: str | Path, num_rows: int, num_columns: int) -> None:
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        self.num_rows, self.num_columns, self.num_written = num_rows, num_columns, 0
        self._stream: IO[bytes] | None = None
        on_first_rank(self._open, f"logprobs={path}")

    def write(self, logprobs_BS: np.ndarray) -> None:
        """Append rows [B, S]; columns and rows beyond the array's are dropped."""
        rows = logprobs_BS[: self.num_rows - self.num_written, : self.num_columns]
        self.num_written += len(rows)
        on_first_rank(lambda: self._append(rows), f"logprobs={self.path}")

    def publish(self) -> None:
        """Flush the file to disk and give it its name."""
        assert self.num_written == self.num_rows
        on_first_rank(self._publish, f"logprobs={self.path}")

    def close(self) -> None:
        """Drop what was written, unless it was published."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self.partial.unlink(missing_ok=True)

    def _open(self) -> None:
        self._stream = open_new(self.partial)
        np.lib.format.write_array_header_1_0(self._stream, {
            "descr": "<f4", "fortran_order": False, "shape": (self.num_rows, self.num_columns)})

    def _append(self, rows: np.ndarray) -> None:
        assert self._stream is not None
        self._stream.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())

    def _publish(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        os.replace(self.partial, self.path)


@contextlib.contextmanager
def _progress_bar(total: int, *, is_shown: bool) -> Iterator[Any]:
    """A bar on stderr, which log lines do not break; off a terminal it is printed now and then."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    is_terminal = is_shown and sys.stderr.isatty()
    with (tqdm(total=total, unit="row", file=sys.stderr, disable=not is_shown, **bar_width(sys.stderr),
               mininterval=0.2 if is_terminal else 10.0) as bar,
          logging_redirect_tqdm() if is_terminal else contextlib.nullcontext()):
        yield bar
