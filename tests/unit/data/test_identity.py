"""What two runs' data differ in, in words; what a run's identity is made of is tested with resumed runs."""

from typing import Any

from dsv3_megatron.data.identity import other_data


def identity(**changes: Any) -> dict[str, Any]:
    dataset = {"name": "train", "sequences": 22, "idx_sha256": "1" * 64, "bin_sha256": "abcdef0123" * 6}
    return {"order": 1, "seed": 5, "weights": None, "datasets": [dataset], "tokenizer": "t" * 64, **changes}


def test_equal_data():
    assert other_data(identity(), identity()) == []


def test_a_file_under_another_name_is_the_same_data():
    moved = [{**identity()["datasets"][0], "name": "moved"}]
    assert other_data(identity(datasets=moved), identity()) == []


def test_another_file_is_named():
    other = [{**identity()["datasets"][0], "name": "other", "sequences": 7, "bin_sha256": "9" * 64}]
    assert other_data(identity(datasets=other), identity()) == [
        "the data are other of 7 sequences, hash 99999999 (checkpoint: train of 22 sequences, hash abcdef01)"]


def test_every_difference_is_told():
    assert other_data(identity(seed=6, weights=[0.5, 0.5]), identity()) == [
        "seed=6 (checkpoint: 5)", "weights=[0.5, 0.5] (checkpoint: None)"]
    assert other_data(identity(tokenizer="u" * 64), identity()) == [f"tokenizer={'u' * 12} (checkpoint: {'t' * 12})"]


def test_a_tokenizer_that_one_does_not_know_does_not_differ():
    assert other_data(identity(tokenizer=None), identity()) == other_data(identity(), identity(tokenizer=None)) == []


def test_what_a_checkpoint_does_not_say_differs():
    theirs = identity()
    del theirs["seed"]
    assert other_data(identity(), theirs) == ["seed=5 (checkpoint: None)"]
