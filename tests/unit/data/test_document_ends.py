"""Which token ends a document, whether the data's documents end with it, and where it cuts a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.document_ends import document_bounds, named_eod_id, resolve_eod_id, restarted_positions
from dsv3_megatron.data.encoder import HuggingFaceEncoder
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.preprocess import PreprocessOptions, preprocess
from dsv3_megatron.data.reading.inputs import expand_inputs

FLAGS = ("reset_attention_mask",)
MADE = {"append_eod": True, "eod_id": 1}


def write(prefix, documents=((5, 6, 1), (7, 1)), options=MADE, **keywords):
    with DatasetWriter(prefix, vocab_size=400, options=options, **keywords) as writer:
        writer.add_documents(np.concatenate(documents), np.array([len(document) for document in documents]))
    return str(prefix)


def resolve(*prefixes, tokenizer_model=None, flags=FLAGS):
    return resolve_eod_id(prefixes, tokenizer_model=tokenizer_model, flags=flags)


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_bounds_are_those_of_the_definition(rows):
    bounds = document_bounds(np.array(rows), 0)
    for tokens, starts in zip(rows, bounds, strict=True):
        assert all(type(start) is int for start in starts)
        assert starts == (0, *(s for s in range(1, 9) if tokens[s - 1] == 0), 9)
        positions = restarted_positions(starts).tolist()
        assert positions == [s - max(start for start in starts if start <= s) for s in range(9)]


def test_the_sidecar_says_which_token_it_is(tmp_path):
    assert resolve(write(tmp_path / "a")) == 1
    assert resolve(write(tmp_path / "b", [(5, 1), (), (1,)]), tmp_path / "a") == 1
    assert resolve(write(tmp_path / "c", [(5, 9)], {"append_eod": True, "eod_id": 9})) == 9
    with DatasetWriter(tmp_path / "empty", vocab_size=400, options=MADE):
        pass
    assert resolve(str(tmp_path / "empty")) == 1


def test_what_preprocessing_wrote_is_accepted_or_refused(tmp_path, jsonl_file, tokenizer_dir):
    encoder = HuggingFaceEncoder(tokenizer_dir)
    for is_eod_appended in (True, False):
        options = PreprocessOptions(expand_inputs([str(jsonl_file)]), ("text",), f"{tmp_path}/{is_eod_appended}",
                                    is_eod_appended)
        preprocess(options, encoder)
    assert resolve(f"{tmp_path}/True_text_document") == encoder.eod_id
    prefix = f"{tmp_path}/False_text_document"
    with pytest.raises(ValueError) as error:
        resolve(prefix, tokenizer_model=tokenizer_dir, flags=("reset_attention_mask", "eod_mask_loss"))
    assert str(error.value) == (
        f"reset_attention_mask and eod_mask_loss need documents that end with an EOD token, and {prefix} was made "
        "without --append-eod: make it again with dsv3 preprocess --append-eod, or leave reset_attention_mask "
        "and eod_mask_loss off"
    )


def test_without_a_sidecar_the_tokenizer_says_it(tmp_path, tokenizer_dir):
    """Its end-of-sentence token has id 1."""
    silent = [write(tmp_path / "silent", options={})]
    another_tools = write(tmp_path / "other")
    (tmp_path / "other.json").unlink()
    for prefix in (*silent, another_tools):
        assert resolve(prefix, tokenizer_model=tokenizer_dir) == 1
        with pytest.raises(ValueError) as error:
            resolve(prefix)
        assert str(error.value) == (
            f"reset_attention_mask needs documents that end with an EOD token, and nothing says which token that is in "
            f"{prefix}, which has no sidecar with an eod_id: give the tokenizer that made it (--tokenizer-model DIR), "
            "or leave reset_attention_mask off"
        )


def test_documents_without_it_are_found(tmp_path, tokenizer_dir):
    """Whoever says that they have it."""
    documents = [(5, 1)] * 40 + [(5, 8)] + [(1,)] * 19
    claimed = write(tmp_path / "claimed", documents)
    silent = write(tmp_path / "silent", documents, {})
    for prefix in (claimed, silent):
        with pytest.raises(ValueError) as error:
            resolve(prefix, tokenizer_model=tokenizer_dir)
        assert str(error.value) == (
            f"reset_attention_mask needs documents that end with an EOD token, here 1, but 1 of 60 documents read from "
            f"{prefix} do not, such as number 40, whose last token is 8: make the data again with "
            "dsv3 preprocess --append-eod, or leave reset_attention_mask off"
        )


def test_datasets_that_disagree(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", [(5, 2)], {"append_eod": True, "eod_id": 2})
    message = rf"the same in all datasets, but it is 1 in {first}, 2 in {second}: preprocess all with one tokenizer, or"
    with pytest.raises(ValueError, match=message):
        resolve(first, second)


def test_a_name_is_taken_at_its_word(tmp_path, tokenizer_dir):
    """By a sidecar without a dataset; where there is none, or several disagree, by the tokenizer, whose EOD is 1."""
    nine = write(tmp_path / "a", [(5, 9)], {"append_eod": True, "eod_id": 9})
    two = write(tmp_path / "b", [(5, 2)], {"append_eod": True, "eod_id": 2})
    silent, gone = write(tmp_path / "c", options={}), str(tmp_path / "gone")
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.idx").unlink()
    assert named_eod_id([gone, nine, silent], tokenizer_dir) == 9
    for prefixes in ([], [gone, silent], [nine, two]):
        assert named_eod_id(prefixes, tokenizer_dir) == 1
        assert named_eod_id(prefixes, None) is None
