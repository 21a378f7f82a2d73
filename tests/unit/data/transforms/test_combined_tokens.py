"""Splitting of tokens that join punctuation and line breaks: which, into what, how often, and that the text stays."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from dsv3_megatron.data.tokenizer import count_ids, load_tokenizer, save_tokenizer, train_tokenizer
from dsv3_megatron.data.transforms.combined_tokens import (
    CombinedTokens,
    CombinedTokenSplitter,
    find_combined_tokens,
    split_parts,
)

ENDINGS = [".\n", ".\n\n", ");\n", " {\n", "。\n", ":\r\n", "}\n", ";\n", " //\n", "…\n\n"]
RATE = 0.3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"line {i} of text{ending}" * 3 for i in range(40) for ending in ENDINGS]
    folder = tmp_path_factory.mktemp("combined")
    save_tokenizer(train_tokenizer(texts, vocab_size=330), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def table(tokenizer):
    return find_combined_tokens(tokenizer)


def encode(tokenizer, texts):
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64) for text in texts]
    return np.concatenate([*ids, np.empty(0, np.int64)]), np.array([len(part) for part in ids], dtype=np.int64)


def split_slowly(tokenizer, splitter, text):
    """One document by a loop over its ids, pieces from the tokenizer itself."""
    ids, result, seen = tokenizer.encode(text, add_special_tokens=False).ids, [], 0
    numbers = splitter._random.draw(text, len(ids))
    for token in ids:
        decoded = tokenizer.decode([token], skip_special_tokens=False)
        parts = split_parts(decoded)
        if parts is None or "\ufffd" in decoded:
            result.append(token)
            continue
        if numbers[seen] < splitter.rate * 2**64:
            result.extend(piece for part in parts for piece in tokenizer.encode(part, add_special_tokens=False).ids)
        else:
            result.append(token)
        seen += 1
    return result


@pytest.mark.parametrize(("text", "parts"), [
    (".\n", (".", "\n")), (" );\r\n\n", (" );", "\r\n\n")), ("€。\n", ("€。", "\n")), ("\ufffd\n", ("\ufffd", "\n")),
    (".", None), ("\n", None), (" \n", None), ("  .\n", None), (".\t\n", None), ("a.\n", None), (".\n ", None),
    (".\n.", None), (".\n.\n", None), ("", None), ("́\n", None),
])
def test_what_a_combined_token_is(text, parts):
    assert split_parts(text) == parts


def test_the_table_holds_every_combined_token_and_its_pieces(tokenizer, table):
    size = count_ids(tokenizer)
    found = {token_id for token_id in range(size) if table.row_V[token_id] >= 0}
    texts = {token_id: tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(size)}
    # A replacement character is what the library makes of the last bytes of "。" with a line break: no whole character.
    assert found == {token_id for token_id, text in texts.items() if split_parts(text) and "\ufffd" not in text}
    assert any("\ufffd\n" in text for text in texts.values())
    assert {".\n", ".\n\n", ");\n", " {\n"} <= {texts[token_id] for token_id in found}
    for token_id in found:
        row = table.row_V[token_id]
        pieces = table.pieces_P[table.starts_R[row] :][: table.counts_R[row]].tolist()
        punctuation, line_breaks = split_parts(texts[token_id])
        assert pieces == tokenizer.encode(punctuation).ids + tokenizer.encode(line_breaks).ids
        assert not found & set(pieces)
    assert set(np.unique(table.counts_R)) > {2}  # some parts are no token of their own: ");" is ")" and ";"


documents = st.lists(
    st.lists(st.one_of(st.sampled_from(["word", " x", *ENDINGS]), st.text(st.characters(exclude_categories=["Cs"]))))
    .map("".join), max_size=6)


@given(documents, st.sampled_from([0.0, RATE, 1.0]), st.integers(0, 5))
def test_any_text_is_what_it_was(tokenizer, table, texts, rate, seed):
    splitter = CombinedTokenSplitter(table, rate=rate, seed=seed)
    ids_T, lengths_D = encode(tokenizer, texts)
    split_T, split_lengths_D = splitter.split_documents(ids_T, lengths_D, texts)
    assert split_T.dtype == ids_T.dtype and split_lengths_D.sum() == split_T.size
    assert (split_lengths_D >= lengths_D).all()
    for text, ids in zip(texts, np.split(split_T, np.cumsum(split_lengths_D)[:-1]) if texts else [], strict=True):
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        assert ids.tolist() == split_slowly(tokenizer, splitter, text)
        if rate == 1:
            assert not (table.row_V[ids] >= 0).any()


@given(documents)
def test_a_batch_makes_no_difference_to_a_document(tokenizer, table, texts):
    splitter = CombinedTokenSplitter(table, rate=RATE)
    together, lengths_D = splitter.split_documents(*encode(tokenizer, texts), texts)
    alone = [splitter.split_documents(*encode(tokenizer, [text]), [text.encode()])[0] for text in texts]
    assert together.tolist() == [token for ids in alone for token in ids.tolist()]
    assert lengths_D.tolist() == [len(ids) for ids in alone]


def test_the_rate_is_the_one_asked_for_and_the_seed_decides(tokenizer, table):
    texts = [f"a line {i}.\n" * 40 for i in range(100)]
    ids_T, lengths_D = encode(tokenizer, texts)
    places = table.row_V[ids_T] >= 0
    count = int(places.sum())
    assert count == 4000
    split = CombinedTokenSplitter(table, rate=RATE).split_documents(ids_T, lengths_D, texts)
    num_kept = int((table.row_V[split[0]] >= 0).sum())
    assert abs(count - num_kept - count * RATE) < 4 * math.sqrt(count * RATE * (1 - RATE))  # four standard deviations
    sent = pickle.loads(pickle.dumps(CombinedTokenSplitter(table, rate=RATE)))
    assert np.array_equal(sent.split_documents(ids_T, lengths_D, texts)[0], split[0])
    other = CombinedTokenSplitter(table, rate=RATE, seed=1).split_documents(ids_T, lengths_D, texts)
    assert not np.array_equal(other[1], split[1])
    assert CombinedTokenSplitter(table, rate=0).split_documents(ids_T, lengths_D, texts)[0] is ids_T


def test_added_tokens_are_never_split():
    tokenizer = train_tokenizer(["words.\n" * 50], vocab_size=300)
    added = ["#\n", "#Ċ"]  # the second is spelled as the vocabulary spells "#" and a line feed
    tokenizer.add_special_tokens(added)
    table = find_combined_tokens(tokenizer)
    assert len(table) == 1 and table.row_V[tokenizer.token_to_id(".Ċ")] == 0
    assert [table.row_V[tokenizer.token_to_id(token)] for token in added] == [-1, -1]


def test_a_tokenizer_without_such_tokens():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["some words.\n"] * 9, trainers.BpeTrainer(vocab_size=50, show_progress=False))
    table = find_combined_tokens(tokenizer)
    assert len(table) == 0
    CombinedTokenSplitter(table, rate=0.0)
    with pytest.raises(ValueError, match=r"split_combined_rate=0.1 needs tokens that join punctuation and line breaks, "
                                         r"and the tokenizer has none: set the rate to 0, or make one"):
        CombinedTokenSplitter(table, rate=0.1)
    with pytest.raises(ValueError, match=r"split_combined_rate=2 must be a probability"):
        CombinedTokenSplitter(table, rate=2)
    assert isinstance(table, CombinedTokens)


def test_a_tokenizer_that_changes_text():
    tokenizer = train_tokenizer(["words.\n" * 50], vocab_size=300)
    tokenizer.normalizer = normalizers.Replace(".", "!")
    with pytest.raises(ValueError, match=r"keeps text as it is, and this one turns '\.' into '!' \(token \d+\)"):
        find_combined_tokens(tokenizer)
