"""Datasets over our files: what a sample is, in which order they come, what is checked."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.batches import BatchIterator, read_token_sequences
from dsv3_megatron.data.blend import parse_blend
from dsv3_megatron.data.datasets import DatasetConfig, build_datasets, dataset_config, parse_split
from dsv3_megatron.data.indexed_writer import DatasetWriter

EOD = {"eod_id": 1}  # what `write` ends documents with


def write(prefix, num_documents=40, first_id=0, length=25, **keywords):
    """Documents of consecutive ids, so that a sample shows where it came from; the end of each is id 1."""
    ids = np.arange(2 + first_id, 2 + first_id + num_documents * length)
    ids[length - 1 :: length] = 1
    with DatasetWriter(prefix, vocab_size=5000, **keywords) as writer:
        writer.add_documents(ids, np.full(num_documents, length))
    return os.fspath(prefix)


def config(tmp_path, **changes):
    common = {"seq_length": 16, "seed": 3, "num_train_samples": 50}
    return DatasetConfig(**{**common, **changes})


def test_samples_are_packed_documents_with_every_token_counted(tmp_path):
    prefix = write(tmp_path / "d")
    data = build_datasets(config(tmp_path, train_blend=parse_blend(prefix), valid_blend=parse_blend(prefix)))
    assert len(data.train) >= 50 and len(data.valid) == (40 * 25 - 1) // 16
    rows = read_token_sequences(data.valid, 0, len(data.valid))
    assert rows.shape == (len(data.valid), 17)
    stream = [2 + i if (i + 1) % 25 else 1 for i in range(1000)]
    documents = {tuple(stream[i : i + 25]) for i in range(0, 1000, 25)}
    batch = next(BatchIterator(data.train, micro_batch_size=50, global_batch_size=50))
    assert bool((batch.loss_mask_BS == 1).all()) and batch.position_ids_BS[7].tolist() == list(range(16))
    assert bool((batch.tokens_BS[:, 1:] == batch.labels_BS[:, :-1]).all())
    for row in rows.tolist():  # inside a document ids follow each other; after its end another one starts
        for a, b in zip(row, row[1:], strict=False):
            assert b in (a + 1, 1) if a != 1 else any(document[0] == b for document in documents)
    assert any(1 in row[:-1] for row in rows.tolist())


def test_positions_restart_and_losses_are_masked_after_an_eod(tmp_path):
    prefix = write(tmp_path / "d", length=7)
    blend = {"train_blend": parse_blend(prefix), "num_train_samples": 17}

    def batch(cut_after=None, **changes):
        data = build_datasets(config(tmp_path, **blend, **changes)).train
        sizes = {"micro_batch_size": 17, "global_batch_size": 17}
        return next(BatchIterator(data, **sizes, eod_id=cut_after))

    plain = batch()
    isolated = batch(cut_after=1, reset_position_ids=True, eod_mask_loss=True, **EOD)
    # No token moves: the order of samples and their content are those of a run without the switches.
    assert plain.document_bounds is None
    assert torch.equal(isolated.tokens_BS, plain.tokens_BS) and torch.equal(isolated.labels_BS, plain.labels_BS)
    assert torch.equal(isolated.loss_mask_BS, (plain.tokens_BS != 1).float()) and bool((plain.loss_mask_BS == 1).all())
    assert (plain.tokens_BS[:, -1] == 1).any()  # a document that ends where the sample does
    for tokens, positions, bounds in zip(isolated.tokens_BS.tolist(), isolated.position_ids_BS.tolist(),
                                         isolated.document_bounds, strict=True):
        starts = [0] + [s for s in range(1, 16) if tokens[s - 1] == 1]
        assert bounds == (*starts, 16) and len(bounds) >= 3
        assert positions == [s - max(start for start in starts if start <= s) for s in range(16)]
    assert batch(cut_after=1).document_bounds == isolated.document_bounds
    only_positions, only_mask = batch(reset_position_ids=True, **EOD), batch(eod_mask_loss=True, **EOD)
    assert torch.equal(only_positions.position_ids_BS, isolated.position_ids_BS)
    assert torch.equal(only_positions.loss_mask_BS, plain.loss_mask_BS) and only_positions.document_bounds is None
    assert torch.equal(only_mask.position_ids_BS, plain.position_ids_BS)
    assert torch.equal(only_mask.loss_mask_BS, isolated.loss_mask_BS)
    assert isolated.to("meta").document_bounds == isolated.document_bounds


def test_a_run_with_switches_reads_the_eod_from_its_data(tmp_path):
    prefix = write(tmp_path / "d", options={"append_eod": True, "eod_id": 1})
    run = preset("tiny").override(data_path=[prefix], seq_length=16, split="90,10,0")
    assert dataset_config(run).eod_id is None
    for flag in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"):
        made = dataset_config(run.override(**{flag: True}))
        assert made.eod_id == 1
        assert made.reset_position_ids == (flag == "reset_position_ids")
        assert made.eod_mask_loss == (flag == "eod_mask_loss")
    bare = write(tmp_path / "bare", options={"append_eod": False, "eod_id": 1})
    with pytest.raises(ValueError, match="bare was made without --append-eod: make it again"):
        dataset_config(run.override(eod_mask_loss=True, data_path=["1", prefix, "1", bare]))


def test_split_keeps_documents_apart(tmp_path):
    prefix = write(tmp_path / "d")
    data = build_datasets(config(tmp_path, blend=parse_blend(prefix), split="8,1,1"))
    train = set(read_token_sequences(data.train, 0, len(data.train)).ravel().tolist())
    valid = set(read_token_sequences(data.valid, 0, len(data.valid)).ravel().tolist())
    assert train & valid == {1}
    assert max(train) < 2 + 32 * 25 <= min(valid - {1}) and max(valid) < 2 + 36 * 25
    assert build_datasets(config(tmp_path, blend=parse_blend(prefix), split="1")).valid is None


def test_weighted_blend_draws_in_proportion(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", first_id=2000)
    blend = parse_blend(["3", first, "1", second])
    data = build_datasets(config(tmp_path, num_train_samples=200, num_valid_samples=8, blend=blend, split="90,10"))
    rows = read_token_sequences(data.train, 0, 200)
    assert (rows.max(axis=1) < 2000).sum() == 150
    assert len(data.valid) == 8
    with pytest.raises(ValueError, match=r"data_path has weights, so one pass over it is not defined: set num_valid_"):
        config(tmp_path, blend=blend)


def test_several_prefixes_without_weights_are_read_in_proportion_to_their_sizes(tmp_path):
    """As often as a run wants, each sample of each once an epoch of all."""
    first, second = write(tmp_path / "a"), write(tmp_path / "b", first_id=2000, num_documents=20)
    data = build_datasets(config(tmp_path, train_blend=parse_blend([first, second]), num_train_samples=None)).train
    epoch = 999 // 16 + 499 // 16
    for start in (0, epoch, 7 * epoch):
        rows = [tuple(row) for row in read_token_sequences(data, start, start + epoch).tolist()]
        assert len(set(rows)) == epoch and sum(max(row) < 2000 for row in rows) == 999 // 16


def test_order_is_a_function_of_the_seed(tmp_path):
    prefix = write(tmp_path / "d")

    def rows(**changes):
        made = config(tmp_path, train_blend=parse_blend(prefix), **changes)
        return read_token_sequences(build_datasets(made).train, 0, 50)

    first = rows()
    assert np.array_equal(first, rows())
    for length in (60, 500, 100_000, None):  # one epoch, eight, very many
        assert np.array_equal(first, rows(num_train_samples=length))
    assert not np.array_equal(first, rows(seed=4))


def test_nothing_is_written_beside_the_data(tmp_path):
    prefix = write(tmp_path / "d")
    before = sorted(tmp_path.rglob("*"))
    build_datasets(config(tmp_path, blend=parse_blend(prefix), split="8,2")).train[17]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_position_survives_a_rebuild_and_notices_another_order(tmp_path):
    prefix = write(tmp_path / "d")
    sizes = {"micro_batch_size": 2, "global_batch_size": 4}
    blend = {"train_blend": parse_blend(prefix)}
    iterator = BatchIterator(build_datasets(config(tmp_path, **blend)).train, **sizes)
    for _ in range(4):
        next(iterator)
    state, following = iterator.state_dict(), next(iterator)
    again = BatchIterator(build_datasets(config(tmp_path, **blend)).train, **sizes)
    again.load_state_dict(state)
    assert bool((next(again).tokens_BS == following.tokens_BS).all())
    longer = BatchIterator(build_datasets(config(tmp_path, **blend, num_train_samples=200)).train, **sizes)
    longer.load_state_dict(state)  # 200 samples are four epochs, shuffled one by one
    assert bool((next(longer).tokens_BS == following.tokens_BS).all())
    other = BatchIterator(build_datasets(config(tmp_path, **blend, seed=4)).train, **sizes)
    with pytest.raises(ValueError, match="the 8 samples consumed before the checkpoint are not those of this data"):
        other.load_state_dict(state)


def test_validation_sets_by_name(tmp_path):
    """Each is what it would be as the one validation set; the first stands where one is asked for."""
    train, *prefixes = [write(tmp_path / name, first_id=number * 1100) for number, name in enumerate("tab")]
    run = preset("tiny").override(seq_length=16, global_batch_size=4, eval_iters=2, data_path=[train])
    weighted = ["0.7", prefixes[0], "0.3", prefixes[1]]
    sets = {"a": prefixes[:1], "both": weighted, "b": prefixes[1:]}
    words = [word for name, (first, *rest) in sets.items() for word in (f"{name}={first}", *rest)]
    data = build_datasets(dataset_config(run.override(valid_data_path=words)))
    assert list(data.named_valid) == ["a", "both", "b"] and data.valid is data.named_valid["a"]
    for name, given in sets.items():
        alone = build_datasets(dataset_config(run.override(valid_data_path=given)))
        assert alone.named_valid == {} and len(alone.valid) == len(data.named_valid[name]) == 8
        rows = [read_token_sequences(samples, 0, 8) for samples in (alone.valid, data.named_valid[name])]
        assert (rows[0] == rows[1]).all()
        assert (read_token_sequences(alone.train, 0, 20) == read_token_sequences(data.train, 0, 20)).all()
    assert dataset_config(run.override(valid_data_path=words)).prefixes == (train, *prefixes)
    with pytest.raises(ValueError, match="absent.idx"):
        build_datasets(dataset_config(run.override(valid_data_path=[f"a={prefixes[0]}", f"c={tmp_path}/absent"])))


def blended(tmp_path, kind):
    """Three prefixes in one blend, cut by a split; or with blends of their own for training and validation."""
    prefixes = [write(tmp_path / name, first_id=number * 1100, num_documents=40 - number)
                for number, name in enumerate("abc")]
    weighted = parse_blend([word for pair in zip("523", prefixes, strict=True) for word in pair])
    common = {"num_train_samples": 150, "num_valid_samples": 24}
    if kind == "split":
        return config(tmp_path, blend=weighted, split="80,15,5", **common)
    return config(tmp_path, train_blend=weighted, valid_blend=parse_blend(prefixes[1:]), **common)


@pytest.mark.parametrize("kind", ["split", "own validation data"])
def test_a_blend_goes_on_exactly_under_another_data_parallel_size(tmp_path, kind):
    """Three prefixes with weights: 4 steps on 1 rank, 3 on 4, 4 on 2 are what 11 steps on 2 are, token by token."""
    made = blended(tmp_path, kind)

    def steps(state, num_steps, micro, dp):
        """All tokens of each step, by sample id, and the position after them; datasets are built anew."""
        data, found, states = build_datasets(made).train, [{} for _ in range(num_steps)], []
        for rank in range(dp):
            iterator = BatchIterator(data, micro_batch_size=micro, global_batch_size=12, data_parallel_rank=rank,
                                     data_parallel_size=dp, eod_id=1)
            if state is not None:
                iterator.load_state_dict(state)
            for step in found:
                for _ in range(iterator.num_micro_batches):
                    batch = next(iterator)
                    rows = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], dim=1).tolist()
                    step |= dict(zip(batch.sample_ids_B.tolist(), zip(rows, batch.document_bounds, strict=True),
                                     strict=True))
            states.append(iterator.state_dict())
        assert all(other == states[0] for other in states)
        return found, states[0]

    whole, end = steps(None, 11, 3, 2)
    assert [sorted(step) for step in whole] == [list(range(12 * n, 12 * n + 12)) for n in range(11)]
    parts, state = [], None
    for num_steps, micro, dp in ((4, 4, 1), (3, 1, 4), (4, 2, 2)):
        found, state = steps(state, num_steps, micro, dp)
        parts += found
    assert parts == whole and state == end and state["consumed_samples"] == 132
    sources = np.array([max(row) // 1100 for step in whole for row, _ in step.values()])
    assert np.abs(np.bincount(sources, minlength=3) - 132 * np.array([0.5, 0.2, 0.3])).max() < 2
    other = dataclasses.replace(made, **{"blend" if kind == "split" else "train_blend": parse_blend(
        [word for pair in zip("523", made.prefixes[::-1], strict=True) for word in pair])})
    with pytest.raises(ValueError, match="the 132 samples consumed before the checkpoint are not those of this data"):
        BatchIterator(build_datasets(other).train, micro_batch_size=1, global_batch_size=12).load_state_dict(state)


def test_validation_of_a_blend_reads_its_own_share(tmp_path):
    """The documents of each prefix are cut by the split: training, validation and test share none of them."""
    data = build_datasets(blended(tmp_path, "split"))
    tokens = {name: set(read_token_sequences(part, 0, len(part)).ravel().tolist()) - {1}
              for name, part in (("train", data.train), ("valid", data.valid))}
    assert len(data.valid) >= 24 and not tokens["train"] & tokens["valid"]
    for number in range(3):
        num_documents = 40 - number
        first, last = (round(share * num_documents) for share in (0.8, 0.95))
        of_prefix = {name: {token - 2 - 1100 * number for token in ids if token // 1100 == number}
                     for name, ids in tokens.items()}
        assert of_prefix["train"] and max(of_prefix["train"]) < first * 25
        assert of_prefix["valid"] and first * 25 <= min(of_prefix["valid"])
        assert max(of_prefix["valid"]) < last * 25 < num_documents * 25


@pytest.mark.parametrize(
    ("split", "shares"), [("969,30,1", (0.969, 0.03, 0.001)), ("1", (1, 0, 0)), ("98, 2", (0.98, 0.02, 0))]
)
def test_parse_split(split, shares):
    assert parse_split(split) == pytest.approx(shares)


def test_parse_split_errors():
    with pytest.raises(
        ValueError, match=r"split='a,b' is not a list of numbers; give shares of train, valid and test,"
    ):
        parse_split("a,b")
    for split in ("0,1,1", "1,-1", "1,2,3,4", "nan"):
        with pytest.raises(ValueError, match=r"must be one to three numbers, none negative, the first positive; give"):
            parse_split(split)


def test_config_errors(tmp_path):
    blend = parse_blend("d")
    for changes, message in [
        ({}, "neither of data_path and train_data_path given: give data_path"),
        ({"blend": blend, "train_blend": blend}, "both of data_path and train_data_path given"),
        ({"blend": blend, "valid_blend": blend}, "valid_data_path goes with train_data_path, not with data_path"),
        ({"blend": blend, "eod_mask_loss": True}, "reset_position_ids and eod_mask_loss need eod_id, the token that"),
        ({"blend": blend, "reset_position_ids": True}, "reset_position_ids and eod_mask_loss need eod_id, the token"),
        ({"blend": blend, "seq_length": 0}, "seq_length=0 must be at least 1"),
        ({"blend": blend, "num_train_samples": 0}, "num_train_samples=0 must be at least 1"),
        ({"blend": blend, "num_valid_samples": 0}, "num_valid_samples=0 must be at least 1, or None for one pass"),
        ({"blend": blend, "split": "x"}, "split='x' is not a list of numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **changes)
    assert config(tmp_path, train_blend=parse_blend(["a", "b"]), valid_blend=parse_blend("a")).prefixes == ("a", "b")


def test_data_errors(tmp_path):
    prefix = write(tmp_path / "d", num_documents=4, length=3)
    with pytest.raises(ValueError, match=r"data file .*/no\.idx does not exist \(data_path=.*/no: the prefix"):
        build_datasets(config(tmp_path, train_blend=parse_blend(str(tmp_path / "no"))))
    with pytest.raises(
        ValueError, match=r"d has 4 documents \(12 tokens in all\) for training, fewer than one sample of"
    ):
        build_datasets(config(tmp_path, train_blend=parse_blend(prefix)))
    with pytest.raises(
        ValueError, match=r"d has 0 documents \(12 tokens in all\) for validation, fewer than one sample"
    ):
        build_datasets(config(tmp_path, seq_length=4, blend=parse_blend(prefix)))
    with pytest.raises(ValueError, match=r"the validation data holds no whole sample of seq_length=4: use more"):
        build_datasets(config(tmp_path, seq_length=4, blend=parse_blend(prefix), split="3,1"))


_WORKER = """
import sys
import torch.distributed as dist
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.blend import parse_blend
from dsv3_megatron.data.datasets import DatasetConfig, build_datasets

def main():
    rank, folder, prefix = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    made = DatasetConfig(16, 3, 50, train_blend=parse_blend(prefix), valid_blend=parse_blend(prefix))
    data = build_datasets(made)
    batches = BatchIterator(data.train, micro_batch_size=1, global_batch_size=4, data_parallel_rank=rank,
                            data_parallel_size=2)
    for _ in range(4):
        batch = next(batches)
        print(batch.sample_ids_B.tolist()[0], *batch.tokens_BS[0].tolist())
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.mark.distributed
def test_two_processes_split_the_step(tmp_path):
    prefix = write(tmp_path / "d")
    command = [sys.executable, "-W", "ignore", "-c", _WORKER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), prefix], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    rows = sorted([int(part) for part in line.split()] for output in printed for line in output.splitlines())
    alone = build_datasets(config(tmp_path, train_blend=parse_blend(prefix))).train
    assert rows == [[i, *alone[i]["tokens"].tolist()] for i in range(8)]
