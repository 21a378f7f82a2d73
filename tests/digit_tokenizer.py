"""A tokenizer of single characters with a chat template, for runs that answer sums: 24 ids, written in a moment."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
CHARACTERS = "0123456789+=? .-<>ab"
DIGIT_VOCAB = len(SPECIAL) + len(CHARACTERS)
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def write_digit_tokenizer(folder: Path, template: str = _TEMPLATE) -> str:
    """Write the tokenizer's files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {text: number for number, text in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def write_sums(file: Path, number: int = 12) -> str:
    """Write prompts of sums with their answers; returns the file."""
    file.write_text("".join(json.dumps({"prompt": f"{at % 10}+{at // 3}", "answer": str(at % 10 + at // 3)}) + "\n"
                            for at in range(number)))
    return str(file)
