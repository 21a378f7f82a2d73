"""Packed samples: whole conversations with their masks, apart from each other, each once an epoch."""

import itertools

import numpy as np
import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.chat.packed_samples import PackedConversations
from dsv3_megatron.data.checksums import DamagedFileError
from dsv3_megatron.data.current import open_current_data
from dsv3_megatron.data.datasets import build_datasets, dataset_config, open_conversations
from dsv3_megatron.data.identity import data_identity, other_data
from tests.unit.data.chat.written import write_conversations

LENGTHS = [3, 17, 9, 2, 5, 5, 12, 16, 6, 8, 17, 4]
S = 16


@pytest.fixture
def written(tmp_path):
    return str(tmp_path / "chat"), *write_conversations(tmp_path / "chat", LENGTHS)


def unpack(row, length=S):
    """Ids and label masks of each conversation of a row, by its bounds; what is filled is left out."""
    found, ends = [], [*row.bounds[1:-1], length + 1]
    for start, end in zip(row.bounds[:-1], ends, strict=True):
        ids = [token for token in row.ids_S1[start:end].tolist() if token != 1]  # with which rows are filled
        if not ids:
            assert not row.mask_S[start:].any()
            continue
        inside = row.mask_S[start : start + len(ids) - 1]
        assert not row.mask_S[start + len(ids) - 1 : end - 1].any()
        found.append((ids, [0, *inside.astype(int).tolist()]))
        assert not row.mask_S[max(0, start - 1):start].any(), "a label of another conversation counts"
    return found


def trimmed(ids, masks):
    return [(part, [0, *mask[1:]]) for part, mask in zip(ids, masks, strict=True)]


def test_every_epoch_has_each_conversation_once_with_its_mask(written):
    prefix, ids, masks = written
    source = PackedConversations(prefix, (0, len(LENGTHS)), seq_length=S, seed=7)
    assert source.num_conversations == len(LENGTHS) and source.num_tokens == sum(LENGTHS) and not source.num_long
    epochs = []
    for epoch in range(3):
        rows = [source.read(epoch * source.samples_per_epoch + place) for place in range(source.samples_per_epoch)]
        found = [part for row in rows for part in unpack(row)]
        assert sorted(found) == sorted(trimmed(ids, masks))
        epochs.append([row.ids_S1.tolist() for row in rows])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    again = PackedConversations(prefix, (0, len(LENGTHS)), seq_length=S, seed=7)
    assert again.read(5).ids_S1.tolist() == source.read(5).ids_S1.tolist()


def test_what_is_too_long_is_refused_cut_or_dropped(written):
    prefix, ids, masks = written
    share = (0, len(LENGTHS))
    with pytest.raises(ValueError, match=r"chat has 2 conversation\(s\) of more than seq_length \+ 1 = 16 tokens, "
                       r"such as number 1 of 17; give a larger seq_length \(the longest has 17\), or "
                       "long_conversations=cut or drop"):
        PackedConversations(prefix, share, seq_length=15, seed=7)
    cut = PackedConversations(prefix, share, seq_length=15, seed=7, long_conversations="cut")
    dropped = PackedConversations(prefix, share, seq_length=15, seed=7, long_conversations="drop")
    assert (cut.num_long, cut.num_conversations, cut.num_tokens) == (2, 12, sum(LENGTHS) - 2)
    assert (dropped.num_long, dropped.num_conversations, dropped.num_tokens) == (2, 10, sum(LENGTHS) - 34)
    for source, kept in ((cut, lambda n: True), (dropped, lambda n: n != 17)):
        rows = [source.read(place) for place in range(source.samples_per_epoch)]
        found = [part for row in rows for part in unpack(row, 15)]
        expected = [(part[:16], mask[:16]) for part, mask in trimmed(ids, masks) if kept(len(part))]
        assert sorted(found) == sorted(expected)
    with pytest.raises(ValueError, match="has no conversation of at most seq_length"):
        PackedConversations(prefix, (1, 2), seq_length=15, seed=7, long_conversations="drop")


def run_of(prefix, **changes):
    return preset("tiny").override(**{
        "data_path": [prefix], "sft": True, "seq_length": S, "vocab_size": 48, "split": "75,25,0", "eval_iters": 1,
        "micro_batch_size": 2, "global_batch_size": 2, **changes})


def test_batches_have_bounds_positions_and_masks_of_the_conversations(written):
    prefix, *_ = written
    run = run_of(prefix)
    run.validate(1)
    data = build_datasets(dataset_config(run))
    batch = next(BatchIterator(data.train, micro_batch_size=2, global_batch_size=2))
    for row, bounds in enumerate(batch.document_bounds):
        assert bounds[0] == 0 and bounds[-1] == S and list(bounds) == sorted(set(bounds))
        for start, end in itertools.pairwise(bounds):
            assert batch.position_ids_BS[row, start:end].tolist() == list(range(end - start))
            assert end == S or not batch.loss_mask_BS[row, end - 1]
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1]) and batch.loss_mask_BS.sum() > 0
    assert len(data.valid) == 2, "a global batch"


def test_blends_and_identity(written, tmp_path):
    prefix, *_ = written
    other = str(tmp_path / "other")
    write_conversations(other, [4, 6, 8], seed=1)
    run = run_of(prefix, data_path=["3", prefix, "1", other], eval_interval=0)
    data = open_current_data(run, run.recipe().phases[0], 0)
    rows = [data.train[index]["tokens"].tolist() for index in range(8)]
    alone = PackedConversations(other, (0, 2), seq_length=S, seed=run.training.seed, number=1)
    assert sum(row == alone.read(0).ids_S1[:-1].tolist() for row in rows) == 2
    mine = data_identity(dataset_config(run), run.data)
    assert len(mine["masks"]) == 2 and not other_data(mine, mine)
    changed = data_identity(dataset_config(run.override(long_conversations="cut")), run.override(
        long_conversations="cut").data)
    assert other_data(changed, mine) == ["long_conversations=cut (checkpoint: refuse)"]
    assert other_data({**mine, "masks": ["0", "1"]}, mine)[0].startswith("masks=['0', '1'] (checkpoint: [")


def test_conversations_and_texts_are_not_taken_for_each_other(written):
    prefix, *_ = written
    with pytest.raises(ValueError, match=r"chat holds conversations, of which only what their masks say is to be "
                       r"learnt; give sft \(dsv3 sft\), or other data"):
        dataset_config(run_of(prefix, sft=False))
    with pytest.raises(ValueError, match="chat_mask does not hold conversations|chat_mask has no mask beside it"):
        dataset_config(run_of(f"{prefix}_mask"))


@pytest.mark.parametrize(("changes", "text"), [
    ({"reset_attention_mask": True}, "reset_attention_mask=True cannot go with sft=True: conversations are kept apart"),
    ({"eod_mask_loss": True}, "eod_mask_loss=True cannot go with sft=True"),
    ({"long_conversations": "keep"}, "long_conversations='keep' must be one of refuse, cut, drop"),
    ({"sft": False, "long_conversations": "cut"}, "long_conversations=cut is about conversations; give sft too, or"),
    ({"transformer_impl": "transformer_engine"}, "sft=True cannot go with transformer_impl=transformer_engine"),
])
def test_settings_that_do_not_go_together(changes, text):
    with pytest.raises(ConfigError) as error:
        run_of("chat", **changes).validate(1)
    assert str(error.value).startswith(text)


def test_a_conversation_longer_than_a_group_of_steps_is_read_where_it_lies(tmp_path):
    ids, masks = write_conversations(tmp_path / "long", [100, 50, 60], seed=3)
    source = PackedConversations(str(tmp_path / "long"), (1, 3), seq_length=120, seed=1)
    (part_a, part_b), *_ = [unpack(source.read(place), 120) for place in range(source.samples_per_epoch)]
    assert sorted([part_a, part_b]) == sorted(trimmed(ids[1:], masks[1:]))
    assert np.count_nonzero(source.read(0).mask_S) == sum(map(sum, (mask[1:] for mask in masks[1:])))


@pytest.mark.parametrize("name", ["chat.bin", "chat_mask.bin"])
def test_a_flipped_bit_is_found_where_it_is_read_unless_it_is_not_looked_for(written, tmp_path, name):
    prefix = written[0]
    content = bytearray((tmp_path / name).read_bytes())
    content[0] ^= 1
    (tmp_path / name).write_bytes(content)
    share = (0, len(LENGTHS))
    proved = PackedConversations(prefix, share, seq_length=S, seed=0, long_conversations="drop")
    with pytest.raises(DamagedFileError, match=name):
        [proved.read(index) for index in range(proved.samples_per_epoch)]
    config = dataset_config(run_of(prefix, long_conversations="drop", verify_files="none"))
    as_it_is = open_conversations(config, config.blend, (0.0, 1.0))[0]
    assert all(len(as_it_is.read(index).ids_S1) == S + 1 for index in range(proved.samples_per_epoch))
