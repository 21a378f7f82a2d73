"""Chat templates: texts are those of Transformers' `apply_chat_template`, parts those that it marks."""

import json

import pytest
from transformers import AutoTokenizer

from dsv3_megatron.data.chat.conversation import Conversation
from dsv3_megatron.data.chat.template import ChatTemplate, find_chat_template
from dsv3_megatron.data.reading.json_lines import RecordError
from tests.unit.data.chat.conftest import make_conversations

CHATML = (
    "{% for message in messages %}\n    <|im_start|>{{ message.role }}\n"
    "    {% if message.role == 'assistant' %}\n"
    "        {% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}\n{{ message.content }}<|im_end|>\n    {% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What templates in use do: namespaces, loop controls, tojson, macros, tools, white space taken off.
BUSY = (
    "{%- macro turn(m) -%}[{{ m.role }}] {{ m.content | trim }}{%- endmacro -%}"
    "{{- bos_token }}{% set ns = namespace(seen=0) %}{% if tools %}{{ tools | tojson(indent=2) }} <&> {% endif %}"
    "{%- for m in messages -%}{% if m.role == 'system' %}{% set ns.seen = ns.seen + 1 %}{{ m.content }}"
    "{%- continue %}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{%- if m.role == 'assistant' %}{%- generation %} {{ m.content }}{{ eos_token }}{% endgeneration -%}"
    "{% else %}{{ turn(m) }}{% endif %}{%- endfor %}{{ ns.seen }}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def template(source, **tokens):
    return ChatTemplate(source, tokens=tokens, place="here")


def conversation(*contents, **fields):
    roles = ("user", "assistant")
    return Conversation([{"role": roles[n % 2], "content": text, **fields} for n, text in enumerate(contents)])


@pytest.mark.parametrize("source", [None, CHATML, BUSY])
def test_texts_and_marks_are_transformers(chat_tokenizer, source):
    peer = AutoTokenizer.from_pretrained(chat_tokenizer)
    if source is None:
        mine = find_chat_template(chat_tokenizer)
    else:
        peer.chat_template = source
        mine = template(source, bos_token=peer.bos_token, eos_token=peer.eos_token, pad_token=peer.pad_token)
    tools = [{"name": "größe", "parameters": {"a": "<b>"}}]
    assert mine.has_marks
    for number, record in enumerate(make_conversations(40)):
        messages, given = record["messages"], tools if number % 2 else None
        seen = Conversation(messages, given)
        expected = peer.apply_chat_template(messages, tools=given, tokenize=False)
        text, parts = mine.render_parts(seen)
        assert text == expected == mine.render(seen)
        assert mine.render(seen, add_generation_prompt=True) == peer.apply_chat_template(
            messages, tools=given, tokenize=False, add_generation_prompt=True)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [text[first:stop].strip().removesuffix("<|im_end|>").removesuffix(peer.eos_token).strip()
                for first, stop in parts] == [content.strip() for content in said]


def test_without_marks_turns_end_where_the_next_begins():
    text, parts = template(PLAIN).render_parts(conversation("a?", "b.", "c?", "d."))
    assert text == "<user>a?</user>\n<assistant>b.</assistant>\n<user>c?</user>\n<assistant>d.</assistant>\n"
    assert [text[first:stop] for first, stop in parts] == ["b.</assistant>\n", "d.</assistant>\n"]


@pytest.mark.parametrize("source", [PLAIN, CHATML])
def test_a_weight_of_0_leaves_a_turn_out(source):
    seen = Conversation([{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b.", "weight": 0},
                         {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d."}])
    text, parts = template(source).render_parts(seen)
    assert len(parts) == 1 and text[parts[0][0]:parts[0][1]].startswith("d.")


@pytest.mark.parametrize(("source", "contents", "text"), [
    ("{{ raise_exception('no ' + messages[0].role) }}", ("a", "b"),
     "the chat template fails: TemplateError: no user; mend the template or the conversation"),
    ("{{ messages[0].content + 1 }}", ("a", "b"), "the chat template fails: TypeError"),
    ("{{ messages[7].content.x }}", ("a", "b"), "the chat template fails: UndefinedError"),
    ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", ("a", "b"), "the chat template fails: SecurityError"),
    ("{{ range(10**9) | list }}", ("a", "b"), "the chat template fails: OverflowError"),
    ("{{ strftime_now('%d') }}", ("a", "b"), "the chat template fails: UndefinedError: 'strftime_now' is undefined"),
    # Earlier answers are left out of the text, as templates of models that think do.
    ("{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }};{% endfor %}",
     ("a", "b", "c", "d"), "the text of message 2, the assistant's, does not follow that of the messages before it"),
    (CHATML, ("a", "b\ufdd0"), "message 2 has a code point U+FDD0 or U+FDD1; Unicode keeps it"),
    ("{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ x[:-1] }}", ("a", "b"),
     "the chat template has {% generation %} inside another one, or changes what is between"),
])
def test_what_goes_wrong_with_one_conversation(source, contents, text):
    with pytest.raises(RecordError) as error:
        template(source).render_parts(conversation(*contents))
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(("source", "message"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "TimeoutError: it computes for"),
    ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
    ("{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "MemoryError"),
    ("{{ 9 ** (9 ** 9) }}", "TemplateError: a power of 387420489; at most 1000 is computed"),
    ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
])
def test_a_template_that_would_take_all_time_or_memory_is_stopped(monkeypatch, source, message):
    monkeypatch.setattr("dsv3_megatron.data.chat.template._MOST_SECONDS", 0.2)
    with pytest.raises(RecordError, match=f"the chat template fails: {message}"):
        template(source).render(conversation("a", "b"))
    assert template("{{ 2 ** 10 }}").render(conversation("a", "b")) == "1024"


def test_marks_around_nothing_are_refused():
    """As where the name of a role is misspelt: every mask would be empty, and the run would learn nothing from it."""
    source = "{% for m in messages %}{% if m.role == 'asistant' %}{% generation %}{{ m.content }}{% endgeneration %}" \
             "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(RecordError, match="the template marks no part of a conversation with 2 turns of the assistant"):
        template(source).render_parts(conversation("a", "b", "c", "d"))


def test_a_weight_that_the_marks_cannot_follow():
    source = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    seen = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                         {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}])
    with pytest.raises(RecordError, match="the template marks 1 parts of 2 assistant turns; so a weight of 0"):
        template(source).render_parts(seen)


def test_where_a_template_is_looked_for(tokenizer_dir, chat_tokenizer, tmp_path):
    own, settings = chat_tokenizer / "chat_template.jinja", json.loads((chat_tokenizer / "tokenizer_config.json")
                                                                      .read_text())
    assert find_chat_template(chat_tokenizer).place == str(own)
    with pytest.raises(ValueError, match=r"^tokenizer_model=.* has no chat template: neither .*chat_template.jinja nor "
                       r"chat_template in tokenizer_config.json; write one there, or give --chat-template FILE"):
        find_chat_template(tokenizer_dir)
    (tmp_path / "tokenizer.json").write_text((chat_tokenizer / "tokenizer.json").read_text())
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]
    for value, expected in (("s", "s"), (several, f"{settings['bos_token']}d")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": value}))
        assert find_chat_template(tmp_path).render(conversation("a", "b")) == expected
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several[:1]}))
    with pytest.raises(ValueError, match="has the chat templates tool_use and none that is called default"):
        find_chat_template(tmp_path)
    with pytest.raises(ValueError, match="^chat_template=.*gone is no file"):
        find_chat_template(tmp_path, tmp_path / "gone")
    (tmp_path / "broken").write_text("a\n{% if %}")
    with pytest.raises(ValueError, match=r"broken, line 2 is no chat template that can be used: "):
        find_chat_template(tmp_path, tmp_path / "broken")
