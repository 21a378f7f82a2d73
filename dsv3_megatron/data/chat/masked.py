"""Datasets of conversations: the ids, and beside them as a dataset of its own what counts of them.

`dsv3 preprocess --sft` writes PREFIX_conversations and PREFIX_conversations_mask, both in Megatron-Core's format. The
second has a sequence for each of the first's, as long, of ones (the assistant's tokens, which count) and zeros. A run
is given the first; the second is found by its name. No torch here.
"""

from __future__ import annotations

import os
import re

import numpy as np

from dsv3_megatron.data.contents import read_contents, require_index
from dsv3_megatron.data.indexed import dataset_paths, map_index, read_header, read_sidecar

CONVERSATIONS, MASKS = "conversations", "conversations_mask"
MASK_DTYPE, MASK_VALUES = np.dtype(np.uint8), 2
_MASK, _SHARD = "_mask", r"(\.shard-\d+-of-\d+)?$"
_COMPARED_AT_A_TIME = 1 << 20
_WAY_OUT = "make both again with dsv3 preprocess --sft"


def mask_prefix(prefix: str) -> str:
    """Path of the dataset that says what counts of another one, without suffix."""
    return re.sub(_SHARD, rf"{_MASK}\1", prefix, count=1)


def has_masks(prefix: str) -> bool:
    """Whether a dataset is one of conversations, by its sidecar.

    Raises:
        ValueError: the sidecar is damaged.
    """
    sidecar = read_sidecar(prefix)
    return sidecar is not None and sidecar.options.get("level") == "conversation"


def check_masks(prefix: str, *, cache_dir: str | None = None) -> None:
    """Check that a dataset is one of conversations, that its mask is of it, and both indices in whole.

    Args:
        prefix: Path of the conversations, without suffix.
        cache_dir: Folder of what `contents.read_contents` finds of a mask without a sidecar; None: beside the data.

    Raises:
        ValueError: the dataset is another one or damaged, or the mask is missing, damaged, or of other conversations.
    """
    if not has_masks(prefix):
        raise ValueError(f"{prefix} does not hold conversations: give what dsv3 preprocess --sft made, or leave "
                         "sft off for a run on texts")
    masks = mask_prefix(prefix)
    own, other = read_sidecar(prefix), read_sidecar(masks)
    assert own is not None
    if not all(map(os.path.isfile, dataset_paths(masks)[:2])):
        raise ValueError(f"{prefix} has no mask beside it: {masks}.bin and .idx say which of its tokens count; copy "
                         f"them too (of merged shards: merge those of the masks), or {_WAY_OUT}")
    require_index(prefix)
    require_index(masks)
    header = read_header(masks)
    jobs = {sidecar.options.get("job") for sidecar in (own, other) if sidecar is not None}
    if header.dtype != MASK_DTYPE or len(jobs) > 1 or not _same_lengths(prefix, masks):
        raise ValueError(f"{masks} is not the mask of {prefix}: it was made by another command, or has other "
                         f"lengths; {_WAY_OUT}")
    highest = read_contents(masks, cache_dir=cache_dir).highest_id if other is None else other.max_token_id
    if highest >= MASK_VALUES:
        raise ValueError(f"{masks} holds the value {highest}, where 1 is a token that counts and 0 one that does not; "
                         f"{_WAY_OUT}")


def _same_lengths(prefix: str, masks: str) -> bool:
    if read_header(prefix).num_sequences != read_header(masks).num_sequences:
        return False
    own, other = map_index(prefix).lengths_Q, map_index(masks).lengths_Q
    return all(np.array_equal(own[at: at + _COMPARED_AT_A_TIME], other[at: at + _COMPARED_AT_A_TIME])
               for at in range(0, len(own), _COMPARED_AT_A_TIME))
