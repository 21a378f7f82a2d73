"""A tokenizer's chat template: a conversation as the text that the model reads, and where the assistant's parts lie.

Templates are Jinja2's, run as Transformers' `apply_chat_template` runs them: in Jinja2's sandbox, with its names
(`messages`, `tools`, `add_generation_prompt`, the special tokens, `raise_exception`, `tojson`). A template is read from
where Transformers reads it: chat_template.jinja in the tokenizer's folder, else `chat_template` in
tokenizer_config.json. It is a program, and may be a stranger's: rendering a conversation has bounds of time, memory
and powers of numbers. What depends on the clock (`strftime_now`) is not there: the same lines must give the same data
on any day; most templates then take a date of their own.

What the assistant says is found in one of two ways:

    marks   the template has {% generation %} ... {% endgeneration %} around it
    turns   it is what a rendering of the messages up to and with the assistant's has beyond one of those before it,
            which ends with the template's generation prompt

A token counts where any of its characters lies between the first and the last of a part, as in Transformers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.chat.conversation import Conversation
from dsv3_megatron.data.reading.json_lines import RecordError
from dsv3_megatron.data.special_tokens import SETTINGS, read_beside, special_token_names
from dsv3_megatron.data.tokenizer import tokenizer_file
from dsv3_megatron.process.bounds import bounded

TEMPLATE_FILE = "chat_template.jinja"
# Two code points that Unicode keeps for programs' own use: texts have none of them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# What an expression of a template can meet in a message, and the bounds of a rendering.
_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TimeoutError,
           TypeError, ValueError)
_MOST_SECONDS, _MOST_BYTES, _MOST_EXPONENT = 2.0, 1_000_000_000, 1000
_WAY_OUT = "mend the template or the conversation, or leave the conversation out"


class ChatTemplate:
    """One chat template, compiled and ready to render.

    Args:
        source: Text of the template.
        tokens: Texts of the special tokens by their names, such as bos_token.
        place: Place where the template was found, for messages.

    Raises:
        ValueError: the text is no template.
    """

    def __init__(self, source: str, *, tokens: Mapping[str, str], place: str) -> None:
        self.source, self.place, self._tokens = source, place, dict(tokens)
        environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[_GenerationMarks, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            with bounded(_MOST_SECONDS, _MOST_BYTES):  # Jinja2 computes constants
                self._template = environment.from_string(source)
                self.has_marks = any(environment.parse(source).find_all(nodes.ExtensionAttribute))
        except (MemoryError, RecursionError, SyntaxError, TimeoutError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{place} is no chat template that can be used: {why}") from error
        except TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(f"{place}{line} is no chat template that can be used: {error.message}") from error

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            conversation: Messages to render.
            add_generation_prompt: End with what the template puts before an answer.

        Raises:
            RecordError: the template fails on the conversation, or says that it must not be.
        """
        text = self._render(conversation.messages, conversation, add_generation_prompt=add_generation_prompt)
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def render_parts(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the parts of it that count in the loss: [first, stop) characters, in order.

        Raises:
            RecordError: the template fails, or the parts cannot be told.
        """
        for number, message in enumerate(conversation.messages, start=1):
            content = message["content"]
            if not content.isascii() and (_OPEN in content or _CLOSE in content):
                raise RecordError("noncharacter", f"message {number} has a code point U+FDD0 or U+FDD1",
                                  "Unicode keeps it for programs' own use: remove it")
        marked = self._render(conversation.messages, conversation)
        if not self.has_marks:
            return marked, self._turns(marked, conversation)
        text, parts = _without_marks(marked)
        trained = [is_trained for is_trained, message in zip(conversation.trained, conversation.messages, strict=True)
                   if message["role"] == "assistant"]
        if not parts:
            raise RecordError("nothing marked", "the template marks no part of a conversation with "
                              f"{len(trained)} turns of the assistant: nothing of it would count", _WAY_OUT)
        if all(trained):
            return text, parts
        if len(parts) != len(trained):
            raise RecordError("weight", f"the template marks {len(parts)} parts of {len(trained)} assistant turns",
                              "so a weight of 0 cannot be followed: leave the weights out, or the conversation")
        return text, [part for part, is_trained in zip(parts, trained, strict=True) if is_trained]

    def _turns(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        messages, parts = conversation.messages, []
        for number, is_trained in enumerate(conversation.trained):
            if not is_trained:
                continue
            before = self._render(messages[:number], conversation, add_generation_prompt=True)
            after = text if number + 1 == len(messages) else self._render(messages[: number + 1], conversation)
            if not (text.startswith(after) and after.startswith(before)):
                raise RecordError(
                    "turns not found", f"the text of message {number + 1}, the assistant's, does not follow that of "
                    "the messages before it: the template changes what was said earlier",
                    "put {% generation %} ... {% endgeneration %} around the assistant's part of the template")
            parts.append((len(before), len(after)))
        return parts

    def _render(self, messages: Sequence[Any], conversation: Conversation, *, add_generation_prompt: bool = False
                ) -> str:
        try:
            with bounded(_MOST_SECONDS, _MOST_BYTES):
                return self._template.render(messages=list(messages), tools=conversation.tools, documents=None,
                                             add_generation_prompt=add_generation_prompt, **self._tokens)
        except _ERRORS as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RecordError("template failed", f"the chat template fails: {why}", _WAY_OUT) from error


def find_chat_template(tokenizer_model: str | os.PathLike[str], file: str | os.PathLike[str] | None = None
                       ) -> ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer_model: Folder of the tokenizer, or its tokenizer.json.
        file: File with a template to use instead of the tokenizer's own; None: that one.

    Raises:
        ValueError: there is none, or it is no template.
    """
    tokenizer = tokenizer_file(tokenizer_model)
    own = tokenizer.with_name(TEMPLATE_FILE)
    source: Any
    if file is not None:
        place = Path(file)
        if not place.is_file():
            raise ValueError(f"chat_template={os.fspath(file)} is no file; give one with a Jinja2 template")
        source = place.read_text(encoding="utf-8")
    elif own.is_file():
        place, source = own, own.read_text(encoding="utf-8")
    else:
        place = tokenizer.with_name(SETTINGS)
        source = read_beside(tokenizer, SETTINGS).get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
            if source is None:
                raise ValueError(f"{place} has the chat templates {', '.join(map(str, named))} and none that is called "
                                 "default; give the one to use with --chat-template FILE")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"tokenizer_model={os.fspath(tokenizer_model)} has no chat template: neither {own} nor "
                         f"chat_template in {SETTINGS}; write one there, or give --chat-template FILE (one in "
                         "DeepSeek-V3's form is examples/chat_template.jinja)")
    return ChatTemplate(source, tokens=special_token_names(tokenizer), place=str(place))


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no power of numbers takes longer than an instruction should: nothing interrupts it."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The value of `left ** right`."""
        if isinstance(right, int) and abs(right) > _MOST_EXPONENT:
            raise TemplateError(f"a power of {str(right)[:20]}; at most {_MOST_EXPONENT} is computed")
        return super().call_binop(context, operator, left, right)


class _GenerationMarks(Extension):
    """The block {% generation %} ... {% endgeneration %}, whose text comes out between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block from its name to its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the parts between them."""
    pieces, parts, length = [], [], 0
    for number, piece in enumerate(marked.split(_OPEN)):
        inside, mark, outside = piece.partition(_CLOSE) if number else ("", "", piece)
        if number and (not mark or _CLOSE in outside):
            raise RecordError("template failed", "the chat template has {% generation %} inside another one, or "
                              "changes what is between it and its end", _WAY_OUT)
        if inside:
            parts.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), parts


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # Not Jinja2's own, which escapes for HTML.
    return json_text(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
