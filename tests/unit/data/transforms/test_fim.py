"""Fill-in-the-middle: what is cut, where, how often, and that it can be undone."""

import json
import math
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.tokenizer import FIM_BEGIN_TOKEN, FIM_END_TOKEN, FIM_HOLE_TOKEN, load_tokenizer
from dsv3_megatron.data.transforms.fim import (
    DEFAULT_SENTINEL_NAMES,
    FimForm,
    FimOptions,
    FimSentinels,
    FimTransform,
    find_fim_sentinels,
    invert_fim,
)

SENTINELS = FimSentinels(901, 900, 902, DEFAULT_SENTINEL_NAMES)
unicode_texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\r\n\r\n. é👩🏽‍🚀")))


def transform(rate=1.0, spm_rate=0.0, seed=1234, sentinels=SENTINELS):
    return FimTransform(FimOptions(rate, spm_rate, seed), sentinels)


def encode_as_characters(document):
    """Ids of a document's parts, code points above the sentinels standing for themselves."""
    ids = []
    for part in document.parts:
        ids.extend([part] if isinstance(part, int) else [1000 + ord(character) for character in part])
    return ids


def decode_characters(ids):
    return "".join(chr(token - 1000) for token in ids)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@given(text=unicode_texts, spm_rate=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 50))
def test_the_inverse_restores_any_document(text, spm_rate, seed):
    document = transform(spm_rate=spm_rate, seed=seed)(text)
    prefix, suffix, middle = invert_fim(encode_as_characters(document), SENTINELS)
    assert decode_characters(prefix + middle + suffix) == text
    if any(name in text for name in SENTINELS.names):
        assert document.form is FimForm.SPELLS_SENTINEL
    elif len(text) >= 3:
        assert document.form is (FimForm.SPM if spm_rate else FimForm.PSM)
        marks = (901, 900, 902)
        assert tuple(part for part in document.parts if isinstance(part, int)) == marks
        assert "" not in document.parts


@given(text=unicode_texts.filter(lambda text: len(text) > 2), spm_rate=st.sampled_from([0.0, 1.0]))
def test_with_a_tokenizer_each_part_decodes_on_its_own(tokenizer, tokenizer_dir, text, spm_rate):
    sentinels = find_fim_sentinels(tokenizer_dir)
    document = transform(spm_rate=spm_rate, sentinels=sentinels)(text)
    ids = []
    for part in document.parts:
        ids.extend([part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids)
    prefix, suffix, middle = (
        tokenizer.decode(part, skip_special_tokens=False) for part in invert_fim(ids, sentinels)
    )
    assert prefix + middle + suffix == text
    assert "\ufffd" in text or "\ufffd" not in prefix + middle + suffix  # a broken code point would decode to it


def test_the_two_forms_are_the_papers():
    text = "".join(chr(0x4E00 + i) for i in range(2000))
    psm, spm = transform()(text).parts, transform(spm_rate=1.0)(text).parts
    begin, prefix, hole, suffix, end, middle = psm
    assert (begin, hole, end) == (901, 900, 902) and prefix + middle + suffix == text
    assert spm == (901, 900, suffix, 902, prefix, middle)  # the same cut, the other order


def test_the_rate_is_the_one_asked_for():
    count, rate, spm_rate = 20_000, 0.1, 0.3
    forms = Counter(transform(rate, spm_rate)(f"document number {i}").form for i in range(count))
    num_cut = forms[FimForm.PSM] + forms[FimForm.SPM]
    assert abs(num_cut - count * rate) < 4 * math.sqrt(count * rate * (1 - rate))  # four standard deviations
    assert abs(forms[FimForm.SPM] - num_cut * spm_rate) < 4 * math.sqrt(num_cut * spm_rate * (1 - spm_rate))
    assert forms[FimForm.PLAIN] == count - num_cut


def test_a_seed_decides_everything():
    texts = [f"a document of some length, the one with number {i}" for i in range(300)]
    first = [transform(0.5, 0.5)(text) for text in texts]
    sent = pickle.loads(pickle.dumps(transform(0.5, 0.5)))
    assert [sent(text) for text in reversed(texts)] == first[::-1]
    other = [transform(0.5, 0.5, seed=1235)(text) for text in texts]
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 120  # a quarter are plain under both seeds
    assert [transform(0.0)(text) for text in texts] == [(FimForm.PLAIN, (text,)) for text in texts]


def test_cuts_are_uniform_over_all_positions():
    length, count = 9, 10_000
    counts = Counter()
    for i in range(count):
        text = f"{i:09d}"
        places = invert_fim(encode_as_characters(transform()(text)), SENTINELS)
        counts.update([len(places[0]), len(places[0]) + len(places[2])])
    assert sorted(counts) == list(range(length + 1))
    expected = 2 * count / (length + 1)
    assert sum((counts[k] - expected) ** 2 / expected for k in range(length + 1)) < 27.9  # 9 degrees: p = 0.001


def test_a_line_break_stays_whole():
    seen = set()
    for i in range(400):
        text = f"{i:03d}\r\n\r\n"
        seen.update(part for part in transform()(text).parts if isinstance(part, str))
    assert all(not part.startswith("\n") for part in seen)
    assert any(part.endswith("\r\n") for part in seen)
    lone = {part for i in range(400) for part in transform()(f"{i:03d}\n\n").parts if isinstance(part, str)}
    assert any(part.startswith("\n") for part in lone)  # a line feed alone is an ordinary character


@pytest.mark.parametrize("text", ["", "a", "é👩"])
def test_short_documents_stay(text):
    assert transform()(text) == (FimForm.TOO_SHORT, (text,))
    assert invert_fim(encode_as_characters(transform()(text)), SENTINELS) == ([1000 + ord(c) for c in text], [], [])


@pytest.mark.parametrize("name", DEFAULT_SENTINEL_NAMES)
def test_documents_that_spell_a_sentinel_stay(name):
    text = f"about {name} and its use"
    assert transform()(text) == (FimForm.SPELLS_SENTINEL, (text,))
    assert transform()(text.replace("fim", "fin")).form is FimForm.PSM


@pytest.mark.parametrize(
    "ids", [[1, 901, 900, 902], [901, 900], [901, 902, 900], [901, 901, 900, 902], [901, 900, 902, 902]]
)
def test_the_inverse_refuses_what_was_not_cut(ids):
    with pytest.raises(ValueError, match=r"FIM sentinels must be .* in that order, .*; found .*: give one document"):
        invert_fim(ids, SENTINELS)


@pytest.mark.parametrize(("arguments", "message"), [
    ((1.5,), r"fim_rate=1\.5 must be a probability, between 0 and 1"),
    ((0.1, -1), r"fim_spm_rate=-1 must be a probability, between 0 and 1"),
    ((0.1, 0.0, -3), r"seed=-3 must be an integer between 0 and 2\*\*64 - 1"),
])
def test_options_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        FimOptions(*arguments)


def test_sentinels_are_found(tokenizer, tokenizer_dir, tmp_path):
    begin, hole, end = (tokenizer.token_to_id(name) for name in (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN))
    expected = FimSentinels(begin, hole, end, DEFAULT_SENTINEL_NAMES)
    assert find_fim_sentinels(tokenizer_dir) == find_fim_sentinels(tokenizer_dir / "tokenizer.json") == expected
    assert find_fim_sentinels(tokenizer.get_vocab()) == expected
    vocab = {"<fim_prefix>": 3, "<fim_suffix>": 4, "<fim_middle>": 5, "a": 0}
    assert find_fim_sentinels(vocab, list(vocab)[:3]) == FimSentinels(3, 4, 5, tuple(list(vocab)[:3]))
    content = {"model": {"vocab": [["x", -1.0], ["y", -2.0]]}, "added_tokens": [{"content": "z", "id": 2}]}
    (tmp_path / "unigram.json").write_text(json.dumps(content), encoding="utf-8")
    assert find_fim_sentinels(tmp_path / "unigram.json", "xyz") == FimSentinels(0, 1, 2, ("x", "y", "z"))


def test_missing_sentinels_are_named(tmp_path):
    vocab = {"<fim_prefix>": 3, FIM_BEGIN_TOKEN: 1}
    with pytest.raises(ValueError) as caught:
        find_fim_sentinels(vocab)
    message = str(caught.value)
    assert message.startswith(f"fim_rate > 0 needs the sentinels {FIM_HOLE_TOKEN}, {FIM_END_TOKEN}, which the vocab")
    assert "it has <fim_prefix>, <｜fim▁begin｜>: name begin, hole and end among them" in message
    assert "dsv3 train-tokenizer, or set fim_rate to 0" in message
    with pytest.raises(ValueError, match=r"it has none like it"):
        find_fim_sentinels({})
    with pytest.raises(ValueError, match=r"fim_sentinels=\['a', 'a', 'b'\] must be three different tokens"):
        find_fim_sentinels({"a": 0, "b": 1}, ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read \(No such file or directory\)"):
        find_fim_sentinels(tmp_path)
    (tmp_path / "tokenizer.json").write_text("no")
    with pytest.raises(ValueError, match=r"tokenizer.json is not JSON"):
        find_fim_sentinels(tmp_path)
