"""A dataset of conversations and its mask belong together: what does not is refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.chat.masked import check_masks, has_masks, mask_prefix
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.unit.data.chat.conftest import make_conversations


def test_the_masks_name():
    assert mask_prefix("a/b_conversations") == "a/b_conversations_mask"
    assert mask_prefix("a/b_conversations.shard-3-of-64") == "a/b_conversations_mask.shard-3-of-64"


def test_a_mask_that_is_missing_or_of_other_conversations(prepare, tmp_path):
    assert prepare(make_conversations(6))[0] == prepare(make_conversations(7), prefix="other")[0] == 0
    own, mask = str(tmp_path / "out_conversations"), str(tmp_path / "out_conversations_mask")
    check_masks(own)
    assert has_masks(own) and not has_masks(str(tmp_path / "none"))
    for path, other in zip(dataset_paths(mask), dataset_paths(str(tmp_path / "other_conversations_mask")), strict=True):
        shutil.copy(path, path + ".kept")
        shutil.copy(other, path)
    with pytest.raises(ValueError, match=rf"^{mask} is not the mask of {own}: it was made by another command"):
        check_masks(own)
    with DatasetWriter(mask, vocab_size=2, dtype=np.dtype(np.uint8), is_overwrite_allowed=True) as writer:
        writer.add_documents(np.ones(60), np.full(6, 10))
    with pytest.raises(ValueError, match="or has other lengths; make both again with dsv3 preprocess --sft"):
        check_masks(own)
    for path in dataset_paths(mask)[:2]:
        shutil.move(path, path + ".gone")
    with pytest.raises(ValueError, match=f"^{own} has no mask beside it: {mask}.bin and .idx say which"):
        check_masks(own)
    with DatasetWriter(str(tmp_path / "text"), vocab_size=10) as writer:
        writer.add_documents(np.arange(6), np.array([6]))
    with pytest.raises(ValueError, match="text does not hold conversations: give what dsv3 preprocess --sft made"):
        check_masks(str(tmp_path / "text"))


def test_a_damaged_mask_is_refused_before_it_is_used(prepare, tmp_path):
    assert prepare(make_conversations(6))[0] == 0
    own, mask = str(tmp_path / "out_conversations"), str(tmp_path / "out_conversations_mask")
    (bin_path, idx_path, sidecar), whole = dataset_paths(mask), {}
    for path in (bin_path, idx_path, sidecar):
        whole[path] = Path(path).read_bytes()
    lengths = np.frombuffer(whole[idx_path], "<i4", count=6, offset=34)
    for at, value in ((34 + 24 + 8, 2**40), (34 + 24 + 8, -8)):  # the second offset
        Path(idx_path).write_bytes(whole[idx_path][:at] + value.to_bytes(8, "little", signed=True)
                                   + whole[idx_path][at + 8:])
        with pytest.raises(ValueError, match=rf"{mask}\.idx: sequence 1 has {lengths[1]} tokens from byte {value} on"):
            check_masks(own)
    Path(idx_path).write_bytes(whole[idx_path])
    Path(bin_path).write_bytes(b"\x07" + whole[bin_path][1:])
    Path(sidecar).unlink()
    with pytest.raises(ValueError, match=f"^{mask} holds the value 7, where 1 is a token that counts and 0 one that"):
        check_masks(own)
    own_index = Path(f"{own}.idx").read_bytes()
    Path(f"{own}.idx").write_bytes(own_index[:34] + (-3).to_bytes(4, "little", signed=True) + own_index[38:])
    with pytest.raises(ValueError, match=rf"{own}\.idx: sequence 0 has -3 tokens"):
        check_masks(own)
