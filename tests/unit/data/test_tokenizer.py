"""The tokenizer's training, files, ids and identity."""

import json
import shutil

import pytest

from dsv3_megatron.data.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    FIM_BEGIN_TOKEN,
    FIM_END_TOKEN,
    FIM_HOLE_TOKEN,
    PAD_TOKEN,
    PRE_TOKENIZER_PATTERNS,
    TRAILING_SPECIAL_TOKENS,
    count_ids,
    find_eod_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

HARD_TEXTS = [
    "",
    "plain words",
    "  indented\n\n\tcode(x)  # 中文字 and カタカナ\r\nif x:\n",
    "12345678 3.14159 x1y22z333",
    "naïve café — “quotes” … 👩‍🚀\u200b\x00\x7f",
    "a" * 300 + "!" * 300 + " " * 300,
]


def test_special_tokens_have_v3_places(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert [tokenizer.token_to_id(token) for token in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)] == [0, 1, 2]
    size = count_ids(tokenizer)
    assert size == 340 == tokenizer.get_vocab_size()
    first = size - len(TRAILING_SPECIAL_TOKENS)
    assert [tokenizer.token_to_id(token) for token in TRAILING_SPECIAL_TOKENS] == list(range(first, size))
    assert TRAILING_SPECIAL_TOKENS[:3] == (FIM_HOLE_TOKEN, FIM_BEGIN_TOKEN, FIM_END_TOKEN)  # V3: 128800, 01, 02
    assert find_eod_id(tokenizer, tokenizer_dir) == find_eod_id(tokenizer) == 1


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_any_text_survives(tokenizer_dir, text):
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not ids or min(ids) > 2


def test_pre_tokenizer_is_v3s(tokenizer_dir):
    pre_tokenizer = load_tokenizer(tokenizer_dir).pre_tokenizer
    text = "x = foo.bar(12345)\n\n  return 中文 and-so 3.5;\n"
    pieces = [text[start:stop] for _, (start, stop) in pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == (
        ["x", " =", " foo", ".bar", "(", "123", "45", ")\n\n", " ", " return", " ", "中文", " and", "-so", " ", "3"]
        + [".", "5", ";\n"]
    )


def test_patterns_are_the_published_ones():
    """Character for character as DeepSeek-V3's tokenizer.json is quoted by those who implement it."""
    assert PRE_TOKENIZER_PATTERNS[:2] == (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")
    punctuation = "".join(chr(code) for code in range(0x21, 0x7F) if not chr(code).isalnum())
    escaped = "".join("\\" + char if char in "-[\\]" else char for char in punctuation)
    assert PRE_TOKENIZER_PATTERNS[2] == "|".join([
        f"[{escaped}][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+",
        r"\s+(?!\S)", r"\s+",
    ])


def test_transformers_loads_the_folder(tokenizer_dir, texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    ours = load_tokenizer(tokenizer_dir)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == 340
    for text in [*texts[:3], *HARD_TEXTS]:
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text


def test_training_depends_on_the_texts_and_not_their_order(texts, tmp_path):
    orders = {"a": texts, "b": texts, "c": texts[::-1]}
    identities = {
        save_tokenizer(train_tokenizer(order, vocab_size=350), tmp_path / name) for name, order in orders.items()
    }
    assert len(identities) == 1


def test_a_merge_needs_its_frequency():
    texts = ["ab ab ab cd cd"]
    assert {"ab", "cd"} <= train_tokenizer(texts, vocab_size=400, min_frequency=2).get_vocab().keys()
    vocab = train_tokenizer(texts, vocab_size=400, min_frequency=3).get_vocab()
    assert "ab" in vocab and "cd" not in vocab


def test_fingerprint_is_of_what_changes_ids(tokenizer_dir, tmp_path, texts):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "checksums.json").unlink()  # of the files as they were
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["padding"] = {"strategy": "BatchLongest"}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # the older spelling
    file.write_text(json.dumps(dict(reversed(content.items()))), encoding="utf-8")
    assert fingerprint(tmp_path / "t") == fingerprint(file) == fingerprint(tokenizer_dir)
    content["model"]["merges"][0:2] = content["model"]["merges"][1::-1]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert fingerprint(tmp_path / "t") != fingerprint(tokenizer_dir)


def test_eod_follows_the_config(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    config = tmp_path / "t" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|EOT|>"}}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged: .* remove .*checksums\.json"):
        find_eod_id(load_tokenizer(tmp_path / "t"), tmp_path / "t")
    (tmp_path / "t" / "checksums.json").unlink()
    tokenizer = load_tokenizer(tmp_path / "t")
    assert find_eod_id(tokenizer, tmp_path / "t") == tokenizer.token_to_id("<|EOT|>")
    config.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(
        ValueError, match=r"the end-of-document token '</s>' is not in the vocabulary: set eos_token in"
    ):
        find_eod_id(tokenizer, tmp_path / "t")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=273 must be at least 274 \(256 bytes and 18 special tokens\)"):
        train_tokenizer([], vocab_size=273)
    with pytest.raises(ValueError, match=r"vocab_size=262145 must be at most 262144; DeepSeek-V3 has 129280"):
        train_tokenizer([], vocab_size=262145)
    with pytest.raises(ValueError, match=r"min_frequency=0 must be at least 1; try 2"):
        train_tokenizer([], vocab_size=400, min_frequency=0)
    with pytest.raises(
        ValueError, match=r"tokenizer.json does not exist; give a folder with a tokenizer.json, or make"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer.json is not a tokenizer.json that this tokenizers release reads: "
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("no")
    with pytest.raises(ValueError, match=r"tokenizer.json is not JSON: "):
        fingerprint(tmp_path)
