"""What a folder of either kind of checkpoint says of its model before its tensors are read.

For commands that take a run's checkpoint or a Hugging Face one alike (`dsv3 evaluate`, `dsv3 generate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import TRACKER, CheckpointError, check_architecture, read_manifest
from dsv3_megatron.checkpoint.hf.directory import CONFIG
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX
from dsv3_megatron.checkpoint.text_files import form_of_checkpoint
from dsv3_megatron.config.data import DOCUMENT_SWITCHES, DataConfig
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import HUGGING_FACE
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from dsv3_megatron.data.blend import parse_blend
from dsv3_megatron.data.special_tokens import TOKENIZER
from dsv3_megatron.data.text_form import TextForm
from dsv3_megatron.data.tokenizer import has_tokenizer

# Of a checkpoint that does not say what it was trained with.
_DEFAULT_SEQ_LENGTH = 4096


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The description that a checkpoint gives of its model.

    Attributes:
        model: Architecture that the checkpoint is of.
        preset: Name of the run that saved it, "hugging-face" if it does not say.
        seq_length: Tokens of a sequence in training, 4096 if it does not say.
        precision: Precision of the training, "auto" if the checkpoint does not say.
        load: Puts its tensors into stages, given these and their groups; None: `checkpoint.store.load_weights` does.
        switches: Document switches that it was trained with; None if it does not say.
        tokenizer_model: A tokenizer that is there.
        prefixes: Datasets that it was trained on, which may not be there.
        form: How the texts began and ended that it was trained on; None if nothing says it.
        training: Fields of TrainingConfig that it was trained with; none if it does not say.
    """

    model: ModelConfig
    preset: str = HUGGING_FACE
    seq_length: int = _DEFAULT_SEQ_LENGTH
    precision: str = "auto"
    load: Callable[[list[Any], Any], None] | None = None
    switches: tuple[str, ...] | None = None
    tokenizer_model: str | None = None
    prefixes: tuple[str, ...] = ()
    form: TextForm | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, load: str, training: TrainingConfig, parallel: ParallelConfig | None = None,
            data: DataConfig | None = None, *, verify_files: str = "read") -> RunConfig:
        """Describe a run that uses the checkpoint's model without its data.

        Args:
            load: The checkpoint's folder.
            training: Batch, sequence length, precision and modules of the run.
            parallel: Layout of the run; None: one process.
            data: Document switches of the run; None: documents are packed, and nothing keeps them apart.
            verify_files: How far files are compared with their checksums, as `CheckpointConfig` has it.
        """
        return RunConfig(self.preset, self.model, parallel or ParallelConfig(), training, data or DataConfig(),
                         CheckpointConfig(load=load, verify_files=verify_files), LoggingConfig())


@contextlib.contextmanager
def errors_of_base(folder: str) -> Iterator[None]:
    """Have errors of a checkpoint, which name `load`, name the setting that a run's base model is given by."""
    try:
        yield
    except CheckpointError as error:
        text = str(error).removeprefix(f"load={folder}").removeprefix(":").removeprefix(" ")
        raise CheckpointError(f"pretrained_checkpoint={folder}: {text}") from error


def open_checkpoint(load: str, *, verify_files: str = "read") -> OpenedCheckpoint:
    """What kind of checkpoint a folder holds, and of which model; reads no tensors.

    Args:
        load: The folder.
        verify_files: How far a Hugging Face folder is compared with its checksums, where it has them: "read", "all" or
            "none".

    Raises:
        CheckpointError: there is none, or it is damaged or of an architecture that this version does not know.
    """
    folder = Path(load)
    if not folder.is_dir():
        raise CheckpointError(f"load={load} does not exist; give a folder of checkpoints that a run saved, or of a "
                              "Hugging Face checkpoint")
    if (folder / TRACKER).is_file():
        return _open_own(load)
    if (folder / CONFIG).is_file():
        return _open_hugging_face(load, verify_files)
    raise CheckpointError(f"load={load} holds no checkpoint: neither {TRACKER}, as runs write it, nor {CONFIG}, as "
                          "Hugging Face's do")


def _open_own(load: str) -> OpenedCheckpoint:
    manifest = read_manifest(load)
    known = {item.name for item in dataclasses.fields(ModelConfig)}
    settings = {item.name for item in dataclasses.fields(TrainingConfig)}
    stored = manifest.run["model"]
    model = ModelConfig(**{name: value for name, value in stored.items() if name in known})
    empty = RunConfig(manifest.run["preset"], model, ParallelConfig(), TrainingConfig(), DataConfig(),
                      CheckpointConfig(), LoggingConfig())
    check_architecture(load, empty)  # a field that this version does not know
    data = manifest.run.get("data", {})
    prefixes = parse_blend(data["data_path"]).prefixes if data.get("data_path") else ()
    tokenizer, carried = data.get("tokenizer_model"), manifest.path / f"{FILE_PREFIX}{TOKENIZER}"
    return OpenedCheckpoint(
        model, manifest.run["preset"], manifest.run["training"]["seq_length"], manifest.precision,
        switches=tuple(name for name in DOCUMENT_SWITCHES if data.get(name)),
        tokenizer_model=next((path for path in (str(carried), tokenizer) if path and has_tokenizer(path)), None),
        prefixes=prefixes, form=form_of_checkpoint(manifest.path, prefixes),
        training={name: value for name, value in manifest.run["training"].items() if name in settings})


def _open_hugging_face(load: str, verify_files: str) -> OpenedCheckpoint:
    from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory

    directory = HuggingFaceDirectory(load, verify=verify_files)

    def load_into(stages: list[Any], groups: Any) -> None:
        from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face

        load_hugging_face(directory, stages, groups)

    return OpenedCheckpoint(directory.model, load=load_into, tokenizer_model=load if has_tokenizer(load) else None)
