"""One line of JSON to a conversation, and every way in which it can be wrong.

Three forms are read:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}   OpenAI, Hugging Face
    {"prompt": "...", "completion": "..."}      texts, or lists of messages, of which the second goes on from the first
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}       ShareGPT

`tools`, beside any of them, goes to the template as it is. The order of roles is: a system message at most, at the
beginning; then a user's; an assistant's behind a user's or a tool's; a tool's behind an assistant's or another tool's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.data.reading.json_lines import RecordError

ChatMessage = dict[str, Any]

# Which role may come before a role; None: the beginning.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
                   "assistant": "assistant", "model": "assistant", "observation": "tool", "tool": "tool"}
_FORMS = "messages, prompt and completion, or conversations"


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, in order.

    Attributes:
        messages: Messages as a chat template reads them, each with its `role` and, but for tool calls, a text as its
            `content`.
        tools: Tools that the model may call, as a template reads them; None: none.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Any] | None = None

    @property
    def trained(self) -> list[bool]:
        """Whether each message is the assistant's and counts: OpenAI's `weight` of 0 leaves one out."""
        return [message["role"] == "assistant" and message.get("weight", 1) != 0 for message in self.messages]


def read_conversation(line: str) -> Conversation:
    """Read the conversation that a line of JSON holds.

    Args:
        line: One JSON object.

    Raises:
        RecordError: the line holds no conversation in one of the three forms, or one that cannot be trained on: a role
            is unknown or out of order, an assistant's turn has no text, or the assistant never speaks.
    """
    conversation = _conversation_of(_record_of(line))
    if not any(conversation.trained):
        raise RecordError("no assistant turn", "no turn of the assistant that counts",
                          "give the conversation an answer, or leave it out")
    return conversation


def read_prompt(line: str) -> tuple[Conversation, dict[str, Any]]:
    """Read the conversation that a line of JSON holds up to where the assistant is to answer, and the whole object.

    Args:
        line: One JSON object, in one of the forms of `read_conversation`; of `prompt` and `completion` the first.

    Raises:
        RecordError: the line holds no such conversation, or the last turn is not a user's or a tool's.
    """
    record = _record_of(line)
    is_text = "prompt" in record and "messages" not in record and "conversations" not in record
    asked = {**record, "messages": _turns("prompt", "user", record["prompt"])} if is_text else record
    conversation = _conversation_of(asked)
    last = conversation.messages[-1]["role"]
    if last not in _BEFORE["assistant"]:
        raise RecordError("no question", f"the last message is the {last}'s", "a prompt ends with a user's or a tool's")
    return conversation, record


def _record_of(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid JSON", f"invalid JSON ({error})", "each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise RecordError("not an object", f"a JSON {type(record).__name__}", "each line must be one JSON object")
    return record


def _conversation_of(record: Mapping[str, Any]) -> Conversation:
    messages = [_checked(message, number) for number, message in enumerate(_messages_of(record), start=1)]
    conversation = Conversation(messages, _tools_of(record))
    _check_order(messages)
    return conversation


def _messages_of(record: Mapping[str, Any]) -> list[Any]:
    """The messages of a record, in OpenAI's form, not checked."""
    if "messages" in record:
        return _list_of("messages", record["messages"])
    if "conversations" in record:
        entries = _list_of("conversations", record["conversations"])
        messages = [_of_sharegpt(entry, number) for number, entry in enumerate(entries, start=1)]
        system = record.get("system")
        return [{"role": "system", "content": system}, *messages] if system else messages
    if "prompt" in record and "completion" in record:
        return [*_turns("prompt", "user", record["prompt"]), *_turns("completion", "assistant", record["completion"])]
    found = ", ".join(sorted(map(str, record))) or "none"
    raise RecordError("no conversation", f"no conversation (keys: {found[:200]})", f"give {_FORMS}")


def _list_of(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecordError("no conversation", f"{key!r} holds {_kind(value)}",
                          "it must be a list of messages, with at least one")
    return value


def _turns(key: str, role: str, value: Any) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _list_of(key, value)


def _of_sharegpt(entry: Any, number: int) -> Any:
    """One turn in ShareGPT's form; one in OpenAI's form under ShareGPT's key stays as it is."""
    if not isinstance(entry, dict) or "role" in entry:
        return entry
    role = _SHAREGPT_ROLES.get(entry["from"]) if isinstance(entry.get("from"), str) else None
    if role is None:
        raise RecordError("unknown role", f"message {number} is from {entry.get('from')!r}",
                          f"name one of {', '.join(_SHAREGPT_ROLES)}")
    rest = {name: value for name, value in entry.items() if name not in ("from", "value")}
    return {"role": role, "content": entry.get("value"), **rest}


def _tools_of(record: Mapping[str, Any]) -> Sequence[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):  # Parquet has no column of any JSON, so that data sets keep tools as text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RecordError("tools not read", f"'tools' is a text that is no JSON ({error})",
                              "give a list of tools, or the JSON text of one") from None
    if tools is not None and not isinstance(tools, list):
        raise RecordError("tools not read", f"'tools' holds {_kind(tools)}", "give a list of tools")
    return tools or None


def _checked(message: Any, number: int) -> ChatMessage:
    """One message, whose content is a text or, for an assistant that calls tools, may be missing."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RecordError("not a message", f"message {number} has no 'role'",
                          "each message is an object with a role and a content")
    role = message["role"]
    if role not in _BEFORE:
        raise RecordError("unknown role", f"message {number} has the role {role!r}",
                          f"name one of {', '.join(_BEFORE)}")
    calls, content = bool(message.get("tool_calls")), _text_of(message.get("content"), number)
    if role == "assistant" and not calls and not (content or "").strip():
        raise RecordError("assistant turn without text", f"message {number}, the assistant's, has no text",
                          "give it one, or leave the conversation out")
    if content is None and not calls:
        raise RecordError("message without text", f"message {number} ({role}) has no 'content'",
                          "its content must be a text")
    if message.get("weight", 1) not in (0, 1):
        raise RecordError("weight", f"message {number} has the weight {message['weight']!r}",
                          "a message's weight is 1, or 0 for one that is not trained on")
    return {**message, "content": "" if content is None else content}


def _text_of(content: Any, number: int) -> str | None:
    """The text of a message; of OpenAI's content parts, which must all be texts, joined."""
    if content is None or isinstance(content, str):
        if content and not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise RecordError("lone surrogate", f"message {number} has a lone surrogate",
                              "it stands for no character: remove it")
        return content
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        if all(isinstance(text, str) for text in texts):
            return _text_of("".join(map(str, texts)), number)
    raise RecordError("content is not text", f"message {number} has a content that is no text ({_kind(content)})",
                      "images and other parts cannot be trained on: leave the conversation out")


def _check_order(messages: Sequence[ChatMessage]) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if before not in _BEFORE[role]:
            place = f"behind the {before}'s" if before else "at the beginning"
            allowed = " or ".join("at the beginning" if name is None else f"behind the {name}'s"
                                  for name in _BEFORE[role])
            raise RecordError("roles out of order", f"message {number}, the {role}'s, stands {place}",
                              f"it may stand {allowed}")
        before = role


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "an empty list" if value == [] else f"a {type(value).__name__}"
