"""--data-path and the checks before a run."""

import numpy as np
import pytest

from dsv3_megatron.data.blend import (
    Blend,
    check_data,
    parse_blend,
    parse_validation_sets,
    read_tokenizer_fingerprint,
    read_vocab_size,
)
from dsv3_megatron.data.indexed_writer import DatasetWriter


def write(prefix, tokens=(1, 2, 3), vocab_size=400, fingerprint="f" * 64):
    with DatasetWriter(prefix, vocab_size=vocab_size, tokenizer_fingerprint=fingerprint) as writer:
        writer.add_documents(np.array(tokens), np.array([len(tokens)]))
    return str(prefix)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("a", Blend(("a",))),
        (["a", "b.bin"], Blend(("a", "b"))),
        (["a", "b", "c.idx"], Blend(("a", "b", "c"))),
        (["0.3", "a", "7", "b"], Blend(("a", "b"), (0.3, 7.0))),
        (["30", "./5"], Blend(("./5",), (30.0,))),
    ],
)
def test_parse_blend(arguments, expected):
    assert parse_blend(arguments) == expected


def test_megatron_reads_the_same_blend():
    utils = pytest.importorskip("megatron.core.datasets.utils")
    for arguments in (["a"], ["a", "b", "c"], ["0.3", "a", "7", "b"]):
        blend = parse_blend(arguments)
        weights = None if blend.weights is None else list(blend.weights)
        assert (list(blend.prefixes), weights) == utils.get_blend_from_list(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data_path is empty: give PREFIX, or WEIGHT PREFIX"),
        (["a", "1", "b"], r"data_path=a 1 b mixes weights and prefixes: give PREFIX \.\.\., or a weight before every"),
        (["1", "a", "b", "c"], "data_path=1 a b c mixes weights and prefixes"),
        (["1", "2"], "a prefix that is a number needs a ./ before it"),
        (["-1", "a"], r"data_path: the weight -1\.0 of a must be a positive number"),
        (["nan", "a"], r"data_path: the weight nan of a must be a positive number"),
    ],
)
def test_parse_blend_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("a", {"": Blend(("a",))}),
        (["0.3", "a", "7", "b"], {"": Blend(("a", "b"), (0.3, 7.0))}),
        (["data/a=b", "./c=d"], {"": Blend(("data/a=b", "./c=d"))}),
        (["code=a.bin", "web-2.x=/data/b"], {"code": Blend(("a",)), "web-2.x": Blend(("/data/b",))}),
        (["all=a", "b", "mixed=0.3", "a", "7", "b", "c=d=e"],
         {"all": Blend(("a", "b")), "mixed": Blend(("a", "b"), (0.3, 7.0)), "c": Blend(("d=e",))}),
    ],
)
def test_parse_validation_sets(arguments, expected):
    found = parse_validation_sets(arguments)
    assert found == expected and list(found) == list(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "valid_data_path is empty: give PREFIX, or WEIGHT PREFIX"),
        (["a", "web=b"], r"valid_data_path=a web=b gives a name to some \(web=\) and none to a: give each"),
        (["web=a", "code=b", "web=c"], "gives the name web twice; give each validation set its own"),
        (["web="], "valid_data_path of web is empty: give PREFIX"),
        (["web=0.5", "a", "b"], "valid_data_path of web=0.5 a b mixes weights and prefixes"),
        (["web=-1", "a"], r"valid_data_path of web: the weight -1\.0 of a must be a positive number"),
    ],
)
def test_parse_validation_sets_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_validation_sets(arguments)


def test_vocabulary_is_checked_before_a_run(tmp_path):
    prefix = write(tmp_path / "d")
    assert read_vocab_size(prefix) == 400
    check_data([prefix], vocab_size=400)
    with pytest.raises(ValueError) as error:
        check_data([prefix], vocab_size=399)
    assert str(error.value) == (
        f"vocabulary of the data (400) larger than the model's (399): {prefix} holds ids up to 399; set vocab_size to "
        "at least 400, or preprocess with a smaller tokenizer"
    )
    (tmp_path / "d.json").unlink()  # another tool's dataset: the ids themselves are read
    assert read_vocab_size(prefix) == 4
    check_data([prefix], vocab_size=4)
    with pytest.raises(ValueError, match=r"vocabulary of the data \(4\) larger than the model's \(3\)"):
        check_data([prefix], vocab_size=3)


def test_tokenizer_is_checked_before_a_run(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", fingerprint="e" * 64)
    assert read_tokenizer_fingerprint([first]) == "f" * 64
    check_data([first], vocab_size=400, tokenizer_fingerprint="f" * 64)
    with pytest.raises(
        ValueError, match=r"the data was made by tokenizer ffffffffffff, the run's tokenizer_model is 0+:"
    ):
        check_data([first], vocab_size=400, tokenizer_fingerprint="0" * 64)
    with pytest.raises(
        ValueError, match=r"made by different tokenizers \(.*/a by ffffffffffff, .*/b by eeeeeeeeeeee\)"
    ):
        check_data([first, second], vocab_size=400)
    (tmp_path / "b.json").unlink()
    check_data([first, second], vocab_size=400, tokenizer_fingerprint="f" * 64)
    assert read_tokenizer_fingerprint([second]) is None


def test_missing_data_names_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"data file .*/no\.idx does not exist \(data_path=.*/no: the prefix, without"):
        check_data([str(tmp_path / "no")], vocab_size=400)
