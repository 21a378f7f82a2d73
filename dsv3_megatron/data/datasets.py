"""Datasets of a run: Megatron-Core's GPTDataset over our .bin/.idx files, checked first, cached safely.

Documents are packed: a sample is seq_length + 1 consecutive tokens of the shuffled documents. By default attention
crosses document ends and every token counts in the loss (DeepSeek-V3 report, section 4.1); with an `eod_id` positions
can restart, and losses be masked, at document ends. Where attention stops is not decided here: Megatron-Core would make
an [S, S] mask of it, which it is told not to make, and its `inter_document_masking`, which makes bounds instead, goes
by the documents on disk, not by the EOD token, and always restarts positions. So batches.py finds the bounds.
`DatasetConfig` and the checks need neither torch nor Megatron-Core; both are imported by `build_datasets`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3_megatron.data.blend import Blend, describe_files, parse_blend
from dsv3_megatron.data.document_ends import resolve_eod_id
from dsv3_megatron.data.indexed import read_header

if TYPE_CHECKING:
    from dsv3_megatron.config.recipe import DataSpan
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.data.batches import SampleDataset


@dataclass(frozen=True)
class DatasetConfig:
    """Where training and validation samples come from.

    Args:
        seq_length: Tokens per sample that the model sees.
        seed: Of the shuffles.
        num_train_samples: Samples the whole run trains on. The order of samples changes where this crosses a whole
            number of epochs, as in Megatron-LM; give a resumed run the number of the first one.
        num_valid_samples: Samples to validate on; None for one pass over the validation data (not with weights).
        blend: Data for all splits, cut by `split`. Excludes train_blend and valid_blend.
        split: Shares of documents for train, valid, test, in file order, as Megatron-LM's --split.
        train_blend: Data to train on, all of it.
        valid_blend: Data to validate on, all of it.
        cache_dir: Folder for Megatron-Core's index caches; None puts them beside the data, in PREFIX/cache.
        eod_id: The token that ends a document; None where nothing depends on it.
        reset_position_ids: Position ids restart after an EOD.
        eod_mask_loss: Positions whose input is an EOD do not count: their label belongs to another document.
    """

    seq_length: int
    seed: int
    num_train_samples: int
    num_valid_samples: int | None = None
    blend: Blend | None = None
    split: str = "969,30,1"
    train_blend: Blend | None = None
    valid_blend: Blend | None = None
    cache_dir: str | None = None
    eod_id: int | None = None
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        if self.eod_id is None and (self.reset_position_ids or self.eod_mask_loss):
            raise ValueError("reset_position_ids and eod_mask_loss need eod_id, the token that ends a document")
        if self.seq_length < 1:
            raise ValueError(f"seq_length={self.seq_length} must be at least 1")
        if self.num_train_samples < 1:
            raise ValueError(f"num_train_samples={self.num_train_samples} must be at least 1")
        if self.num_valid_samples is not None and self.num_valid_samples < 1:
            raise ValueError(f"num_valid_samples={self.num_valid_samples} must be at least 1, or None for one pass")
        if (self.blend is None) == (self.train_blend is None):
            what = "neither" if self.blend is None else "both"
            raise ValueError(
                f"{what} of data_path and train_data_path given: give data_path (cut by split), or train_data_path and "
                "valid_data_path"
            )
        if self.blend is not None and self.valid_blend is not None:
            raise ValueError("valid_data_path goes with train_data_path, not with data_path, which is cut by split")
        if self.blend is not None:
            parse_split(self.split)
        for blend, name in ((self.valid_blend, "valid_data_path"), (self.blend, "data_path")):
            if blend is not None and blend.weights is not None and self.num_valid_samples is None:
                raise ValueError(
                    f"{name} has weights, so one pass over it is not defined: set num_valid_samples (eval_iters x "
                    "global_batch_size)"
                )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every dataset prefix, each once, in order."""
        blends = [blend for blend in (self.blend, self.train_blend, self.valid_blend) if blend is not None]
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
    largest_batch = max(size for phase in recipe.phases for size in phase.batch_size.sizes())
    valid_batch = max(phase.training.global_batch_size for phase in phases)
    blend = parse_blend(data.data_path, "data_path")
    has_valid = bool(data.valid_data_path)
    config = DatasetConfig(
        seq_length=training.seq_length,
        seed=training.seed + span.index,
        num_train_samples=span.num_samples + run.guards.spare_samples(run.checkpoint, largest_batch),
        num_valid_samples=max(1, training.eval_iters) * valid_batch,
        blend=None if has_valid else blend,
        split=data.split,
        train_blend=blend if has_valid else None,
        valid_blend=parse_blend(data.valid_data_path, "valid_data_path") if has_valid else None,
        cache_dir=data.data_cache_path,
    )
    if not data.document_flags:
        return config
    eod_id = resolve_eod_id(config.prefixes, tokenizer_model=data.tokenizer_model, flags=data.document_flags)
    return replace(config, eod_id=eod_id, reset_position_ids=data.reset_position_ids, eod_mask_loss=data.eod_mask_loss)


@dataclass(frozen=True)
class TrainingData:
    """The datasets of a run; `valid` is None where there is no validation data."""

    train: SampleDataset
    valid: SampleDataset | None


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


class _DatasetTokenizer:
    """What Megatron-Core's dataset asks of a tokenizer when the tokens are already on disk.

    It pads nothing (`pad` is an id that no text has), so no token of the data is masked for that. Its identifiers go
    into the name of the index cache: they hold the files' hashes, so that data made again under the same name does not
    meet the cache of the old.
    """

    pad = -1
    vocab_size = None

    def __init__(self, identifiers: dict[str, str], eod_id: int | None) -> None:
        self.unique_identifiers = OrderedDict(identifiers)
        self.eod = -2 if eod_id is None else eod_id  # -2: another id that no text has


def _check_sizes(config: DatasetConfig) -> None:
    """Refuse splits too small for one sample, before Megatron-Core meets them with an assertion."""

    def check(blend: Blend, share: tuple[float, float], purpose: str) -> None:
        for prefix in blend.prefixes:
            header = read_header(prefix)
            first, last = (round(edge * header.num_sequences) for edge in share)
            # The token count of a share is known only after reading the lengths: bound it by the whole.
            if last <= first or header.num_tokens < config.seq_length + 1:
                raise ValueError(
                    f"{prefix} has {last - first} documents ({header.num_tokens} tokens in all) for {purpose}, fewer "
                    f"than one sample of seq_length + 1 = {config.seq_length + 1} tokens needs: use more data, a "
                    "shorter seq_length or another split"
                )

    if config.blend is not None:
        train, valid, _ = parse_split(config.split)
        check(config.blend, (0.0, train), "training")
        if valid > 0:
            check(config.blend, (train, train + valid), "validation")
    if config.train_blend is not None:
        check(config.train_blend, (0.0, 1.0), "training")
    if config.valid_blend is not None:
        check(config.valid_blend, (0.0, 1.0), "validation")


def _place_blends(config: DatasetConfig) -> tuple[dict[str, Any], bool]:
    """The blend arguments of Megatron-Core's configuration, and whether there is validation data."""
    if config.blend is not None:
        where = {"blend": config.blend.for_megatron(), "split": config.split.replace("/", ",")}
        return where, parse_split(config.split)[1] > 0
    assert config.train_blend is not None
    valid_blend = config.valid_blend.for_megatron() if config.valid_blend is not None else None
    return {"blend_per_split": [config.train_blend.for_megatron(), valid_blend, None]}, valid_blend is not None


def build_datasets(config: DatasetConfig, *, is_built_on_rank: Callable[[], bool] = lambda: True) -> TrainingData:
    """Build Megatron-Core's datasets for training and validation.

    Collective when torch.distributed is initialised: every rank calls it, rank 0 builds the index caches, the others
    wait at a barrier and load them; the folder of the caches must be visible to all.

    Args:
        config: What to build.
        is_built_on_rank: Whether this rank reads data; must be true on rank 0. Datasets are memory-mapped, so building
            everywhere costs little.

    Returns:
        The datasets; on a rank that builds none, empty lists.

    Raises:
        ValueError: a file is missing or damaged, or there is less data than one sample needs.
    """
    _check_sizes(config)
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    where, has_valid = _place_blends(config)
    megatron_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        path_to_cache=config.cache_dir,
        tokenizer=_DatasetTokenizer(describe_files(config.prefixes), config.eod_id),
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
        **where,
    )
    if megatron_config.split_matrix is not None:
        megatron_config.split_matrix[2] = None  # the test share keeps documents out of the others; nothing reads it
    # A size of None means one epoch; with weights Megatron-Core wants a number even for the test split it never reads.
    is_weighted = config.blend is not None and config.blend.weights is not None
    sizes = [config.num_train_samples, config.num_valid_samples, 1 if is_weighted else None]
    train_set, valid_set, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, sizes, is_built_on_rank, megatron_config
    ).build()
    if train_set is None:
        return TrainingData(train=[], valid=None)
    if len(train_set) < config.num_train_samples:
        raise ValueError(
            f"the training data holds {len(train_set)} samples of seq_length={config.seq_length} and several prefixes "
            f"without weights are read once only, but num_train_samples={config.num_train_samples}: give weights "
            "(data_path: WEIGHT PREFIX WEIGHT PREFIX ...) to go over it more than once"
        )
    if has_valid and valid_set is not None and len(valid_set) == 0:
        raise ValueError(
            f"the validation data holds no whole sample of seq_length={config.seq_length}: use more validation data, a "
            "shorter seq_length or another split"
        )
    return TrainingData(train=train_set, valid=valid_set if has_valid else None)
