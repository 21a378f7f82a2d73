"""Prompts: the three forms up to where an answer begins, as Transformers renders them; and lines that are none."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.chat import prompts as prompts_module
from dsv3_megatron.data.chat.prompts import open_chat_prompts
from dsv3_megatron.data.encoder import HuggingFaceEncoder

USER = {"role": "user", "content": "2+2?"}
EARLIER = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def write(tmp_path: Path, *records: object) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize(("record", "messages"), [
    ({"messages": [USER], "answer": "4"}, [USER]),
    ({"messages": [*EARLIER, USER], "answer": 4}, [*EARLIER, USER]),
    ({"prompt": "2+2?", "answer": "4"}, [USER]),
    ({"prompt": [*EARLIER, USER], "completion": "is not looked at", "answer": "4"}, [*EARLIER, USER]),
    ({"conversations": [{"from": "human", "value": "2+2?"}], "answer": "4", "level": 1}, [USER]),
])
def test_ids_are_those_of_transformers(tmp_path, chat_tokenizer, record, messages) -> None:
    file = write(tmp_path, record)
    prompts = open_chat_prompts(file, str(chat_tokenizer), longest=500, keys=("answer",))
    peer = AutoTokenizer.from_pretrained(chat_tokenizer)
    (prompt,) = prompts.prompts
    assert list(prompt.ids) == peer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt.record == record and prompt.line == 1 and prompts.num_dropped == 0


@pytest.mark.parametrize(("line", "told"), [
    ("{", r"line 2: invalid JSON"),
    ({"prompt": ""}, r"line 2: no 'answer', which a reward compares with; give one"),
    ({"messages": [*EARLIER], "answer": "4"}, "line 2: the last message is the assistant's; a prompt ends with"),
    ({"messages": [USER, USER | {"role": "system"}], "answer": "4"}, "line 2: message 2, the system's, stands behind"),
    ({"messages": [], "answer": "4"}, "line 2: 'messages' holds an empty list"),
    ({"text": "2+2?", "answer": "4"}, "line 2: no conversation"),
    ({"messages": [{"role": "tool", "content": "4"}], "answer": "4"}, "line 2: message 1, the tool's, stands at the"),
    ({"prompt": "2+2? " * 100, "answer": "4"}, r"line 2: the prompt has \d+ tokens, and seq_length \+ 1 - max_new_tok"),
])
def test_lines_that_are_no_prompts(tmp_path, chat_tokenizer, line, told) -> None:
    file = write(tmp_path, {"prompt": "2+2?", "answer": "4"}, line)
    with pytest.raises(ConfigError, match=told):
        open_chat_prompts(file, str(chat_tokenizer), longest=50, keys=("answer",))


def test_prompts_that_are_too_long_are_counted_and_left_out(tmp_path, chat_tokenizer) -> None:
    file = write(tmp_path, {"prompt": "2+2? " * 100}, "", {"prompt": "2+2?"})
    prompts = open_chat_prompts(file, str(chat_tokenizer), longest=50, is_dropping=True)
    assert [prompt.line for prompt in prompts.prompts] == [3] and prompts.num_dropped == 1
    with pytest.raises(ConfigError, match="has no prompt of at most 1 tokens"):
        open_chat_prompts(file, str(chat_tokenizer), longest=1, is_dropping=True)
    with pytest.raises(ConfigError, match=r"prompts=none.jsonl cannot be read: No such file"):
        open_chat_prompts("none.jsonl", str(chat_tokenizer), longest=50)


def test_each_epoch_has_each_prompt_once_in_another_order(tmp_path, chat_tokenizer) -> None:
    file = write(tmp_path, *({"prompt": f"{number}+1?"} for number in range(20)))
    prompts = open_chat_prompts(file, str(chat_tokenizer), longest=50)
    epochs = [[prompts.of_group(20 * epoch + place, 3).line for place in range(20)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 21)) and epochs[0] != epochs[1]
    assert [prompts.of_group(place, 4).line for place in range(20)] != epochs[0]


def test_a_run_makes_tokens_of_a_file_once_and_of_a_changed_one_again(
        tmp_path, chat_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(folder: str) -> HuggingFaceEncoder:
        made.append(folder)
        return HuggingFaceEncoder(folder)

    monkeypatch.setattr(prompts_module, "HuggingFaceEncoder", noted)
    file = write(tmp_path, {"prompt": "2+2?", "answer": "4"}, {"prompt": "2+2? " * 100, "answer": "4"})
    first = open_chat_prompts(file, str(chat_tokenizer), longest=50, is_dropping=True)
    assert open_chat_prompts(file, str(chat_tokenizer), longest=50, is_dropping=True, keys=("answer",)) == first
    assert len(open_chat_prompts(file, str(chat_tokenizer), longest=600).prompts) == 2 and len(made) == 1
    write(tmp_path, {"prompt": "3+3?", "answer": "6"}, {"prompt": "2+2? " * 100, "answer": "4", "more": 1})
    assert open_chat_prompts(file, str(chat_tokenizer), longest=600).prompts[0].record["answer"] == "6"
    assert len(made) == 2
