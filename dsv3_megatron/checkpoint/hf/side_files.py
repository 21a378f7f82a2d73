"""Every file of an export besides its weights: what each one is made of, in one list.

    config.json                    the architecture
    model.safetensors.index.json   where there are several files of weights
    tokenizer files                the tokenizer's, with a length that the model has
    generation_config.json         ids that begin, end and pad a text
    README.md                      model card: what this is, how it was trained, who can read it

A checkpoint that becomes its Hugging Face source again has that one's files instead, as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.config_json import QUANTIZATION, model_config_to_json
from dsv3_megatron.checkpoint.hf.directory import CONFIG, INDEX
from dsv3_megatron.checkpoint.hf.model_card import Losses, model_card
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX, carried_files
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.weight_files import WeightFile, index_json
from dsv3_megatron.checkpoint.text_files import read_form
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import parse_json, read_json
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.special_tokens import (
    GENERATION_CONFIG,
    SETTINGS,
    TOKENIZER,
    SpecialTokens,
    read_special_tokens,
)
from dsv3_megatron.data.text_form import TextForm
from dsv3_megatron.data.tokenizer import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, load_tokenizer

logger = logging.getLogger(__name__)

CARD = "README.md"
_TORCH_NAMES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class SideFiles:
    """Files of an export besides its weights.

    Attributes:
        texts: What to write, by the file's name.
        copies: What to copy, by the file's name in the result.
    """

    texts: Mapping[str, str]
    copies: Mapping[str, Path]


def side_files(weights: MegatronWeights, model: ModelConfig, shards: Sequence[WeightFile], *, dtype: str,
               is_again: bool, tokenizer: Path | None, license_id: str, losses: Losses | None) -> SideFiles:
    """The files that go with these weights.

    Args:
        weights: The checkpoint.
        model: The architecture as exported: without MTP modules where these are left out.
        shards: The files of weights.
        dtype: Dtype of the export: "bf16", "fp8" or "fp32".
        is_again: The checkpoint becomes its source again, byte for byte.
        tokenizer: Folder of the tokenizer; None: what the checkpoint carries, which may be nothing.
        license_id: The hub's name of a licence, for the model card.
        losses: Last losses of the run, where they are known.

    Raises:
        CheckpointError: a file of the tokenizer cannot be read, or the architecture cannot be exported.
    """
    copies = _carried(weights, tokenizer)
    _note_other_form(copies, weights.manifest.path)
    source = weights.source
    if source is not None and is_again:
        texts = {CONFIG: source.config} | ({INDEX: source.index} if source.index is not None else {})
        return SideFiles(texts, copies)
    texts = {}
    if len(shards) > 1:
        texts[INDEX] = _json(index_json(shards))
    if source is not None:
        texts[CONFIG] = _json(_changed_config(parse_json(source.config), model, dtype))
    else:
        ids = special_ids(copies)
        texts[CONFIG] = _json(model_config_to_json(
            model, dtype=_TORCH_NAMES[dtype], is_fp8=dtype == "fp8", bos_token_id=ids.bos_id, eos_token_id=ids.eos_id,
            pad_token_id=ids.pad_id))
        if SETTINGS in copies:
            texts[SETTINGS] = _tokenizer_settings(copies.pop(SETTINGS), model)
        if GENERATION_CONFIG not in copies and TOKENIZER in copies:
            texts[GENERATION_CONFIG] = _json(_generation(ids))
    if CARD not in copies:
        texts[CARD] = model_card(model, weights.manifest, shards, dtype=dtype, license_id=license_id, losses=losses,
                                 has_tokenizer=TOKENIZER in copies, is_average=weights.is_average)
    return SideFiles(texts, copies)


def special_ids(files: Mapping[str, Path]) -> SpecialTokens:
    """The special ids of the tokenizer among an export's files; none of them known where there is no tokenizer.

    Args:
        files: The files, by their names in the result.

    Raises:
        ValueError: the tokenizer is damaged.
    """
    file = files.get(TOKENIZER)
    if file is None:
        return SpecialTokens()
    tokenizer = load_tokenizer(file)
    found = read_special_tokens(tokenizer, file)
    # A tokenizer without settings beside it may still be one of V3's.
    def either(named: int | None, token: str) -> int | None:
        return tokenizer.token_to_id(token) if named is None else named

    return replace(found, bos_id=either(found.bos_id, BOS_TOKEN), eos_id=either(found.eos_id, EOS_TOKEN),
                   pad_id=either(found.pad_id, PAD_TOKEN))


def _note_other_form(files: Mapping[str, Path], checkpoint: Path) -> None:
    """Say so where the tokenizer puts other ids around a text than the training texts had."""
    form, file = read_form(checkpoint), files.get(TOKENIZER)
    if form is None or file is None:
        return
    special = read_special_tokens(load_tokenizer(file), file)
    if (special.begin_ids, special.end_ids) != (form.begin_ids, form.end_ids):
        logger.warning("the texts of training %s, while the exported tokenizer makes texts that %s: readers of the "
                       "export should encode with add_special_tokens=False", form,
                       TextForm(special.begin_ids, special.end_ids))


def _carried(weights: MegatronWeights, tokenizer: Path | None) -> dict[str, Path]:
    """Files that are copied as they are, by their name in the result."""
    folder = weights.manifest.path
    files = {file.name.removeprefix(FILE_PREFIX): file for file in sorted(folder.glob(FILE_PREFIX + "*"))}
    if tokenizer is None:
        return files
    if not tokenizer.is_dir():
        raise ConfigError(f"tokenizer={tokenizer} is not a folder")
    return files | {file.name: file for file in carried_files(tokenizer)
                    if file.name != GENERATION_CONFIG and not file.name.endswith((".py", ".md"))}


def _changed_config(content: dict[str, Any], model: ModelConfig, dtype: str) -> dict[str, Any]:
    """A source's own `config.json`, changed in what the dtype and the MTP modules change."""
    content.pop("quantization_config", None)
    for name in ("torch_dtype", "dtype"):
        if name in content:
            content[name] = _TORCH_NAMES[dtype]
    if dtype == "fp8":
        content["quantization_config"] = dict(QUANTIZATION)
    if not model.mtp_num_layers:
        content.pop("num_mtp_layers", None)
        content["num_nextn_predict_layers"] = 0
    return content


def _generation(ids: SpecialTokens) -> dict[str, Any]:
    """Content of generation_config.json. Where nothing pads, the end does: whoever generates in batches has to pad."""
    pad = ids.eos_id if ids.pad_id is None else ids.pad_id
    content = {"_from_model_config": True, "bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "pad_token_id": pad}
    return {name: value for name, value in content.items() if value is not None}


def _tokenizer_settings(file: Path, model: ModelConfig) -> str:
    """tokenizer_config.json with a length that the model has: a longer one lets texts through that are too long."""
    content = _read(file)
    stated = content.get("model_max_length")
    if isinstance(stated, int | float) and stated <= model.max_position_embeddings:
        return file.read_text(encoding="utf-8")
    return _json({**content, "model_max_length": model.max_position_embeddings})


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _json(content: dict[str, Any]) -> str:
    return json_text(content, indent=2, ensure_ascii=False) + "\n"
