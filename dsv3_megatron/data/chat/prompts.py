"""Prompts that a model answers while it learns: JSON lines, rendered by the chat template up to where an answer begins.

    {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}
    {"prompt": "2+2?", "answer": "4"}
    {"conversations": [{"from": "human", "value": "2+2?"}], "answer": "4"}

The forms are those of conversations (conversation.py), which end here with a user's or a tool's turn. What else a line
holds, `answer` among it, is for the rewards. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.chat.conversation import read_prompt
from dsv3_megatron.data.chat.template import find_chat_template
from dsv3_megatron.data.encoder import HuggingFaceEncoder
from dsv3_megatron.data.order import Permutation, derive_keys
from dsv3_megatron.data.reading.json_lines import RecordError
from dsv3_megatron.data.tokenizer import tokenizer_file

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig


@dataclass(frozen=True)
class ChatPrompt:
    """One prompt as tokens, with its line.

    Attributes:
        line: Number of its line in the file, counted from 1.
        ids: Token ids, up to where the answer begins.
        record: The line's JSON object.
    """

    line: int
    ids: tuple[int, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ChatPrompts:
    """The prompts of a file.

    Attributes:
        file: Path of the file.
        prompts: Prompts that are taken, in the order of their lines.
        num_dropped: Prompts that are too long, and left out.
        sha256: Hash of the file.
        tokenizer: Fingerprint of the tokenizer.
        eod_id: The id that fills a sequence behind the last answer.
    """

    file: str
    prompts: tuple[ChatPrompt, ...]
    num_dropped: int
    sha256: str
    tokenizer: str
    eod_id: int

    def of_group(self, number: int, seed: int) -> ChatPrompt:
        """The prompt of a group of answers, by the group's number in the run: each prompt once an epoch, shuffled."""
        epoch, place = divmod(number, len(self.prompts))
        order = Permutation(len(self.prompts), derive_keys("prompts", seed, epoch, count=8))
        return self.prompts[order[place]]


def open_run_prompts(run: RunConfig, file: str | None = None, *, keys: Sequence[str] = ()) -> ChatPrompts:
    """The prompts of a run of GRPO, or those of another file by the same settings.

    Args:
        run: A valid run.
        file: Path of a file; None: the run's own prompts.
        keys: Names of values that every line must have.

    Raises:
        ConfigError: a file or a line of it cannot be used.
    """
    assert run.policy.prompts is not None and run.data.tokenizer_model is not None
    return open_chat_prompts(
        file or run.policy.prompts, run.data.tokenizer_model, keys=keys,
        longest=run.longest_answer + 1 - run.policy.max_new_tokens,
        is_dropping=run.data.long_conversations == "drop",
        limit="seq_length" if run.longest_answer == run.training.seq_length else "max_position_embeddings")


def open_chat_prompts(file: str, tokenizer_model: str, *, longest: int, is_dropping: bool = False,
                      keys: Sequence[str] = (), limit: str = "seq_length") -> ChatPrompts:
    """Read a file of prompts, and make tokens of them.

    Args:
        file: Path of the JSON lines.
        tokenizer_model: Folder of the tokenizer, with its chat template.
        longest: Most tokens that a prompt may have.
        is_dropping: Leave longer ones out, and count them, instead of refusing the file.
        keys: Names of values that every line must have, for the rewards.
        limit: Name of the setting that `longest` follows from, for messages.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or a line that is none; the message has file and line.
        ValueError: the tokenizer or its chat template is missing or broken.
    """
    read = _read_prompts(os.fspath(file), _stamp(file), tokenizer_model, _stamp(tokenizer_file(tokenizer_model).parent))
    prompts, num_dropped = [], 0
    for prompt in read.prompts:
        missing = [key for key in keys if not isinstance(prompt.record.get(key), str | int | float)]
        if missing:
            problem = RecordError("no answer", f"no {missing[0]!r}, which a reward compares with", "give one")
            raise ConfigError(f"{file}, line {prompt.line}: {problem}")
        if len(prompt.ids) <= longest:
            prompts.append(prompt)
        elif is_dropping:
            num_dropped += 1
        else:
            raise ConfigError(
                f"{file}, line {prompt.line}: the prompt has {len(prompt.ids)} tokens, and {limit} + 1 - "
                f"max_new_tokens = {longest} are left for one; give a larger {limit}, a smaller max_new_tokens or "
                "long_conversations=drop")
    if not prompts:
        raise ConfigError(f"prompts={file} has no prompt of at most {longest} tokens; give JSON lines such as "
                          '{"prompt": "2+2?", "answer": "4"}')
    return replace(read, prompts=tuple(prompts), num_dropped=num_dropped)


def _stamp(path: str | os.PathLike[str]) -> tuple[tuple[str, int, int], ...]:
    """What tells a file, or the files of a folder, from others of their names; () where there is none."""
    root = Path(path)
    files = [entry for entry in sorted(root.iterdir()) if entry.is_file()] if root.is_dir() else [root]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())


@lru_cache(4)
def _read_prompts(file: str, _file_stamp: tuple[tuple[str, int, int], ...], tokenizer_model: str,
                  _tokenizer_stamp: tuple[tuple[str, int, int], ...]) -> ChatPrompts:
    """All prompts of a file, however long; a run asks for its checks, for its data's name and for its samples.

    Args other than the stamps, which tell files from others of their names, are those of `open_chat_prompts`.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"prompts={file} cannot be read: {error.strerror}; give a file of JSON lines") from error
    encoder, template = HuggingFaceEncoder(tokenizer_model), find_chat_template(tokenizer_model)
    prompts = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            conversation, record = read_prompt(line.decode("utf-8"))
            ids = encoder.encode(template.render(conversation, add_generation_prompt=True)).tolist()
        except (RecordError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}, line {number}: {error}") from error
        prompts.append(ChatPrompt(number, tuple(ids), record))
    return ChatPrompts(file, tuple(prompts), 0, hashlib.sha256(content).hexdigest(), encoder.fingerprint,
                       encoder.eod_id)
