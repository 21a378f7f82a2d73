"""The export at the end of a run: its last checkpoint in Hugging Face's layout, every rank a part of the files.

The same code as `dsv3 convert megatron-to-hf`; what it makes is what that makes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dsv3_megatron.checkpoint.agreement import from_all_ranks, on_first_rank, wait_for_folder
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.model_card import UNKNOWN_LICENSE, Losses
from dsv3_megatron.checkpoint.hf.to_hugging_face import prepare_export
from dsv3_megatron.checkpoint.hf.workplace import ignore

logger = logging.getLogger(__name__)


def export_run(source: str, output: str, iteration: int, *, precision: str, is_without_mtp: bool = False,
               license_id: str = UNKNOWN_LICENSE, losses: Losses | None = None) -> Path:
    """Write a run's checkpoint of `iteration` in Hugging Face's layout; called by every rank.

    Args:
        source: Folder of the run's checkpoints.
        output: Folder to make.
        iteration: A checkpoint that is there.
        precision: "bf16" or "fp32", of the weights as trained: of the files too.
        is_without_mtp: Leave the MTP modules out.
        license_id: The hub's name of a licence, for the model card.
        losses: Last losses of the run, for the model card.

    Returns:
        The folder.

    Raises:
        CheckpointError: on every rank, if any could not write its part; what is finished stays for
            `dsv3 convert` to go on with.
    """
    reasons: list[str] = []
    try:
        export = prepare_export(source, output, iteration=iteration, dtype=precision,
                                is_without_mtp=is_without_mtp, license_id=license_id, losses=losses)
    except ValueError as error:
        reasons = [str(error)]
    _raise_any(reasons, output)
    place = export.place
    if torch.distributed.get_rank() == 0:
        for note in export.notes:
            logger.info("export_hf=%s: not everything reads it: %s", output, note)
    on_first_rank(lambda: place.open(export.num_bytes), f"export_hf={output}")
    wait_for_folder(place.result)
    try:
        place.run(export.pieces[torch.distributed.get_rank():: torch.distributed.get_world_size()], num_workers=1,
                  report=ignore)
    except CheckpointError as error:
        reasons = [str(error)]
    _raise_any(reasons, output)

    def publish() -> Path:
        assert place.is_finished(export.pieces), "a rank left out a file"
        export.finish()
        return place.publish()

    return on_first_rank(publish, f"export_hf={output}")


def _raise_any(reasons: list[str], output: str) -> None:
    text = from_all_ranks(reasons, "")
    if text:
        raise CheckpointError(f"export_hf={output}: {text}")
