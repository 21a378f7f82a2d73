"""What a checkpoint's index says of its tensors, and what reading a damaged one raises."""

from __future__ import annotations

import pickle

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from dsv3_megatron.checkpoint.folder import Manifest

# What reading a damaged file raises: whichever layer meets the damage first.
READ_ERRORS = (CheckpointException, CheckpointingException, OSError, RuntimeError, EOFError, ValueError, KeyError,
                pickle.UnpicklingError)


def saved_tensors(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint, by key."""
    return {key: tuple(entry.size) for key, entry in
            FileSystemReader(manifest.path).read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
