"""Lines to conversations: three forms that mean the same, and each way to be wrong, said with its message's number."""

import json

import pytest

from dsv3_megatron.data.chat.conversation import read_conversation
from dsv3_megatron.data.reading.json_lines import RecordError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TOOL = {"role": "tool", "content": "4"}


def read(record):
    return read_conversation(json.dumps(record))


@pytest.mark.parametrize("record", [
    {"messages": [SYSTEM, USER, ANSWER], "prompt": "of the data set's own"},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
    {"prompt": [SYSTEM, USER], "completion": "4"},
    {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "2+2?"},
                       {"from": "gpt", "value": "4"}]},
    {"system": "Be short.", "conversations": [{"from": "user", "value": "2+2?"}, {"from": "model", "value": "4"}]},
    {"conversations": [SYSTEM, USER, ANSWER]},
    {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                  ANSWER]},
])
def test_three_forms_of_one_conversation(record):
    assert list(read(record).messages) == [SYSTEM, USER, ANSWER]
    assert read(record).trained == [False, False, True]


def test_a_prompt_and_a_completion_are_a_users_and_an_assistants_turn():
    assert list(read({"prompt": "2+2?", "completion": "4"}).messages) == [USER, ANSWER]


def test_tools_and_weights():
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [USER, CALL, TOOL, TOOL, {**ANSWER, "weight": 0}, USER, ANSWER]
    for given in (tools, json.dumps(tools)):
        conversation = read({"messages": messages, "tools": given})
        assert conversation.tools == tools and conversation.messages[1]["content"] == ""
        assert conversation.trained == [False, True, False, False, False, False, True]
    assert read({"messages": [USER, ANSWER], "tools": ""}).tools is None


@pytest.mark.parametrize(("record", "reason", "text"), [
    ([1], "not an object", "a JSON list; each line must be one JSON object"),
    ({"text": "a"}, "no conversation", "no conversation (keys: text); give messages, prompt and completion, or conver"),
    ({"prompt": "a"}, "no conversation", "no conversation (keys: prompt)"),
    ({"messages": []}, "no conversation", "'messages' holds an empty list; it must be a list of messages"),
    ({"messages": "a"}, "no conversation", "'messages' holds a str"),
    ({"messages": [USER, "4"]}, "not a message", "message 2 has no 'role'"),
    ({"messages": [USER, {"role": "bot", "content": "4"}]}, "unknown role", "message 2 has the role 'bot'; name one"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "unknown role", "message 1 is from 'narrator'"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "assistant turn without text",
     "message 2, the assistant's, has no text; give it one, or leave the conversation out"),
    ({"messages": [USER, {"role": "assistant"}]}, "assistant turn without text", "message 2, the assistant's"),
    ({"messages": [{"role": "user"}, ANSWER]}, "message without text", "message 1 (user) has no 'content'"),
    ({"messages": [ANSWER, USER]}, "roles out of order", "message 1, the assistant's, stands at the beginning; it may "
     "stand behind the user's or behind the tool's"),
    ({"messages": [USER, ANSWER, ANSWER]}, "roles out of order", "message 3, the assistant's, stands behind the assis"),
    ({"messages": [USER, USER, ANSWER]}, "roles out of order", "message 2, the user's, stands behind the user's; it "
     "may stand at the beginning or behind the system's or behind the developer's or behind the assistant's"),
    ({"messages": [USER, ANSWER, SYSTEM]}, "roles out of order", "message 3, the system's, stands behind the assista"),
    ({"messages": [USER, TOOL]}, "roles out of order", "message 2, the tool's, stands behind the user's"),
    ({"messages": [SYSTEM, USER]}, "no assistant turn", "no turn of the assistant that counts; give the conversation"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant turn", "no turn of the assistant that counts"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight", "message 2 has the weight 0.5"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "content is not text",
     "message 2 has a content that is no text (a list); images and other parts cannot be trained on"),
    ({"messages": [USER, {"role": "assistant", "content": "a\ud800"}]}, "lone surrogate", "message 2 has a lone surr"),
    ({"messages": [USER, ANSWER], "tools": "[1"}, "tools not read", "'tools' is a text that is no JSON"),
    ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools not read", "'tools' holds a dict; give a list of tools"),
])
def test_what_cannot_be_trained_on_is_said(record, reason, text):
    with pytest.raises(RecordError) as error:
        read(record)
    assert error.value.reject.reason == reason and str(error.value).startswith(text)


def test_a_line_that_is_no_json():
    with pytest.raises(RecordError, match=r"^invalid JSON \(.*; each line must be one JSON object"):
        read_conversation('{"messages": [')
    with pytest.raises(RecordError, match="^invalid JSON"):
        read_conversation("[" * 200_000)
