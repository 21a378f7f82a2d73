"""What a run's checkpoints keep of its text: the tokenizer, where a text ends, and how the training texts began.

A checkpoint that is moved to another machine still generates, evaluates and exports, because these files lie in it:

    hf_file.tokenizer.json, ...      the tokenizer's files and generation_config.json, as Hugging Face names them
    text_form.json                   the ids that every training text began and ended with

The tokenizer is the one that the run was given (`--tokenizer-model`), else that of the checkpoint which the run began
with. The files are read once, when a run starts, so that nothing depends on their places afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import TRACKER, read_sound_manifest
from dsv3_megatron.checkpoint.hf.source import DESCRIPTION, FILE_PREFIX, carried_files
from dsv3_megatron.config.json_files import parse_json, read_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.blend import parse_blend
from dsv3_megatron.data.special_tokens import GENERATION_CONFIG, TOKENIZER, read_stop_ids
from dsv3_megatron.data.text_form import TextForm, common_form, form_of_dataset
from dsv3_megatron.data.tokenizer import has_tokenizer, tokenizer_file

FORM = "text_form.json"
_SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
# Files of text by the beginnings of their names; the rest of what a Hugging Face folder carries is about its weights.
_TEXT_NAMES = ("tokenizer", "tokenization_", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template",
               "tiktoken", "generation_config", "tekken")


@dataclass(frozen=True)
class TextFiles:
    """The content of the files, by their names in a checkpoint's folder."""

    content: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files into a checkpoint's folder."""
        for name, content in self.content.items():
            (folder / name).write_bytes(content)


def collect_text_files(run: RunConfig) -> TextFiles:
    """Read what this run's checkpoints will keep of its text.

    Raises:
        ValueError: the checkpoint to load, a sidecar or a tokenizer's file is damaged.
    """
    loaded = _of_checkpoint(run.checkpoint.load) or _of_base(run.checkpoint.pretrained_checkpoint)
    given = run.data.tokenizer_model
    if given is not None and has_tokenizer(given):
        own = _of_folder(given)
        is_same = own[FILE_PREFIX + TOKENIZER] == loaded.get(FILE_PREFIX + TOKENIZER)
        content = (loaded if is_same else {}) | own
    else:
        content = loaded
    form = _form_of_data(run)
    if form is not None:
        text = json_text({"begin_ids": list(form.begin_ids), "end_ids": list(form.end_ids)})
        content = content | {FORM: text.encode()}
    return TextFiles(content)


def read_form(folder: Path) -> TextForm | None:
    """How the texts began and ended that a checkpoint was trained on; None where it does not say.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / FORM
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        return TextForm(tuple(content["begin_ids"]), tuple(content["end_ids"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; it holds begin_ids and end_ids, two lists of ids") from error


def form_of_checkpoint(folder: Path, prefixes: Sequence[str]) -> TextForm | None:
    """How the texts began and ended that a checkpoint was trained on: by its own file, else by its datasets' sidecars.

    Args:
        folder: The checkpoint's folder.
        prefixes: Datasets of its run, which may not be there any more.

    Returns:
        The form; None where nothing says it.

    Raises:
        ValueError: a file is damaged.
    """
    known = (form_of_dataset(prefix) for prefix in prefixes)
    return read_form(folder) or next((form for form in known if form is not None), None)


def stop_ids_of_checkpoint(folder: Path) -> tuple[int, ...] | None:
    """The ids at which a checkpoint's model stops, where its files say it; None where they do not.

    Raises:
        ValueError: a file is damaged.
    """
    stated, source = read_stop_ids(folder, prefix=FILE_PREFIX), _ids_of_source(folder).get("eos_token_id")
    return stated if source is None else tuple(dict.fromkeys([*(stated or ()), *source]))


def _form_of_data(run: RunConfig) -> TextForm | None:
    if not run.data.data_path:
        return None
    return common_form(parse_blend(run.data.data_path).prefixes)


def _of_folder(path: str) -> dict[str, bytes]:
    """The files of a tokenizer's folder, or beside the tokenizer.json that `path` names."""
    file = tokenizer_file(path)
    # A folder of tokenizers may hold another model's generation settings; those of a checkpoint stay.
    names = {entry.name: entry for entry in carried_files(file.parent)
             if entry.name.startswith(_TEXT_NAMES) and entry.name != GENERATION_CONFIG}
    return {FILE_PREFIX + name: entry.read_bytes() for name, entry in (names | {TOKENIZER: file}).items()}


def _of_base(folder: str | None) -> dict[str, bytes]:
    """The files of the model that a run begins with: a checkpoint's, or a Hugging Face folder's."""
    if folder is None or (Path(folder) / TRACKER).is_file():
        return _of_checkpoint(folder)
    files = {} if not has_tokenizer(folder) else _of_folder(folder)
    stated = Path(folder) / GENERATION_CONFIG
    return files | ({FILE_PREFIX + GENERATION_CONFIG: stated.read_bytes()} if stated.is_file() else {})


def _of_checkpoint(load: str | None) -> dict[str, bytes]:
    """The files of the checkpoint that a run goes on from; none for a Hugging Face folder or an empty one."""
    if load is None or not (Path(load) / TRACKER).is_file():
        return {}
    folder = read_sound_manifest(load)[0].path
    content = {file.name: file.read_bytes() for file in sorted(folder.glob(f"{FILE_PREFIX}*"))
               if file.name.removeprefix(FILE_PREFIX).startswith(_TEXT_NAMES)}
    if FILE_PREFIX + GENERATION_CONFIG not in content:
        stated = _ids_of_source(folder)
        if stated.get("eos_token_id") is not None:
            # Without generation settings the config.json says where a text ends, and a new export's says it anew.
            settings = {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items()}
            content[FILE_PREFIX + GENERATION_CONFIG] = (json_text(settings, indent=2) + "\n").encode()
    return content


def _ids_of_source(folder: Path) -> dict[str, Any]:
    """The special ids in the config.json that a converted checkpoint was made with; none for a run's."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return {}
    config = parse_json(read_json(file)["config"])
    found = {name: config[name] for name in _SPECIAL_IDS if config.get(name) is not None}
    if "eos_token_id" in found:
        eos = found["eos_token_id"]
        found["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    return found
