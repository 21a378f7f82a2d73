"""The order of samples and the position in it."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.batches import Batch, BatchIterator, read_token_sequences


class ListDataset:
    """Samples whose first token is their index, for a short sequence."""

    def __init__(self, num_samples, seed=0, seq_length=4):
        generator = torch.Generator().manual_seed(seed)
        self.text = torch.randint(0, 1000, (num_samples, seq_length + 1), generator=generator)
        self.text[:, 0] = torch.arange(num_samples)

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        text = self.text[index]
        length = len(text) - 1
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }


def make(dataset, **changes):
    sizes = {"micro_batch_size": 2, "global_batch_size": 8, "data_parallel_rank": 0, "data_parallel_size": 2}
    return BatchIterator(dataset, **{**sizes, **changes})


def test_batch_holds_what_it_says():
    dataset = ListDataset(8)
    batch = next(make(dataset, data_parallel_rank=1))
    assert batch.sample_ids_B.tolist() == [2, 3] == batch.tokens_BS[:, 0].tolist()
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert batch.document_bounds is None and batch.continued is None
    assert batch.extras_BS == {}
    assert [getattr(batch, f.name).dtype for f in dataclasses.fields(batch)
            if f.name not in ("document_bounds", "extras_BS", "continued")] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
        torch.int64,
    ]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3]] * 2 and bool(batch.loss_mask_BS.all())
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.labels_BS.device.type == "meta"
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.tokens_BS = None


def test_a_batch_says_which_documents_go_on_from_others():
    dataset = ListDataset(8)
    plain = [dataset[index] for index in range(8)]
    samples = [{**sample, "document_bounds": (0, 2, 3, 4), "continued": (0, 0, 0) if index == 3 else ()}
               for index, sample in enumerate(plain)]
    iterator = make(samples, data_parallel_rank=1)
    batch = next(iterator)
    assert batch.continued == ((), (0, 0, 0)) == batch.to("meta").continued
    assert next(iterator).continued is None


def test_each_row_has_the_bounds_of_its_documents():
    dataset = ListDataset(8)
    dataset.text[2:4, 1:] = torch.tensor([[9, 5, 9, 9], [5, 5, 5, 9]])
    batch = next(make(dataset, data_parallel_rank=1, eod_id=9))
    assert batch.tokens_BS.tolist() == [[2, 9, 5, 9], [3, 5, 5, 5]]
    assert batch.document_bounds == ((0, 2, 4), (0, 4))  # an EOD ends its document; one at the end begins none here


def test_order_is_the_documented_one():
    dataset = ListDataset(48)
    size, micro, dp, consumed = 12, 2, 3, 12
    for rank in range(dp):
        iterator = make(
            dataset,
            micro_batch_size=micro,
            global_batch_size=size,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            consumed_samples=consumed,
        )
        assert iterator.num_micro_batches == 2
        for step in range(3):
            for m in range(2):
                expected = [consumed + step * size + m * micro * dp + rank * micro + i for i in range(micro)]
                assert next(iterator).sample_ids_B.tolist() == expected
        assert iterator.consumed_samples == 48
        with pytest.raises(StopIteration):
            next(iterator)


@st.composite
def layouts(draw):
    """Two ways of cutting one global batch, and how many steps each of them runs."""
    cut = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
    first, second = draw(cut), draw(cut)
    size = int(np.lcm(np.prod(first), np.prod(second)))
    return size, first[:2], second[:2], draw(st.integers(0, 3)), draw(st.integers(1, 3))


def run_steps(dataset, size, micro, dp, steps, state=None, consumed=0):
    """Sample ids of each step over all ranks, and the state after them."""
    ids, states = [[] for _ in range(steps)], []
    for rank in range(dp):
        iterator = make(
            dataset,
            micro_batch_size=micro,
            global_batch_size=size,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            consumed_samples=consumed,
        )
        if state is not None:
            iterator.load_state_dict(state)
        for step in range(steps):
            for _ in range(iterator.num_micro_batches):
                ids[step] += next(iterator).sample_ids_B.tolist()
        states.append(iterator.state_dict())
    assert all(other == states[0] for other in states)
    return [sorted(step) for step in ids], states[0]


@settings(max_examples=60)
@given(layouts())
def test_resume_after_a_change_of_layout_is_exact(layout):
    size, (micro_1, dp_1), (micro_2, dp_2), steps_before, steps_after = layout
    dataset = ListDataset(size * (steps_before + steps_after) + size - 1)
    before, state = run_steps(dataset, size, micro_1, dp_1, steps_before)
    after, end = run_steps(dataset, size, micro_2, dp_2, steps_after, state=state)
    whole = [list(range(step * size, (step + 1) * size)) for step in range(steps_before + steps_after)]
    assert before + after == whole
    assert end == run_steps(dataset, size, micro_1, dp_1, steps_before + steps_after)[1]
    assert end["consumed_samples"] == size * (steps_before + steps_after)


def test_batch_size_may_change_between_steps():
    iterator = make(ListDataset(40), data_parallel_size=1)
    ids = [next(iterator).sample_ids_B.tolist() for _ in range(iterator.num_micro_batches)]
    iterator.set_global_batch_size(12)
    ids += [next(iterator).sample_ids_B.tolist() for _ in range(iterator.num_micro_batches)]
    assert sum(ids, []) == list(range(20)) and iterator.consumed_samples == 20
    next(iterator)
    with pytest.raises(ValueError, match="cannot change the global batch size after micro-batch 1 of 6: finish the"):
        iterator.set_global_batch_size(8)
    with pytest.raises(ValueError, match="cannot save the position after micro-batch 1 of 6: finish the step first"):
        iterator.state_dict()
    iterator.set_consumed_samples(4)
    assert next(iterator).sample_ids_B.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 6}, r"global_batch_size=6 must be a multiple of micro_batch_size x data_parallel_size = "
         r"2 x 2 = 4; try 4 or 8"),
        ({"global_batch_size": 2}, r"= 2 x 2 = 4; try 4$"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 and data_parallel_size=2 must be at least 1"),
        ({"data_parallel_rank": 2}, r"data_parallel_rank=2 must lie in 0\.\.1 \(data_parallel_size=2\)"),
        ({"consumed_samples": 41}, r"consumed_samples=41 must lie in 0\.\.40, the samples of the dataset$"),
        ({"consumed_samples": -1}, r"consumed_samples=-1 must lie in 0\.\.40"),
    ],
)  # fmt: skip
def test_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        make(ListDataset(40), **changes)


def test_a_position_in_other_data_is_refused():
    _, state = run_steps(ListDataset(40), 8, 2, 2, 3)
    run_steps(ListDataset(40), 8, 4, 1, 1, state=state)
    with pytest.raises(
        ValueError, match="the 24 samples consumed before the checkpoint are not those of this dataset: "
    ):
        make(ListDataset(40, seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"consumed_samples=24 must lie in 0\.\.16, the samples of the dataset"):
        make(ListDataset(16)).load_state_dict(state)
    with pytest.raises(ValueError, match="data position of version 9, this release reads 1"):
        make(ListDataset(40)).load_state_dict({**state, "version": 9})


def test_token_sequences_are_inputs_and_last_label():
    dataset = ListDataset(6)
    assert np.array_equal(read_token_sequences(dataset, 1, 4), dataset.text[1:4].numpy())
    assert read_token_sequences(dataset, 2, 2).shape == (0, 5)
