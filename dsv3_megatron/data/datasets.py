"""Datasets of a run: which files, cut how, read in which order; checked first.

Documents are packed: a sample is seq_length + 1 consecutive tokens of the shuffled documents (samples.py). By default
attention crosses document ends and every token counts in the loss (DeepSeek-V3 report, section 4.1); with an `eod_id`
positions can restart, and losses be masked, at document ends. Where attention stops is not decided here: batches.py
finds the bounds. `DatasetConfig` and the checks need no torch; it is imported by `build_datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dsv3_megatron.data.blend import Blend, parse_blend, parse_validation_sets
from dsv3_megatron.data.chat.masked import check_masks, has_masks
from dsv3_megatron.data.document_ends import resolve_eod_id
from dsv3_megatron.data.indexed import read_header
from dsv3_megatron.data.order import InTurns

if TYPE_CHECKING:
    from dsv3_megatron.config.recipe import DataSpan
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.data.batches import SampleDataset
    from dsv3_megatron.data.chat.packed_samples import PackedConversations
    from dsv3_megatron.data.samples import ShuffledTokens


@dataclass(frozen=True)
class DatasetConfig:
    """Sources of training and validation samples, and how they are cut.

    Args:
        seq_length: Tokens per sample that the model sees.
        seed: Seed of the shuffles.
        num_train_samples: Samples to offer for training; None: without end. It says nothing of their order.
        num_valid_samples: Samples to validate on; None for one pass over the validation data (not with weights).
        blend: Data for all splits, cut by `split`. Excludes train_blend and valid_blend.
        split: Shares of documents for train, valid, test, in file order, as Megatron-LM's --split.
        train_blend: Data to train on, all of it.
        valid_blend: Data to validate on, all of it.
        named_valid: Several such, each with its name, in place of valid_blend.
        eod_id: The token that ends a document; None where nothing depends on it.
        reset_position_ids: Position ids restart after an EOD.
        eod_mask_loss: Positions whose input is an EOD do not count: their label belongs to another document.
        is_validated: Whether the run validates at all; if not, there need be no data for it.
        is_chat: The data are conversations with masks; whole ones are packed.
        long_conversations: What becomes of those that are longer than a sample, one of LONG_CONVERSATIONS.
        is_verified: Whether blocks of tokens are compared with their checksums when they are first read.
    """

    seq_length: int
    seed: int
    num_train_samples: int | None = None
    num_valid_samples: int | None = None
    blend: Blend | None = None
    split: str = "969,30,1"
    train_blend: Blend | None = None
    valid_blend: Blend | None = None
    named_valid: tuple[tuple[str, Blend], ...] = ()
    eod_id: int | None = None
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    is_validated: bool = True
    is_chat: bool = False
    long_conversations: str = "refuse"
    is_verified: bool = True

    def __post_init__(self) -> None:
        if self.eod_id is None and (self.reset_position_ids or self.eod_mask_loss):
            raise ValueError("reset_position_ids and eod_mask_loss need eod_id, the token that ends a document")
        if self.seq_length < 1:
            raise ValueError(f"seq_length={self.seq_length} must be at least 1")
        if self.num_train_samples is not None and self.num_train_samples < 1:
            raise ValueError(f"num_train_samples={self.num_train_samples} must be at least 1, or None for no end")
        if self.num_valid_samples is not None and self.num_valid_samples < 1:
            raise ValueError(f"num_valid_samples={self.num_valid_samples} must be at least 1, or None for one pass")
        if (self.blend is None) == (self.train_blend is None):
            what = "neither" if self.blend is None else "both"
            raise ValueError(
                f"{what} of data_path and train_data_path given: give data_path (cut by split), or train_data_path and "
                "valid_data_path"
            )
        if self.blend is not None and self.valid_blends:
            raise ValueError("valid_data_path goes with train_data_path, not with data_path, which is cut by split")
        if self.blend is not None:
            parse_split(self.split)
        for blend, name in (*((blend, "valid_data_path") for blend in self.valid_blends.values()),
                            (self.blend, "data_path")):
            if blend is not None and blend.weights is not None and self.num_valid_samples is None:
                raise ValueError(
                    f"{name} has weights, so one pass over it is not defined: set num_valid_samples (eval_iters x "
                    "global_batch_size)"
                )

    @property
    def valid_blends(self) -> dict[str, Blend]:
        """Data to validate on by name, in order; "" is the name of what has none."""
        return ({} if self.valid_blend is None else {"": self.valid_blend}) | dict(self.named_valid)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every dataset prefix, each once, in order."""
        blends = [blend for blend in (self.blend, self.train_blend, *self.valid_blends.values()) if blend is not None]
        return tuple(dict.fromkeys(prefix for blend in blends for prefix in blend.prefixes))


def dataset_config(run: RunConfig, span: DataSpan | None = None) -> DatasetConfig:
    """The datasets of a run: which samples it trains and validates on, and in which order.

    Phases with another sequence length or other files begin another dataset, which is read from its beginning. Its
    shuffles have the seed of the run plus the number of datasets before it, so that a span over the same files does not
    meet the documents of the one before it in the same order again. Which tokens a step trains on depends on the
    samples before it alone, as in a run without phases.

    Args:
        run: A valid run.
        span: One of its recipe's; None: the first, which is the only one without phases.

    Raises:
        ValueError: no data, a blend that cannot be read, or no EOD for a setting that needs one.
    """
    recipe = run.recipe()
    span = span or recipe.spans[0]
    phases = recipe.phases[span.first_phase: span.last_phase + 1]
    data, training = phases[0].data, phases[0].training
    valid_batch = max(phase.training.global_batch_size for phase in phases)
    blend = parse_blend(data.data_path, "data_path")
    valid = parse_validation_sets(data.valid_data_path) if data.valid_data_path else {}
    config = DatasetConfig(
        seq_length=training.seq_length,
        seed=training.seed + span.index,
        num_valid_samples=max(1, training.eval_iters) * valid_batch,
        blend=None if valid else blend,
        split=data.split,
        train_blend=blend if valid else None,
        valid_blend=valid.get(""),
        named_valid=tuple((name, named) for name, named in valid.items() if name),
        is_validated=training.eval_interval > 0,
        is_chat=data.sft,
        long_conversations=data.long_conversations,
        is_verified=run.checkpoint.verify_files != "none",
    )
    for prefix in config.prefixes:
        if data.sft:
            check_masks(prefix, cache_dir=data.data_cache_path)
        elif has_masks(prefix):
            raise ValueError(f"{prefix} holds conversations, of which only what their masks say is to be learnt; give "
                             "sft (dsv3 sft), or other data")
    if not data.document_flags:
        return config
    eod_id = resolve_eod_id(config.prefixes, tokenizer_model=data.tokenizer_model, flags=data.document_flags)
    return replace(config, eod_id=eod_id, reset_position_ids=data.reset_position_ids, eod_mask_loss=data.eod_mask_loss)


@dataclass(frozen=True)
class TrainingData:
    """The datasets of a run.

    Attributes:
        train: Training samples.
        valid: Validation samples, the first of several; None where there are none.
        named_valid: Validation samples by name; empty where they have none.
    """

    train: SampleDataset
    valid: SampleDataset | None
    named_valid: Mapping[str, SampleDataset] = field(default_factory=dict)


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, normalised to sum 1; missing ones are 0, as in Megatron-LM.

    Raises:
        ValueError: not one to three non-negative numbers with a positive first.
    """
    way_out = "give shares of train, valid and test, such as 969,30,1"
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        raise ValueError(f"split={split!r} is not a list of numbers; {way_out}") from None
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not np.isfinite(shares).all() or shares[0] == 0:
        raise ValueError(f"split={split!r} must be one to three numbers, none negative, the first positive; {way_out}")
    train, valid, test = (shares + [0.0, 0.0])[:3]
    total = train + valid + test
    return train / total, valid / total, test / total


def check_sizes(config: DatasetConfig) -> None:
    """Refuse splits too small for one sample; reads the heads of the indices.

    Raises:
        ValueError: one is, or a file is missing or damaged.
    """

    def check(blend: Blend, share: tuple[float, float], purpose: str) -> None:
        for prefix in blend.prefixes:
            header = read_header(prefix)
            first, last = sequences_between(prefix, share)
            # The token count of a share is known only after reading the lengths: bound it by the whole. Of
            # conversations one makes a sample, however short.
            if last <= first or (header.num_tokens < config.seq_length + 1 and not config.is_chat):
                raise ValueError(
                    f"{prefix} has {last - first} documents ({header.num_tokens} tokens in all) for {purpose}, fewer "
                    f"than one sample of seq_length + 1 = {config.seq_length + 1} tokens needs: use more data, a "
                    "shorter seq_length or another split"
                )

    if config.blend is not None:
        train, valid, _ = parse_split(config.split)
        check(config.blend, (0.0, train), "training")
        if valid > 0 and config.is_validated:
            check(config.blend, (train, train + valid), "validation")
    if config.train_blend is not None:
        check(config.train_blend, (0.0, 1.0), "training")
    for blend in config.valid_blends.values() if config.is_validated else ():
        check(blend, (0.0, 1.0), "validation")


def build_datasets(config: DatasetConfig) -> TrainingData:
    """Open the datasets for training and validation; reads a few bytes of each file, and writes nothing.

    Args:
        config: Configuration of the datasets to open.

    Raises:
        ValueError: a file is missing or damaged, or there is less data than one sample needs.
    """
    check_sizes(config)
    from dsv3_megatron.data.chat.packed_samples import ConversationSamples
    from dsv3_megatron.data.samples import ENDLESS, Samples

    def open_samples(blend: Blend, edges: tuple[float, float], purpose: str, num_samples: int | None) -> SampleDataset:
        if config.is_chat:
            chats, rows_per_epoch = open_conversations(config, blend, edges)
            return ConversationSamples(chats, rows_per_epoch if num_samples is None else num_samples)
        source, samples_per_epoch = _open_blend(config, blend, edges, purpose)
        return Samples(source, samples_per_epoch if num_samples is None else num_samples, eod_id=config.eod_id,
                       reset_position_ids=config.reset_position_ids, eod_mask_loss=config.eod_mask_loss)

    train_blend, valid_blends = config.train_blend, config.valid_blends
    train_edges = valid_edges = (0.0, 1.0)
    if config.blend is not None:
        train, valid, _ = parse_split(config.split)
        train_blend, train_edges = config.blend, (0.0, train)
        valid_blends, valid_edges = {"": config.blend} if valid > 0 else {}, (train, train + valid)
    assert train_blend is not None
    sets = {name: open_samples(blend, valid_edges, "validation", config.num_valid_samples)
            for name, blend in (valid_blends.items() if config.is_validated else ())}
    return TrainingData(
        train=open_samples(train_blend, train_edges, "training", config.num_train_samples or ENDLESS),
        valid=next(iter(sets.values()), None), named_valid={name: samples for name, samples in sets.items() if name})


def open_conversations(config: DatasetConfig, blend: Blend, edges: tuple[float, float]
                       ) -> tuple[PackedConversations | InTurns[PackedConversations], int]:
    """The packed conversations of a blend's share between two edges of each file, and the samples of one pass.

    Raises:
        ValueError: a conversation is too long and is to be refused, or none is left.
    """
    from dsv3_megatron.data.chat.packed_samples import PackedConversations

    parts = [PackedConversations(prefix, sequences_between(prefix, edges), seq_length=config.seq_length,
                                 seed=config.seed, number=number, long_conversations=config.long_conversations,
                                 is_verified=config.is_verified)
             for number, prefix in enumerate(blend.prefixes)]
    sizes = [part.samples_per_epoch for part in parts]
    if len(parts) == 1:
        return parts[0], sizes[0]
    return InTurns(parts, blend.weights or sizes), sum(sizes)


def _open_blend(config: DatasetConfig, blend: Blend, edges: tuple[float, float], purpose: str
                ) -> tuple[ShuffledTokens | InTurns[ShuffledTokens], int]:
    """The tokens of a blend's share between two edges of each file, and the samples of one pass over them."""
    from dsv3_megatron.data.samples import ShuffledTokens

    parts = []
    for number, prefix in enumerate(blend.prefixes):
        share = sequences_between(prefix, edges)
        part = ShuffledTokens(prefix, share, seq_length=config.seq_length, seed=config.seed, number=number,
                              is_verified=config.is_verified)
        if not part.samples_per_epoch:
            raise ValueError(
                f"the {purpose} data holds no whole sample of seq_length={config.seq_length}: use more {purpose} data, "
                f"a shorter seq_length or another split ({prefix} has {part.num_tokens} tokens for {purpose})")
        parts.append(part)
    sizes = [part.samples_per_epoch for part in parts]
    if len(parts) == 1:
        return parts[0], sizes[0]
    return InTurns(parts, blend.weights or sizes), sum(sizes)


def sequences_between(prefix: str, edges: tuple[float, float]) -> tuple[int, int]:
    """[first, stop) of a dataset's sequences that lie between two edges, given as shares of all."""
    num_sequences = read_header(prefix).num_sequences
    return round(edges[0] * num_sequences), round(edges[1] * num_sequences)
