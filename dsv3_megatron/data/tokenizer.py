"""A byte-level BPE tokenizer in the shape of DeepSeek-V3's: trained, saved, loaded, identified.

The pre-tokenizer is the one in DeepSeek-V3's published tokenizer.json: numbers in groups of up to three digits, runs of
Chinese and Japanese characters, and a rule that keeps punctuation together with the line breaks that follow it (report,
section 4.1). Special tokens carry V3's names; the three that every text needs have V3's ids 0, 1 and 2, the others
(FIM, chat, tools) come after the learned vocabulary, as in V3. The random splitting of punctuation + line break tokens
during pre-training (report, section 4.1) is not part of a tokenizer file: see combined_tokens.py. The command that
trains is dsv3 train-tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.folder_checksums import CHECKSUMS, require_whole, write_folder_checksums
from dsv3_megatron.data.special_tokens import BESIDE, special_token_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
FIM_HOLE_TOKEN = "<｜fim▁hole｜>"
FIM_BEGIN_TOKEN = "<｜fim▁begin｜>"
FIM_END_TOKEN = "<｜fim▁end｜>"
LEADING_SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)  # ids 0, 1, 2
TRAILING_SPECIAL_TOKENS = (
    FIM_HOLE_TOKEN,
    FIM_BEGIN_TOKEN,
    FIM_END_TOKEN,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
PRE_TOKENIZER_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_NUM_BYTE_SYMBOLS = 256
MIN_VOCAB_SIZE = len(LEADING_SPECIAL_TOKENS) + _NUM_BYTE_SYMBOLS + len(TRAILING_SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 18  # twice DeepSeek-V3's 129,280: beyond lies a slip of the keyboard


def check_training(vocab_size: int, min_frequency: int = 1) -> None:
    """Refuse what `train_tokenizer` would, before any text is read.

    Raises:
        ValueError: vocab_size is below the special tokens and the 256 bytes or above MAX_VOCAB_SIZE, or min_frequency
            is below 1.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE} (256 bytes and "
            f"{MIN_VOCAB_SIZE - _NUM_BYTE_SYMBOLS} special tokens); try 4096"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at most {MAX_VOCAB_SIZE}; DeepSeek-V3 has 129280")
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} must be at least 1; try 2")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 1, show_progress: bool = False
) -> Tokenizer:
    """Learn byte-level BPE merges from texts; their order makes no difference.

    Args:
        texts: The training texts; each is pre-tokenized on its own.
        vocab_size: Ids in total, special tokens included. Texts with too few distinct words give fewer: see
            `Tokenizer.get_vocab_size()`.
        min_frequency: Occurrences in the texts that a pair needs to be merged.
        show_progress: The library's own progress bars, on stderr if that is a terminal.

    Returns:
        A Hugging Face `tokenizers.Tokenizer` that adds no special tokens by itself.

    Raises:
        ValueError: vocab_size or min_frequency is out of range, as for `check_training`.

    Source: DeepSeek-V3 report, section 4.1; the patterns are those of the published tokenizer.json.
    """
    check_training(vocab_size, min_frequency)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZER_PATTERNS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TRAILING_SPECIAL_TOKENS),
        special_tokens=list(LEADING_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=min_frequency,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens(list(TRAILING_SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output_dir: str | os.PathLike[str]) -> str:
    """Write tokenizer.json and tokenizer_config.json (what `transformers.AutoTokenizer` loads); return the fingerprint.

    Both are written under temporary names and renamed; their checksums go into `checksums.json` beside them.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # Without it Transformers 4 gives the model token types too, which this architecture's refuses to generate with.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
    }
    contents = {
        "tokenizer_config.json": json_text(config, indent=2, ensure_ascii=False) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    (folder / CHECKSUMS).unlink(missing_ok=True)  # of files that are replaced
    for name, content in contents.items():
        replace_text(folder / name, content, is_shared=True)
    write_folder_checksums(folder, names=contents)
    return fingerprint(folder)


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The tokenizer.json that a folder holds, or that `path` is.

    Raises:
        ValueError: there is none.
    """
    file = _file_in(path)
    if not file.is_file():
        raise ValueError(
            f"tokenizer_model={os.fspath(path)}: {file} does not exist; give a folder with a tokenizer.json, or make "
            "one with: dsv3 train-tokenizer --input train.jsonl --vocab-size 4096 --output DIR"
        )
    return file


def has_tokenizer(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a tokenizer.json, or the path itself is a file."""
    return _file_in(path).is_file()


def _file_in(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a folder with a tokenizer.json, or from the file itself.

    Raises:
        ValueError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(path)
    require_whole(file, BESIDE)
    try:
        return Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{file} is not a tokenizer.json that this tokenizers release reads: {error}") from error


def count_ids(tokenizer: Tokenizer) -> int:
    """Size of an embedding table that holds every id: the largest id + 1, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def find_eod_id(tokenizer: Tokenizer, path: str | os.PathLike[str] | None = None) -> int:
    """The id that ends a document: the eos_token that the files beside the tokenizer name, else V3's name for it.

    Raises:
        ValueError: the token is not in the vocabulary, or a file beside the tokenizer is damaged.
    """
    name = EOS_TOKEN if path is None else special_token_names(tokenizer_file(path)).get("eos_token", EOS_TOKEN)
    token_id = tokenizer.token_to_id(name)
    if token_id is None:
        raise ValueError(f"the end-of-document token {name!r} is not in the vocabulary: set eos_token in {path}")
    return int(token_id)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Identify what a tokenizer does: sha256 (hex) of its canonical tokenizer.json.

    Canonical: keys sorted, no insignificant white space, merges as pairs, without the padding and truncation settings,
    none of which changes the ids of a text. Two libraries' versions of one tokenizer give the same fingerprint.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    file = tokenizer_file(path)
    require_whole(file, BESIDE)
    try:
        content = read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    for setting in ("padding", "truncation"):
        content.pop(setting, None)
    model = content.get("model", {})
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    canonical = json_text(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
