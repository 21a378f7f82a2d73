"""Tensor by tensor: is a checkpoint of ours what a Hugging Face checkpoint says, and if not, how far is it?"""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import dataclass

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.directory import SCALE_SUFFIX, HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, tensors_by_parameter
from dsv3_megatron.checkpoint.hf.row_strips import row_strips, same_bits
from dsv3_megatron.checkpoint.hf.safetensors_file import NAMES
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.workplace import ProgressDisplay, ignore, single_threaded_workers


@dataclass
class AuditRow:
    """Tensors of one pair of dtypes.

    Attributes:
        theirs: Dtype in Hugging Face's checkpoint, as its files name it.
        ours: Dtype in our checkpoint.
        num_tensors: How many tensors have these two dtypes.
        their_bytes: Bytes in Hugging Face's checkpoint, block scales included.
        our_bytes: Bytes in our checkpoint.
        num_identical: Tensors among them that are equal bit for bit, FP8 dequantized to our dtype.
        largest_difference: Largest difference between two elements; infinite where only one of them is a number.
        where: Hugging Face's name of the tensor with that difference.
    """

    theirs: str
    ours: str
    num_tensors: int = 0
    their_bytes: int = 0
    our_bytes: int = 0
    num_identical: int = 0
    largest_difference: float = 0.0
    where: str = ""


@dataclass(frozen=True)
class Audit:
    """The comparison of two checkpoints."""

    rows: tuple[AuditRow, ...]

    def __str__(self) -> str:
        """A table for people."""
        head = ("Hugging Face", "ours", "tensors", "bytes there", "bytes here", "identical", "largest difference")
        lines = [f"{head[0]:<14}{head[1]:<10}{head[2]:>9}{head[3]:>18}{head[4]:>18}{head[5]:>11}  {head[6]}"]
        for row in self.rows:
            where = f" ({row.where})" if row.where else ""
            lines.append(f"{row.theirs:<14}{row.ours:<10}{row.num_tensors:>9,}{row.their_bytes:>18,}"
                         f"{row.our_bytes:>18,}{row.num_identical:>11,}  {row.largest_difference:.6g}{where}")
        lines.append(f"{'all':<24}{sum(row.num_tensors for row in self.rows):>9,}"
                     f"{sum(row.their_bytes for row in self.rows):>18,}{sum(row.our_bytes for row in self.rows):>18,}"
                     f"{sum(row.num_identical for row in self.rows):>11,}")
        return "\n".join(lines)

    def require_equal(self) -> None:
        """Raise unless every tensor is equal bit for bit.

        Raises:
            CheckpointError: naming the tensor that is furthest off.
        """
        _require(self.rows)

    def require_expected(self) -> None:
        """Raise unless what has the same dtype on both sides is equal bit for bit, and the rest is finite.

        Raises:
            CheckpointError: naming the tensor that is furthest off.
        """
        _require([row for row in self.rows if row.theirs == row.ours or not math.isfinite(row.largest_difference)])


def audit(directory: HuggingFaceDirectory, weights: MegatronWeights, *, is_master: bool = False, num_workers: int = 4,
          progress: ProgressDisplay | None = None) -> Audit:
    """Read both checkpoints and compare every tensor of Hugging Face's, MTP modules' copies included.

    Args:
        directory: The one.
        weights: The other, of the same architecture.
        is_master: Compare with our fp32 master weights, where the checkpoint has them.
        num_workers: Tensors compared at a time.
        progress: Told what is done.

    Raises:
        CheckpointError: the architectures differ, or a file cannot be read.
    """
    tensors = [tensor for tensor in directory.tensors.values() if tensor.num_elements]
    _check_same_tensors(directory, weights)
    report = progress.start("verify", sum(directory.stored[tensor.name].num_bytes for tensor in tensors)) \
        if progress else ignore
    table: dict[tuple[str, str], AuditRow] = {}
    lock = threading.Lock()

    def compare(tensor: HuggingFaceTensor) -> None:
        entry, dtype = directory.stored[tensor.name], weights.dtype(tensor, is_master)
        is_identical, difference = True, 0.0
        for rows in row_strips(tensor.shape):
            same, gap = _compare(weights.read(tensor, is_master, *rows), directory.tensor(tensor.name, dtype, *rows))
            is_identical, difference = is_identical and same, max(difference, gap)
        scale = directory.stored.get(tensor.name + SCALE_SUFFIX)
        with lock:
            pair = NAMES[entry.dtype], NAMES[dtype]
            line = table.setdefault(pair, AuditRow(*pair))
            line.num_tensors += 1
            line.their_bytes += entry.num_bytes + (scale.num_bytes if scale else 0)
            line.our_bytes += dtype.itemsize * tensor.num_elements
            line.num_identical += is_identical
            if difference > line.largest_difference:
                line.largest_difference, line.where = difference, tensor.name
        report(entry.num_bytes)

    with single_threaded_workers(num_workers, "audit") as pool:
        futures = [pool.submit(compare, tensor) for tensor in tensors]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return Audit(tuple(table[pair] for pair in sorted(table)))


def _compare(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[bool, float]:
    """Whether two tensors of one dtype are equal bit for bit, and their largest difference."""
    if same_bits(ours, theirs):
        return True, 0.0
    difference = (ours.double() - theirs.double()).abs().max().item()
    return False, math.inf if math.isnan(difference) else difference


def _check_same_tensors(directory: HuggingFaceDirectory, weights: MegatronWeights) -> None:
    model = weights.model
    if not directory.model.mtp_num_layers:  # left out at the export; what is there is compared
        model = dataclasses.replace(model, mtp_num_layers=0)
    theirs, ours = tensors_by_parameter(directory.model), tensors_by_parameter(model)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{directory.path} and {weights.manifest.path} are of different architectures: {name} is "
                f"{_shapes(theirs.get(name))} in one, {_shapes(ours.get(name))} in the other")


def _shapes(parts: tuple[HuggingFaceTensor, ...] | None) -> str:
    return " on ".join(str(list(part.shape)) for part in parts) if parts else "missing"


def _require(rows: list[AuditRow] | tuple[AuditRow, ...]) -> None:
    for row in rows:
        if row.num_identical < row.num_tensors:
            raise CheckpointError(f"{row.num_tensors - row.num_identical} of {row.num_tensors} tensors that are "
                                  f"{row.theirs} there and {row.ours} here differ; by {row.largest_difference:.6g} in "
                                  f"{row.where or 'the sign of a zero'}")
