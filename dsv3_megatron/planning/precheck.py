"""Whether a run will find what it needs: looked at before anything is allocated, and told a line each.

What cannot work is a ConfigError; what may not, such as an estimate of memory above what there is, a warning. The rules
of the settings among themselves are `RunConfig.validate`'s. No torch.

Usage:
    told = check_layout(run, world_size) + check_run_data(run) + check_memory(run, world_size)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_megatron.checkpoint.folder import check_empty, iteration_path
from dsv3_megatron.checkpoint.hf.config_json import model_config_to_json
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.data.blend import Blend
from dsv3_megatron.data.chat.packed_samples import PackedConversations
from dsv3_megatron.data.datasets import (
    DatasetConfig,
    check_sizes,
    dataset_config,
    open_conversations,
    parse_split,
    sequences_between,
)
from dsv3_megatron.data.indexed import dataset_paths, map_index, read_header, read_sidecar
from dsv3_megatron.data.proved_tokens import ProvedTokens
from dsv3_megatron.data.tokenizer import count_ids, load_tokenizer
from dsv3_megatron.ops.attention_choices import AttentionCase, choose_attention
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.flags import flags
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.memory.estimate import RankMemory
from dsv3_megatron.planning.memory.headroom import Headroom
from dsv3_megatron.planning.memory.remedies import advise, fullest_rank
from dsv3_megatron.planning.memory.settings import attention_kernel
from dsv3_megatron.planning.time.work import Setting
from dsv3_megatron.process.host_bytes import host_bytes

# Ids of one read when a dataset is searched for a token that counts.
_IDS_READ = 1 << 22
_GPU_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Told:
    """The answer of one check.

    Attributes:
        text: Answer in one line.
        is_warning: Whether the run may not end well.
    """

    text: str
    is_warning: bool = False


def check_layout(run: RunConfig, world_size: int) -> list[Told]:
    """How the run is split, and how long it is.

    Raises:
        ConfigError: the layers do not go onto the stages.
    """
    parallel, training, recipe = run.parallel, run.training, run.recipe()
    stage_layouts(run.model, parallel)
    replicas = parallel.data_parallel_size(world_size)
    last = recipe.phases_to_run[-1].end
    return [
        Told(f"layout: {world_size} {'process' if world_size == 1 else 'processes'} = tensor "
             f"{parallel.tensor_model_parallel_size}"
             + (f" x context {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else "")
             + f" x pipeline {parallel.pipeline_model_parallel_size} x data "
             f"{replicas}, expert {parallel.expert_model_parallel_size}, schedule {parallel.schedule}, "
             f"{training.num_microbatches(replicas)} micro-batches of {training.micro_batch_size} x "
             f"{training.seq_length} tokens in a step of a replica"),
        Told(f"length: {last.iteration:,} steps, {last.tokens:,} tokens"),
    ]


def check_run_data(run: RunConfig) -> list[Told]:
    """How much data each dataset of the run has, and how often the run goes over it.

    Raises:
        ValueError: a dataset has no whole sample, or no token that counts in the loss, for what it is wanted for.
    """
    recipe, told = run.recipe(), []
    for span in recipe.spans:
        if span.first_phase >= recipe.num_phases:
            break
        config = dataset_config(run, span)
        check_sizes(config)
        training = recipe.phases[span.first_phase].training
        name = f" of phase {recipe.phases[span.first_phase].name}" if len(recipe.spans) > 1 else ""
        blend, edges = _training_share(config)
        told += _check_blend(config, blend, edges, span.num_samples, f"data{name}", "training",
                             f"{span.num_samples:,} samples of {training.seq_length} tokens in all")
        if not training.eval_interval:
            told.append(Told(f"validation{name}: off (eval_interval=0)"))
            continue
        shares = _validation_shares(config)
        if not shares:
            told.append(Told(f"validation{name}: none: split={config.split} leaves no documents for it"))
        samples = config.num_valid_samples or 0
        for label, (valid, valid_edges) in shares.items():
            told += _check_blend(config, valid, valid_edges, samples, f"validation{label and ' ' + label}{name}",
                                 "validation", f"{samples:,} samples each time, every {training.eval_interval} steps")
    return told


def check_vocabulary(run: RunConfig, prefixes: Sequence[str]) -> list[Told]:
    """The ids of tokenizer and data beside the rows of the embedding.

    Raises:
        ConfigError: the tokenizer has more ids than the model has rows.
    """
    rows = run.model.vocab_size
    parts, needed = [], 0
    if run.data.tokenizer_model:
        needed = count_ids(load_tokenizer(run.data.tokenizer_model))
        if needed > rows:
            raise ConfigError(
                f"vocab_size={rows} must hold the {needed} ids of tokenizer_model={run.data.tokenizer_model}; set "
                f"vocab_size to at least {needed}, or use a smaller tokenizer")
        parts.append(f"{needed:,} ids of the tokenizer")
    sidecars = [sidecar.vocab_size for sidecar in map(read_sidecar, prefixes) if sidecar is not None]
    if sidecars:
        needed = max(needed, *sidecars)
        parts.append(f"{max(sidecars):,} ids of the data's tokenizer")
    told = [Told(f"vocabulary: {' and '.join(parts) or 'ids of the data'} in {rows:,} rows"
                 + (f", {rows - needed:,} of them padding" if parts and rows > needed else ""))]
    if parts and rows >= 2 * needed:
        told.append(Told(f"vocabulary: more than half of the vocab_size={rows} rows of embedding and head belong to no "
                         f"token; set vocab_size to {needed} or a little more", is_warning=True))
    return told


def check_attention(run: RunConfig, *, is_planned: bool = False) -> None:
    """Whether what the run names can compute attention, of what a machine of its kind has.

    Args:
        run: A valid run.
        is_planned: The run is for another machine than this one, with GPUs of Hopper's generation.

    Raises:
        ConfigError: attention_backend names nothing that is possible.
    """
    if is_planned or smallest_gpu_bytes() is not None:
        attention_kernel(run, device="cuda", precision=run.training.precision_on(is_cpu=False))
    else:
        choose_attention(run.training.attention_backend, AttentionCase(
            "cpu", (0, 0), query_width=run.model.qk_head_dim, value_width=run.model.v_head_dim, cudnn_version=0))


def check_memory(run: RunConfig, world_size: int, *, is_planned: bool = False, hardware: str | None = None,
                 allows_overflow: bool = False) -> list[Told]:
    """The estimate of the fullest process's memory beside what its device has.

    Args:
        run: A valid run.
        world_size: Processes of the run.
        is_planned: The run is for another machine than this one, unless there are GPUs here.
        hardware: Name of the machine that the run is for, as in planning/machine/hardware_tables.py; None: this one.
        allows_overflow: Whether an estimate that is more than a GPU has is a warning, and not an error.

    Raises:
        ConfigError: a GPU has less memory than the estimate, or there is no such machine. On a machine without GPUs,
            which has other memory to fall back on, it is a warning.
    """
    machine = find_hardware(hardware) if hardware is not None else None
    if machine is not None and machine.is_cpu:
        raise ConfigError(f"hardware={hardware} is not a GPU; without one the memory of this machine is compared with")
    gpu_bytes = smallest_gpu_bytes() if machine is None else int(machine["memory_bytes"])
    is_cuda = gpu_bytes is not None or is_planned
    fullest = fullest_rank(run, world_size, device="cuda" if is_cuda else "cpu")
    text = f"memory: about {_gb(fullest.peak_bytes)} at the peak of the fullest process"
    if gpu_bytes is not None:
        whose = f"of an {hardware}" if machine is not None else "of a GPU here"
        usable = gpu_bytes if machine is None else int(Headroom.of(Setting(machine, world_size)).usable_bytes)
        return [_beside_gpu(text, fullest, run, world_size, (usable, gpu_bytes), whose, allows_overflow)]
    if is_cuda:
        return [Told(f"{text} on a GPU; there is none here to compare with: name one with --hardware")]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    have = host_bytes()
    if have is None:
        return [Told(f"{text}, {local} of them on this machine, whose memory is not known")]
    return [_compared(f"{text}, {local} of them here", local * (fullest.peak_bytes + fullest.host_bytes), have,
                      "of this machine")]


def _beside_gpu(text: str, fullest: RankMemory, run: RunConfig, world_size: int, sizes: tuple[int, int], whose: str,
                allows_overflow: bool) -> Told:
    """The answer where there is a GPU of `sizes`: bytes that its other users leave, and bytes that it has."""
    usable, visible = sizes
    if fullest.peak_bytes <= usable:
        return Told(f"{text}: {_gb(fullest.peak_bytes)} of the {_gb(visible)} {whose}")
    remedies = advise(run, world_size).remedies
    # The mildest one that is enough, or else the one that helps most.
    best = min((remedy for remedy in remedies if remedy.peak_bytes <= usable), key=lambda remedy: remedy.saved_bytes,
               default=next(iter(remedies), None))
    ways = [f"{flags(best.changes)} would need {_gb(best.peak_bytes)}"] if best is not None else []
    ways.append("dsv3 plan --search finds layouts that fit")
    needed = f"pipeline rank {fullest.pipeline_rank} needs about {_gb(fullest.peak_bytes)}"
    if fullest.peak_bytes > visible:
        wrong = f"{needed}, more than the {_gb(visible)} {whose}: {'; '.join(ways)}"
    else:
        wrong = (f"{needed} of the {_gb(visible)} {whose}, which leaves less than the {_gb(visible - usable)} that "
                 f"others are expected to take there: {'; '.join(ways)}")
    if fullest.peak_bytes > visible and not allows_overflow:
        raise ConfigError(f"{wrong}; or give --allow-memory-overflow, for an estimate that you know to be too high")
    return Told(f"memory: {wrong}", is_warning=True)


def check_folders(run: RunConfig) -> list[Told]:
    """Whether what the run writes can be written: by writing, since permissions do not tell (root, read-only mounts).

    `save` is looked at where checkpoints are (`checkpoint.folder.check_save_directory`).

    Raises:
        ConfigError: a folder cannot be written to; names the field.
    """
    places = {"save": run.checkpoint.save, "tensorboard_dir": run.logging.tensorboard_dir,
              "export_hf": run.checkpoint.export_hf, "trace_schedule": run.logging.trace_schedule,
              "wandb_save_dir": run.logging.wandb_save_dir, "prometheus_file": run.logging.prometheus_file}
    given = {field: place for field, place in places.items() if place}
    for field, place in given.items():
        require_writable(field, place, is_file=field in ("trace_schedule", "prometheus_file"))
    if not run.checkpoint.save:
        return [Told("folders: save is not set: nothing of the model is kept"),
                *([Told(f"folders: {_listed(given)} can be written to")] if given else [])]
    return [Told(f"folders: {_listed(given)} can be written to")]


def check_export(run: RunConfig) -> list[Told]:
    """Whether the trained model can be exported where and as the run says.

    Raises:
        ConfigError: the model's settings have no expression in config.json, or the folder holds something already.
    """
    output, save = run.checkpoint.export_hf, run.checkpoint.save
    if not output or not save:
        return []
    check_empty(output)
    others = {"save": save, "load": run.checkpoint.load, "tensorboard_dir": run.logging.tensorboard_dir}
    for field, place in others.items():
        if place and os.path.realpath(place) == os.path.realpath(output):
            raise ConfigError(f"export_hf={output} is the folder of {field} too, and must be one of its own")
    recipe = run.recipe()
    try:
        model_config_to_json(recipe.phases_to_run[-1].model, dtype="bfloat16")
    except ConfigError as error:
        raise ConfigError(f"export_hf={output}: the model could not be exported: {error}; or leave export_hf "
                          "out") from error
    _check_unfinished(output, iteration_path(save, recipe.num_steps))
    return [Told(f"export: the model can be written to {output} in Hugging Face's layout")]


def require_writable(field: str, place: str, *, is_file: bool = False) -> None:
    """Find out now whether a folder, or a file in one, can be made or written to; nothing stays behind.

    Args:
        field: The setting, for the message.
        place: Path of the folder or file; what is missing of the folder would be made.
        is_file: The place is a file's, not a folder's.

    Raises:
        ConfigError: the folder or file cannot be made or written to.
    """
    path = Path(os.path.abspath(place))
    if is_file and path.is_dir():
        raise ConfigError(f"{field}={place} is a folder; give the name of a file")
    folder = path.parent if is_file else path
    try:
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as probe:
            probe.write(b"0" * 4096)
            probe.flush()
    except OSError as error:
        reason = f"{folder} is not a folder" if folder.exists() and not folder.is_dir() else (
            f"{error.strerror} ({folder})")
        raise ConfigError(f"{field}={place} cannot be written to: {reason}; choose a place that this user may write to"
                          ) from error


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest GPU of this machine, as its driver says; None where there is none or it does not say."""
    if shutil.which(_GPU_QUERY[0]) is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    numbers = [int(line) for line in done.stdout.split("\n") if line.strip().isdecimal()]
    return min(numbers) * 2**20 if numbers else None


def has_counted_token(prefix: str, share: tuple[int, int], eod_id: int) -> bool:
    """Whether any id of a dataset's sequences [first, stop) is not the EOD, after which no token counts."""
    header, index = read_header(prefix), map_index(prefix)
    if share[1] <= share[0] or not header.num_tokens:
        return False
    size = header.dtype.itemsize
    first = int(index.offsets_Q[share[0]]) // size
    stop = int(index.offsets_Q[share[1] - 1]) // size + int(index.lengths_Q[share[1] - 1])
    tokens_T = np.memmap(dataset_paths(prefix)[0], dtype=header.dtype, mode="r")
    return any(bool((tokens_T[start:min(start + _IDS_READ, stop)] != eod_id).any())
               for start in range(first, stop, _IDS_READ))


def _training_share(config: DatasetConfig) -> tuple[Blend, tuple[float, float]]:
    if config.blend is not None:
        return config.blend, (0.0, parse_split(config.split)[0])
    assert config.train_blend is not None
    return config.train_blend, (0.0, 1.0)


def _validation_shares(config: DatasetConfig) -> dict[str, tuple[Blend, tuple[float, float]]]:
    """Which documents are validated on, by the name of the set; "" is the name of what has none."""
    if config.blend is None:
        return {name: (blend, (0.0, 1.0)) for name, blend in config.valid_blends.items()}
    train, valid, _ = parse_split(config.split)
    return {"": (config.blend, (train, train + valid))} if valid else {}


def _check_blend(config: DatasetConfig, blend: Blend, edges: tuple[float, float], num_samples: int, title: str,
                 purpose: str, taken: str) -> list[Told]:
    """Documents, tokens and epochs of each dataset of a blend."""
    if config.is_chat:
        packed = open_conversations(config, blend, edges)[0]
        parts = [packed] if isinstance(packed, PackedConversations) else packed.parts
        return [_told_of_conversations(part, title, purpose, taken, config.long_conversations) for part in parts]
    shares = [sequences_between(prefix, edges) for prefix in blend.prefixes]
    tokens = [_num_tokens(prefix, share) for prefix, share in zip(blend.prefixes, shares, strict=True)]
    samples = [(count - 1) // config.seq_length for count in tokens]
    for prefix, count, whole in zip(blend.prefixes, tokens, samples, strict=True):
        if whole < 1:
            raise ConfigError(
                f"{prefix} has {count:,} tokens for {purpose}, fewer than one sample of seq_length + 1 = "
                f"{config.seq_length + 1} needs: use more data, a shorter seq_length or another split"
                + ("; or --eval-interval 0 for no validation" if purpose == "validation" else ""))
    if config.eod_mask_loss and config.eod_id is not None and not any(
            has_counted_token(prefix, share, config.eod_id)
            for prefix, share in zip(blend.prefixes, shares, strict=True)):
        raise ConfigError(
            f"eod_mask_loss=True leaves out the token after each EOD (id {config.eod_id}), and the {purpose} data "
            f"({', '.join(blend.prefixes)}) hold no other token to predict from: give --no-eod-mask-loss, or other "
            "data")
    weights = blend.weights if blend.weights is not None and len(samples) > 1 else samples
    total = sum(weights)
    return [Told(f"{title}: {prefix}: {share[1] - share[0]:,} documents, {count:,} tokens for {purpose}; the run takes "
                 f"{taken}, {num_samples * weight / total / whole:.3g} epochs of this")
            for prefix, share, count, whole, weight in zip(blend.prefixes, shares, tokens, samples, weights,
                                                           strict=True)]


def _told_of_conversations(part: PackedConversations, title: str, purpose: str, taken: str, long: str) -> Told:
    """Conversations of a dataset, how full their sequences are, and what was too long."""
    filled = part.num_tokens / (part.samples_per_epoch * (part.seq_length + 1))
    text = (f"{title}: {part.prefix}: {part.num_conversations:,} conversations, {part.num_tokens:,} tokens for "
            f"{purpose} in {part.samples_per_epoch:,} samples, {100 * filled:.1f}% full; the run takes {taken}")
    if not part.num_long:
        return Told(text)
    done = {"cut": "cut at their end", "drop": "left out"}[long]
    return Told(f"{text}; {part.num_long:,} conversations of more than {part.seq_length + 1} tokens are {done}",
                is_warning=True)


def _num_tokens(prefix: str, share: tuple[int, int]) -> int:
    """Tokens of a dataset's sequences [first, stop)."""
    header = read_header(prefix)
    if share == (0, header.num_sequences):
        return header.num_tokens
    return int(map_index(prefix).lengths_Q[share[0]: share[1]].sum(dtype=np.int64))


def _compared(text: str, needed: int, have: int, whose: str) -> Told:
    if needed <= have:
        return Told(f"{text}: {_gb(needed)} of the {_gb(have)} {whose}")
    return Told(f"{text}: {_gb(needed)}, more than the {_gb(have)} {whose}: it may not fit; dsv3 plan says "
                "which settings would lower it", is_warning=True)


def prove_tokens(prefixes: Sequence[str]) -> None:
    """Compare every block of tokens of some datasets with its checksum; a dataset without any is passed over.

    Raises:
        DamagedFileError: one is damaged.
    """
    with slow_work("prove tokens", total=len(prefixes), unit="dataset") as work:
        for prefix in prefixes:
            ProvedTokens(prefix).require_all()
            work.add()


def _check_unfinished(output: str, checkpoint: Path) -> None:
    """Refuse the rest of another conversion, beside which this one could not begin."""
    record = Path(os.path.abspath(output) + ".partial") / "conversion.json"
    if not record.is_file():
        return
    try:
        source = read_json(record).get("input")
    except (ValueError, AttributeError, OSError):
        source = None
    if source != str(checkpoint.resolve()):
        raise ConfigError(f"export_hf={output}: {record.parent} holds another conversion that was not finished (of "
                          f"{source}); remove it, or choose another folder")


def _listed(places: dict[str, str]) -> str:
    return ", ".join(f"{field}={place}" for field, place in places.items())


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
