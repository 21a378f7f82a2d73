"""The two encoders give the same ids, and the fast one is not trusted where it would not."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dsv3_megatron.data.encoder import (
    PROBE_TEXTS,
    GigatokenEncoder,
    HuggingFaceEncoder,
    choose_encoder,
    cut_text,
    find_difference,
)
from dsv3_megatron.data.tokenizer import EOS_TOKEN, load_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
WORDY = st.lists(
    st.sampled_from(
        [
            "ab",
            "cde",
            "Fgh",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            ".",
            ",",
            "'s",
            "1234",
            "é",
            "中文字",
            "。",
            "/",
            "😀",
            "\u3000",
            "\u0301",
            "<｜User｜>",
            "-",
        ]
    ),
    max_size=80,
).map("".join)


def make_tokenizer(folder, pre_tokenizer, texts, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[EOS_TOKEN, "<｜User｜>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([*texts, *PROBE_TEXTS, "ab cde\nFgh. 中文字。\n中文字"], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, texts, tokenizer_dir):
    root = tmp_path_factory.mktemp("encoders")
    cl100k = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return {
        "deepseek-v3": tokenizer_dir,
        "gpt2": make_tokenizer(root / "gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False), texts),
        "cl100k": make_tokenizer(root / "cl100k", cl100k, texts),
    }


NAMES = ("deepseek-v3", "gpt2", "cl100k")


@pytest.fixture(scope="module")
def encoders(folders):
    references = {name: HuggingFaceEncoder(folders[name]) for name in NAMES}
    return {name: (choose_encoder(folders[name], backend="gigatoken")[0], references[name]) for name in NAMES}


def test_reference_is_the_tokenizer(folders, texts):
    tokenizer = load_tokenizer(folders["deepseek-v3"])
    encoder = HuggingFaceEncoder(folders["deepseek-v3"])
    for text in [*texts, *PROBE_TEXTS]:
        assert encoder.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert (encoder.vocab_size, encoder.eod_id, encoder.name) == (340, 1, "huggingface")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(text=ANY_TEXT | WORDY)
def test_same_ids_for_any_text(encoders, name, text):
    fast, reference = encoders[name]
    assert fast.encode(text).tolist() == reference.encode(text).tolist()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(text=ANY_TEXT | WORDY, piece_bytes=st.integers(1, 60))
def test_cutting_a_text_keeps_its_ids(encoders, name, text, piece_bytes):
    fast, _ = encoders[name]
    pieces = list(cut_text(text, piece_bytes))
    assert b"".join(pieces) == text.encode()
    assert [token for piece in pieces for token in fast.encode(piece.decode()).tolist()] == fast.encode(text).tolist()


def test_texts_are_really_cut():
    text = "some words and a\nline of prose, then 中文字。\n中文字\n中文字 end " * 50
    assert max(map(len, cut_text(text, 100))) < 180
    assert list(cut_text("x" * 1000, 100)) == [b"x" * 1000]


def test_long_texts_in_pieces(encoders, monkeypatch, texts):
    monkeypatch.setattr("dsv3_megatron.data.encoder.cut_text", lambda text: cut_text(text, 50))
    monkeypatch.setattr("dsv3_megatron.data.encoder.PIECE_BYTES", 50)
    fast, reference = encoders["deepseek-v3"]
    for text in texts:
        for given_text in (text, bytearray(text.encode())):
            pieces = list(fast.encode_pieces(given_text))
            assert len(pieces) > 1
            assert np.concatenate(pieces).tolist() == reference.encode(text).tolist()
            assert np.concatenate(list(reference.encode_pieces(given_text))).tolist() == reference.encode(text).tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["added_tokens"][1].update(rstrip=True),
        lambda content: content["added_tokens"][1].update(content="a b"),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
    ],
    ids=["normalizer", "rstrip", "token with a space", "prefix space"],
)
def test_texts_are_not_cut_where_it_would_show(folders, tmp_path, change):
    content = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    assert GigatokenEncoder(folders["gpt2"], HuggingFaceEncoder(folders["gpt2"])).is_cut_safe
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not GigatokenEncoder(tmp_path, HuggingFaceEncoder(tmp_path)).is_cut_safe


def test_memory_is_given_back(folders):
    encoder = GigatokenEncoder(
        folders["deepseek-v3"], HuggingFaceEncoder(folders["deepseek-v3"]), max_cache_bytes=20_000_000
    )
    random = np.random.default_rng(0)
    before = encoder._tokenizer
    sizes = []
    for _ in range(12):
        words = random.integers(97, 123, (120_000, 13), dtype=np.uint8)
        words[:, -1] = 32
        text = words.tobytes().decode()
        encoder.encode(text)
        encoder.limit_memory()
        sizes.append(encoder._tokenizer is before)
    assert not all(sizes)  # made anew at least once
    fresh = HuggingFaceEncoder(folders["deepseek-v3"])
    assert encoder.encode(text).tolist() == fresh.encode(text).tolist()


class Wrong:
    """Agrees with the reference but for one text."""

    name = "wrong"

    def __init__(self, reference, text):
        self._reference, self._text = reference, text

    def encode(self, text):
        ids = self._reference.encode(text).copy()
        if text == self._text:
            ids[-1] += 1
        return ids


def test_one_different_id_is_seen(encoders):
    _, reference = encoders["gpt2"]
    assert find_difference(Wrong(reference, None), reference) is None
    assert find_difference(Wrong(reference, PROBE_TEXTS[4]), reference).startswith("other ids than tokenizers for a")


def test_choice(folders, tmp_path, texts, monkeypatch):
    encoder, why = choose_encoder(folders["deepseek-v3"])
    assert encoder.name == "gigatoken" and why.startswith("the ids of tokenizers for every text")
    assert choose_encoder(folders["deepseek-v3"], backend="huggingface")[0].name == "huggingface"
    with pytest.raises(ValueError, match="tokenizer_backend='spacy' must be one of auto, gigatoken, huggingface"):
        choose_encoder(folders["deepseek-v3"], backend="spacy")
    # One that gigatoken refuses, one that it gets wrong, and none installed.
    lower = make_tokenizer(
        tmp_path / "lower", pre_tokenizers.ByteLevel(add_prefix_space=False), texts, normalizers.Lowercase()
    )
    encoder, why = choose_encoder(lower)
    assert encoder.name == "huggingface" and why.startswith("gigatoken cannot load it: ")
    with pytest.raises(ValueError, match="tokenizer_backend=gigatoken cannot be used: gigatoken cannot load it"):
        choose_encoder(lower, backend="gigatoken")
    monkeypatch.setattr(GigatokenEncoder, "encode", lambda self, text: np.zeros(1, np.uint32))
    encoder, why = choose_encoder(folders["gpt2"])
    assert encoder.name == "huggingface" and why.startswith("gigatoken gave other ids than tokenizers for a probe text")
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    encoder, why = choose_encoder(folders["gpt2"])
    assert encoder.name == "huggingface" and why.startswith("gigatoken is not installed (")


def test_escaped_line_breaks_in_split_patterns(folders, tmp_path):
    """Both spellings of DeepSeek-V3's pattern are the same tokenizer to gigatoken."""
    content = json.loads((folders["deepseek-v3"] / "tokenizer.json").read_text(encoding="utf-8"))
    pattern = content["pre_tokenizer"]["pretokenizers"][2]["pattern"]
    spellings = {
        pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n"),
        pattern["Regex"].replace(r"\r", "\r").replace(r"\n", "\n"),
    }
    assert len(spellings) == 2
    for number, spelling in enumerate(spellings):
        pattern["Regex"] = spelling
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        assert choose_encoder(folder, backend="gigatoken")[0].name == "gigatoken"
