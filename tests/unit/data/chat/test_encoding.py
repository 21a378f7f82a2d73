"""Conversations to masked tokens: ids and masks of Transformers, token for token, however the work is cut."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dsv3_megatron.data.chat.encoding import counted_tokens
from dsv3_megatron.data.indexed import dataset_paths, read_header, read_sidecar
from dsv3_megatron.data.inspection import read_document
from dsv3_megatron.data.merge import find_datasets, merge_datasets
from dsv3_megatron.data.reading.json_lines import RecordError
from tests.unit.data.chat.conftest import make_conversations


def rows(prefix):
    return [read_document(os.fspath(prefix), number).tolist() for number in range(read_header(prefix).num_documents)]


def bytes_of(prefix):
    return [Path(path).read_bytes() for path in dataset_paths(prefix)]


def test_ids_and_masks_are_transformers(prepare, chat_tokenizer, tmp_path):
    records = make_conversations(100)
    status, out, err = prepare(records)
    assert status == 0, err
    assert "chat template: " in err and "the assistant's parts by its marks ({% generation %})" in err
    peer = AutoTokenizer.from_pretrained(chat_tokenizer)
    expected = [peer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
                for record in records]
    assert rows(tmp_path / "out_conversations") == [row["input_ids"] for row in expected]
    masks = [row["assistant_masks"] for row in expected]
    assert rows(tmp_path / "out_conversations_mask") == masks
    counted = sum(map(sum, masks))
    assert f"note: {counted} tokens count in the loss\n" in out
    sidecar = read_sidecar(tmp_path / "out_conversations")
    assert sidecar.counts["tokens"] == sum(map(len, masks)) and sidecar.options["level"] == "conversation"
    assert read_header(tmp_path / "out_conversations_mask").dtype == np.uint8


def test_shards_workers_and_restarts_change_nothing(prepare, tmp_path, monkeypatch):
    records = make_conversations(30)
    monkeypatch.setattr("dsv3_megatron.data.preprocess.BLOCK_BYTES", 2000)
    assert prepare(records, prefix="whole")[0] == 0
    for index in (2, 1, 3):
        assert prepare(records, "--shard", f"{index}/3", "--workers", "2", prefix="part")[0] == 0
    for name in ("conversations", "conversations_mask"):
        parts = find_datasets([str(tmp_path / f"part_{name}.shard-*")])
        assert len(parts) == 3
        merge_datasets(parts, str(tmp_path / f"part_{name}"))
        assert bytes_of(tmp_path / f"part_{name}")[:2] == bytes_of(tmp_path / f"whole_{name}")[:2]
    broken = [*records[:25], {"messages": []}, *records[25:]]
    status, _, err = prepare(broken, prefix="again")
    assert status == 2 and "finished work is kept" in err and not (tmp_path / "again_conversations.idx").exists()
    status, out, err = prepare(broken, "--resume", "--on-error", "skip", prefix="again")
    assert status == 0 and "left out: 1 no conversation" in out
    assert bytes_of(tmp_path / "again_conversations")[0] == bytes_of(tmp_path / "whole_conversations")[0]
    assert bytes_of(tmp_path / "again_conversations_mask")[0] == bytes_of(tmp_path / "whole_conversations_mask")[0]


def test_a_bad_conversation_stops_with_its_place_or_is_listed(prepare, tmp_path):
    good = make_conversations(2)
    bad = [{"messages": [{"role": "assistant", "content": "a"}]}, "{", {"prompt": "a", "completion": " "},
           {"messages": [{"role": "tool", "content": "x"}]}]
    for record, text in zip(bad, ("line 2, byte .*: message 1, the assistant's, stands at the beginning",
                                  "line 2, byte .*: invalid JSON",
                                  "line 2, .*: message 2, the assistant's, has no text",
                                  "line 2, .*: message 1, the tool's"), strict=True):
        status, _, err = prepare([good[0], record, good[1]])
        assert status == 2 and re.search(f"error: .*chat.jsonl, {text}", err), err
    status, out, _ = prepare([good[0], *bad, good[1]], "--on-error", "skip")
    assert status == 0 and "6 documents in, 2 written, 0 of them empty, 4 left out" in out
    assert "left out: 2 roles out of order\n" in out and "left out: 1 assistant turn without text" in out
    listed = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [2, 3, 4, 5]
    unanswered = {"messages": [*good[0]["messages"], {"role": "user", "content": "And?"}]}
    status, out, _ = prepare([unanswered], prefix="unanswered")
    assert status == 0 and "note: 1 conversations do not end with the assistant's turn" in out


def test_a_template_that_is_missing_or_of_another_job(prepare, tokenizer_dir, tmp_path, monkeypatch):
    records = make_conversations(3)
    status, _, err = prepare(records, model=tokenizer_dir)
    assert status == 2 and "has no chat template: neither" in err
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    given = ("--chat-template", file)
    monkeypatch.setattr("dsv3_megatron.data.preprocess.BLOCK_BYTES", 200)
    records.append({"x": 1})
    status, _, err = prepare(records, *given, model=tokenizer_dir)
    assert status == 2 and "by the borders of its turns" in err and "finished work is kept" in err
    file.write_text(file.read_text() + "{# another one #}")
    status, _, err = prepare(records, *given, "--resume", "--on-error", "skip", model=tokenizer_dir)
    assert status == 2 and "holds the unfinished work of another job, it differs in: transforms" in err


@pytest.mark.parametrize(("flags", "text"), [
    (["--append-eod"], "--append-eod cannot be combined with --sft: what surrounds a conversation is its chat templa"),
    (["--json-keys", "a"], "--json-keys cannot be combined with --sft"),
    (["--tokenizer-backend", "gigatoken"], "--tokenizer-backend gigatoken cannot be combined with --sft"),
])
def test_flags_of_texts_are_refused(prepare, capsys, flags, text):
    with pytest.raises(SystemExit, match="2"):
        prepare(make_conversations(1), *flags)
    assert text in capsys.readouterr().err


def test_only_json_lines_hold_conversations(chat_tokenizer, tmp_path, capsys):
    from dsv3_megatron.commands.preprocess import main

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    assert main(["--sft", "--input", str(tmp_path / "texts"), "--tokenizer-model", str(chat_tokenizer),
                 "--output-prefix", str(tmp_path / "o")]) == 2
    assert "is text: conversations are read from JSON lines (--sft); convert it" in capsys.readouterr().err


def test_tokens_that_touch_a_part_count():
    offsets = np.array([[0, 3], [3, 5], [5, 5], [5, 8], [8, 9], [8, 9]])
    assert counted_tokens(offsets, [(4, 6)]).tolist() == [0, 1, 1, 1, 0, 0]
    assert counted_tokens(offsets, [(0, 3), (8, 9)]).tolist() == [1, 0, 0, 0, 1, 1]
    with pytest.raises(RecordError, match="^no token for characters 9 to 10 of the rendered conversation"):
        counted_tokens(offsets, [(9, 11)])
