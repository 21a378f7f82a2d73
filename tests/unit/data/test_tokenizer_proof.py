"""Where gigatoken may part from tokenizers, found by trying; every difference that was ever seen is one of them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dsv3_megatron.data import tokenizer_proof
from dsv3_megatron.data.block_encoder import _not_encoded
from dsv3_megatron.data.character_classes import byte_symbols
from dsv3_megatron.data.encoder import EncodingError, GigatokenEncoder, HuggingFaceEncoder, choose_encoder
from dsv3_megatron.data.reading.json_lines import Reject
from dsv3_megatron.data.tokenizer import EOS_TOKEN, PRE_TOKENIZER_PATTERNS, load_tokenizer
from dsv3_megatron.data.tokenizer_proof import Parting, PartingScan

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RUPIAH = "The price is \u20c1 250 a night."  # U+20C1 is new in Unicode 17


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Content of a tokenizer.json with cl100k's pattern, learned on words that the cases below need."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[EOS_TOKEN],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = ["DAMASK curtains, MASKS and a MASK", "before and after foo bar", "caf\u00e9 na\u00efve", " \u2081 \u2083"]
    tokenizer.train_from_iterator(texts * 5, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture
def make(plain, tmp_path):
    """A folder with a tokenizer like `plain` after a change, and both ways to encode with it."""

    def call(change=lambda content: None):
        content = copy.deepcopy(plain)
        change(content)
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        encoder, why = choose_encoder(folder)
        return encoder, load_tokenizer(folder), why

    return call


def added(content, text, **flags):
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = [entry["id"] for entry in content["added_tokens"]] + list(content["model"]["vocab"].values())
    content["added_tokens"].append(token | {"id": max(ids) + 1, "content": text} | flags)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------------- character classes


def test_every_difference_of_a_code_point_is_found(make):
    """Each code point after a space, a letter and a digit, before a letter, through both: what differs is listed."""
    encoder, tokenizer, _ = make()
    fast = encoder._fast
    code_points = [*range(0x80, 0x3000), *range(0x10940, 0x12000), *range(0x1E000, 0x1FB00)]
    for around in (" {}", "a{}", "1{}", "{}a", " {}1"):
        texts = [around.format(chr(code_point)) for code_point in code_points]
        wrong = [
            text
            for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True)
            if encoding.ids != fast.encode(text).tolist()
        ]
        assert all(encoder._is_for_reference(text) for text in wrong)


def test_a_code_point_of_a_newer_unicode(make):
    """The case that went wrong with DeepSeek-V3's own tokenizer: gigatoken knows it as a currency, tokenizers does not.

    The merge of a space with the first byte of such a character is what makes it show.
    """

    def change(content):
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZER_PATTERNS]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        whole = Tokenizer(models.BPE())
        whole.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        content["pre_tokenizer"] = json.loads(whole.to_str())["pre_tokenizer"]
        content["model"]["vocab"]["\u0120\u00e2"] = max(content["model"]["vocab"].values()) + 1
        content["model"]["merges"].append(["\u0120", "\u00e2"])

    encoder, tokenizer, why = make(change)
    assert encoder.name == "gigatoken" and "code points go through tokenizers" in why
    assert encoder.encode(RUPIAH).tolist() == ids_of(tokenizer, RUPIAH)
    assert encoder.encode(RUPIAH).tolist() != encoder._fast.encode(RUPIAH).tolist()


# ----------------------------------------------------------------------------------------------- constructs, settings

CONSTRUCTS = {
    "single_word": (lambda c: added(c, "MASK", single_word=True), "DAMASK curtains, MASKS and a MASK"),
    "lstrip": (lambda c: added(c, "<m>", lstrip=True), "a \t\n<m> b"),
    "rstrip": (lambda c: added(c, "<m>", rstrip=True), "a <m> \u3000b"),
    "gap in the ids": (lambda c: added(c, "<|far|>", id=70_000), "before <|far|> after"),
    "two kinds that overlap": (
        lambda c: (added(c, "before and"), added(c, "d af", normalized=True), added(c, "efore", normalized=True)),
        "before and after before",
    ),
    "NFC": (lambda c: c.update(normalizer={"type": "NFC"}), "cafe\u0301 \u1100\u1161 \uf900 \u0958 \u09c7\u09be"),
    "NFC and a token": (
        lambda c: (c.update(normalizer={"type": "NFC"}), added(c, "caf\u00e9", normalized=True)),
        "cafe\u0301 caf\u00e9",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_texts_with_a_construct_go_through_tokenizers(make, name):
    change, text = CONSTRUCTS[name]
    encoder, tokenizer, _ = make(change)
    assert encoder.name == "gigatoken"
    assert encoder.encode(text).tolist() == ids_of(tokenizer, text)
    assert np.concatenate(list(encoder.encode_pieces(bytearray(text.encode())))).tolist() == ids_of(tokenizer, text)
    assert encoder._is_for_reference(text) and not encoder._is_for_reference("a curtain")


def test_plain_added_tokens_stay_with_gigatoken(make):
    encoder, tokenizer, _ = make(lambda c: (added(c, "<|user|>"), added(c, "foo bar")))
    text = "x<|user|>a foo bar<|user|><|user|>\n"
    assert not encoder._is_for_reference(text)
    assert encoder.encode(text).tolist() == ids_of(tokenizer, text)


def swap_ids(content):
    vocab = content["model"]["vocab"]
    longest = sorted(vocab, key=vocab.get)[-2:]
    vocab[longest[0]], vocab[longest[1]] = vocab[longest[1]], vocab[longest[0]]


def two_merges_for_one_token(content):
    """As converters from tiktoken write them."""
    vocab, symbols = content["model"]["vocab"], byte_symbols()
    ends = [symbols[byte] for byte in b"xyx"]
    for token in (ends[0] + ends[1], ends[1] + ends[2], "".join(ends)):
        vocab[token] = max(vocab.values()) + 1
    content["model"]["merges"] += [[*ends[:2]], [*ends[1:]], [ends[0] + ends[1], ends[2]], [ends[0], ends[1] + ends[2]]]


def add_step(step, at=0):
    return lambda content: content["pre_tokenizer"]["pretokenizers"].insert(at, step)


ALTOGETHER = {
    "dropout": (lambda c: c["model"].update(dropout=0.1), "gigatoken does not do dropout=0.1"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "does not do end_of_word_suffix='</w>'"),
    "lowercase": (lambda c: c.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "digits": (add_step({"type": "Digits", "individual_digits": True}), "its pre_tokenizer Digits"),
    "punctuation": (add_step({"type": "Punctuation", "behavior": "Isolated"}), "its pre_tokenizer Punctuation"),
    "prefix space": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        "does not do add_prefix_space",
    ),
    "split twice": (lambda c: c["pre_tokenizer"]["pretokenizers"][-1].update(use_regex=True), "do not go together"),
    "other behavior": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        "does not do its pre_tokenizer Split",
    ),
    "no pre-tokenizer": (lambda c: c.update(pre_tokenizer=None), "does not end with ByteLevel"),
    "merges of one token": (two_merges_for_one_token, "several of its merges give the same token"),
    "no byte": (lambda c: c["model"]["vocab"].pop("~"), "no single-byte vocab entry for byte 0x7e"),
}


@pytest.mark.parametrize("name", ALTOGETHER)
def test_what_gigatoken_does_not_do_goes_through_tokenizers(make, name):
    change, reason = ALTOGETHER[name]
    encoder, tokenizer, why = make(change)
    assert encoder.name == "huggingface" and reason in why
    if name != "dropout":
        assert encoder.encode("12 ab, \u00c4B xyxyx").tolist() == ids_of(tokenizer, "12 ab, \u00c4B xyxyx")


def test_merges_that_are_not_in_the_order_of_ids(make):
    encoder, tokenizer, _ = make(swap_ids)
    text = "DAMASK curtains, before and after"
    assert encoder.name == "gigatoken" and encoder.encode(text).tolist() == ids_of(tokenizer, text)


def test_every_word_is_compared(make, monkeypatch):
    right = GigatokenEncoder.encode

    def wrong_once(self, text):
        return np.zeros(1, np.uint32) if text == " curtains" else right(self, text)

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong_once)
    encoder, _, why = make(lambda c: added(c, "<|once|>"))  # not one that was proven before
    assert encoder.name == "huggingface" and why == "gigatoken gave other ids than tokenizers for ' curtains'"


def test_a_text_that_tokenizers_refuses_is_said(make):
    """Its regular expressions give up at a run of ten million spaces; a panic of its Rust code is no Exception."""
    encoder, _, _ = make()

    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("Onig: Regex search error: retry-limit-in-match over")

    reference = encoder._reference
    reference._tokenizer = type("Panicking", (), {"encode_batch_fast": panic})()
    with pytest.raises(EncodingError, match="tokenizers gives it no ids .*retry-limit"):
        reference.encode("x")
    assert _not_encoded(EncodingError("no ids")).reject == Reject("not encoded", "no ids", "is it text? leave it out")


# -------------------------------------------------------------------------------------------------------- any text

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.sampled_from(
    ["MASK", "a", " ", "\n", "\u20c1", "foo bar", "1", "<m>", "<|far|>", "e\u0301", "\u0345", "\u1d9e", "'ll", "\u017f"]
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT | st.lists(PIECES | ANY_TEXT, max_size=20).map("".join))
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_no_text_is_encoded_differently(plain, name, text, tmp_path_factory):
    encoder, tokenizer = _made_once(plain, name, tmp_path_factory)
    assert encoder.encode(text).tolist() == ids_of(tokenizer, text)


_MADE: dict[str, tuple] = {}


def _made_once(plain, name, tmp_path_factory):
    if name not in _MADE:
        content = copy.deepcopy(plain)
        CONSTRUCTS[name][0](content)
        folder = tmp_path_factory.mktemp("made")
        (folder / "tokenizer.json").write_text(json.dumps(content))
        _MADE[name] = choose_encoder(folder, backend="gigatoken")[0], load_tokenizer(folder)
    return _MADE[name]


# ------------------------------------------------------------------------------------------------------------- cache


def test_scan():
    scan = PartingScan(Parting(((0x100, 0x101), (0x10FFFF, 0x10FFFF)), ("stop",)))
    assert [scan(text) for text in ("", "go", "a stop", "\u0100", "\u0102\u00ff", "x\U0010ffff", "\U0010fffe")] == [
        False, False, True, True, False, True, False,
    ]  # fmt: skip
    for ranges in (((0x300, 0x310), (0xA000, 0xA001)), ((0x4E00, 0x4E00),), ((0x9000, 0x9000),), ((0x4DFF, 0x4DFF),)):
        scan = PartingScan(Parting(ranges, ()))
        expected = [any(first <= code <= last for first, last in ranges) for code in range(0x80, 0xD800)]
        assert [scan(chr(code)) for code in range(0x80, 0xD800)] == expected
        assert scan("\u4e01\u0301\u0080" + chr(ranges[0][0])) and not scan("\u4e01\u0080" * 9)
    many = PartingScan(Parting((), tuple(f"<{number}.>" for number in range(20))))
    assert many("x<17.>") and not many("x<17a>") and not many("\u0100")
    assert PartingScan(Parting(((0x100, 0x100),), ()))("a" * (1 << 20) + "\u0101" * 9 + "\u0100")


CODE_POINTS = st.integers(0x80, 0xD7FF) | st.integers(0xE000, 0x10FFFF) | st.integers(0x4DF0, 0x4E10)


@settings(max_examples=300)
@given(st.lists(CODE_POINTS, min_size=1, max_size=5), st.lists(CODE_POINTS, max_size=4))
def test_scan_of_any_text(parting, others):
    scan = PartingScan(Parting(tuple((code, code) for code in parting), ()))
    assert scan("".join(map(chr, [0x61, *others]))) == bool(set(parting) & set(others))
    assert scan("".join(map(chr, [*others, parting[-1], 0x61])))


def test_the_cache(make, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_proof, "_parting_of_patterns", lambda *_: ((0x20C1, 0x20C1),))
    first = make()[2]
    assert first.endswith("texts with one code point go through tokenizers")
    (file,) = (tmp_path / "cache" / "dsv3_megatron").iterdir()

    def fail(*_):
        raise AssertionError("found again")

    with monkeypatch.context() as context:
        context.setattr(tokenizer_proof, "_find_parting", fail)
        assert make()[2] == first
    for damage in (b"", b"{}", file.read_bytes().replace(b"8385", b"8386"), b"\xff"):
        file.write_bytes(damage)
        assert make()[2] == first
    file.write_bytes(b"")
    Path(file).parent.chmod(0o500)  # a reader's home: nothing is kept, nothing fails
    assert make()[2] == first
    Path(file).parent.chmod(0o700)


def test_a_reason_is_kept_too(make, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    why = make(ALTOGETHER["dropout"][0])[2]
    assert make(ALTOGETHER["dropout"][0])[2] == why


def test_normalizers_that_do_nothing(make):
    encoder, tokenizer, _ = make(lambda c: c.update(normalizer={"type": "Sequence", "normalizers": []}))
    assert encoder.name == "gigatoken" and encoder._fast.is_cut_safe
    assert encoder.encode("cafe\u0301").tolist() == ids_of(tokenizer, "cafe\u0301")


def test_inert_characters_are_those_that_nfc_leaves(make):
    """Against tokenizers' own NFC: pairs of inert characters stay as they are."""
    nfc = normalizers.NFC()
    inert = [chr(code) for code in range(0x250, 0x3400, 7) if tokenizer_proof._is_inert(code)]
    inert += [chr(code) for code in range(0xAC00, 0xD7A4, 97) if tokenizer_proof._is_inert(code)]
    assert len(inert) > 500
    for other in ("a", "\u1100", "\uac00", "\u09c7", "\u03b1"):
        assert all(nfc.normalize_str(other + character) == other + character for character in inert)


def test_huggingface_reference_is_untouched(make):
    encoder, tokenizer, _ = make()
    assert isinstance(encoder._reference, HuggingFaceEncoder)
    assert encoder._reference.encode(RUPIAH).tolist() == ids_of(tokenizer, RUPIAH)
