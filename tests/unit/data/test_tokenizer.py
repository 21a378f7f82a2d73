"""The tokenizer's training, files, ids and identity."""

import json
import os
import shutil

import pytest

from dsv3_megatron.data.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    FIM_BEGIN_TOKEN,
    FIM_END_TOKEN,
    FIM_HOLE_TOKEN,
    PAD_TOKEN,
    TRAILING_SPECIAL_TOKENS,
    count_ids,
    find_eod_id,
    fingerprint,
    load_tokenizer,
    main,
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


def test_transformers_loads_the_folder(tokenizer_dir, texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    ours = load_tokenizer(tokenizer_dir)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == 340
    for text in [*texts[:3], *HARD_TEXTS]:
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text


def test_training_is_deterministic_and_bounded(texts, tmp_path):
    identities = [save_tokenizer(train_tokenizer(texts, vocab_size=350), tmp_path / name) for name in "ab"]
    assert identities[0] == identities[1]
    limited = train_tokenizer(iter(texts), vocab_size=350, max_bytes=1)
    assert limited.get_vocab() == train_tokenizer(texts[:1], vocab_size=350).get_vocab()


def test_fingerprint_is_of_what_changes_ids(tokenizer_dir, tmp_path, texts):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
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


def test_command_line(jsonl_file, tmp_path, capsys):
    arguments = ["--input", os.fspath(jsonl_file), "--output", os.fspath(tmp_path / "t"), "--vocab-size"]
    assert main([*arguments, "300"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("tokenizer: 300 ids in ") and not printed.err
    assert fingerprint(tmp_path / "t")[:12] in printed.out
    assert main([*arguments, "30000"]) == 0
    assert "fewer than --vocab-size 30000" in capsys.readouterr().err
    assert main([*arguments, "3"]) == 2
    assert capsys.readouterr().err.startswith("error: vocab_size=3 must be at least 274")
