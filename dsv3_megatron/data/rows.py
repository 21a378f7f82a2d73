"""Rows of token ids to be scored: those of an array, or a dataset cut into consecutive windows. No torch.

A row of n ids has n - 1 tokens to predict. Windows overlap by one token, so that every token of a dataset but its first
is predicted exactly once, in file order, whatever the window's length.

Shapes: B rows, S ids in a row, T tokens of a dataset.
"""

from __future__ import annotations

import math
import os
from tokenize import TokenError
from typing import Protocol

import numpy as np

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.blend import check_data, without_suffix
from dsv3_megatron.data.indexed import read_header
from dsv3_megatron.data.proved_tokens import ProvedTokens

_CHECKED_BYTES = 64 << 20


class Rows(Protocol):
    """Rows of ids by number; an array [B, S] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class Windows:
    """A dataset's tokens as rows of `length` + 1 ids, the last one perhaps shorter.

    Args:
        tokens: All tokens, at least 2.
        length: Tokens that a row predicts.
    """

    def __init__(self, tokens: ProvedTokens, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.length)

    def __getitem__(self, index: int, /) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.length
        return self.tokens.read(start, min(start + self.length + 1, len(self.tokens)))


def open_windows(prefix: str, *, length: int, vocab_size: int, tokenizer_fingerprint: str | None = None,
                 verify: str = "read") -> Windows:
    """Map the rows of a dataset into memory.

    Args:
        prefix: Path of PREFIX.bin and PREFIX.idx; a suffix is dropped.
        length: Tokens that a row predicts.
        vocab_size: Rows of the model's embedding.
        tokenizer_fingerprint: Fingerprint of the tokenizer that made the data; None leaves it unchecked.
        verify: How far blocks of tokens are compared with their checksums: "read" (when they are first read), "all"
            (now) or "none".

    Raises:
        ValueError: a file is missing or damaged, the vocabulary is larger than the model's, another tokenizer made it,
            or there are fewer tokens than one whole row needs.
    """
    prefix = without_suffix(prefix)
    header = read_header(prefix)
    check_data([prefix], vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
    if header.num_tokens < length + 1:
        raise ValueError(f"data_path={prefix} has {header.num_tokens} tokens, fewer than one sequence of seq_length + "
                         f"1 = {length + 1}: use more data, or a seq_length of at most {max(1, header.num_tokens - 1)}")
    tokens = ProvedTokens(prefix, is_verified=verify != "none")
    if verify == "all":
        tokens.require_all()
    return Windows(tokens, length)


def open_token_array(file: str | os.PathLike[str], *, vocab_size: int, max_length: int) -> np.ndarray:
    """An array [B, S] of token ids, memory-mapped.

    Args:
        file: File in numpy's .npy format; pickled objects are refused.
        vocab_size: Rows of the model's embedding: ids lie in 0..vocab_size - 1.
        max_length: Largest S.

    Raises:
        ValueError: no such file, another format, dtype or shape, a row that is too long, or an id outside the
            vocabulary; names its row and position.
    """
    name = f"tokens={os.fspath(file)}"
    if not os.path.isfile(file):
        raise ValueError(f"{name}: no such file; write ids, an integer array [batch, seq], with numpy.save(FILE, ids)")
    try:
        ids_BS = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, TokenError, TypeError, KeyError, ArithmeticError, MemoryError,
            RecursionError) as error:  # numpy has Python read the header
        raise ValueError(f"{name} is not an array in .npy format ({error}); write it with numpy.save(FILE, ids)"
                         ) from error
    if not isinstance(ids_BS, np.ndarray):
        raise ValueError(f"{name} is an archive of arrays; write one array with numpy.save(FILE, ids)")
    check_token_array(ids_BS, vocab_size=vocab_size, max_length=max_length, name=name)
    return ids_BS


def check_token_array(ids_BS: np.ndarray, *, vocab_size: int, max_length: int, name: str, least: int = 2,
                      has_last: bool = False) -> None:
    """Check that an array holds rows of token ids that a model can read.

    Args:
        ids_BS: Array to check.
        vocab_size: Rows of the model's embedding: ids lie in 0..vocab_size - 1.
        max_length: Largest S, the model's context.
        name: Name of the array in messages.
        least: Smallest S: 2 where each token predicts the next one of its row, 1 where rows are only read.
        has_last: Whether a row may have one more token, which is predicted and not read.

    Raises:
        ConfigError: another dtype or shape, a row that is too long, or an id outside the vocabulary; names its row and
            position.
    """
    if ids_BS.ndim != 2 or ids_BS.shape[0] < 1 or ids_BS.shape[1] < least:
        tokens = "two tokens: the first predicts the second" if least == 2 else "one token, as in [[1, 2, 3]]"
        raise ConfigError(f"{name} has shape {list(ids_BS.shape)}; it must be [batch, seq] with at least one row of at "
                          f"least {tokens}")
    if ids_BS.dtype.kind not in "iu":
        raise ConfigError(f"{name} has dtype {ids_BS.dtype}; token ids must be integers, as in ids.astype('int32')")
    if ids_BS.shape[1] > max_length + has_last:
        raise ConfigError(f"{name} has rows of {ids_BS.shape[1]} tokens; they must not exceed the model's "
                          f"max_position_embeddings={max_length}{' and the token after them' if has_last else ''}; cut "
                          "them")
    _check_ids(ids_BS, vocab_size, name)


def _check_ids(ids_BS: np.ndarray, vocab_size: int, name: str) -> None:
    step = max(1, _CHECKED_BYTES // (ids_BS.shape[1] * ids_BS.itemsize))
    for start in range(0, ids_BS.shape[0], step):
        wrong = (ids_BS[start : start + step] < 0) | (ids_BS[start : start + step] >= vocab_size)
        if wrong.any():
            row, position = (int(number) for number in np.argwhere(wrong)[0])
            raise ConfigError(f"{name}: id {ids_BS[start + row, position]} in row {start + row}, position {position} "
                             f"must lie in 0..{vocab_size - 1} (the model's vocab_size={vocab_size}); use the "
                             "tokenizer that the model was trained with")
