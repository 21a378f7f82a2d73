"""Convert between Hugging Face's checkpoints of DeepSeek-V3-style models and ours, a tensor at a time.

    dsv3 convert hf-to-megatron --input DeepSeek-V3/ --output checkpoints/ --verify
    dsv3 convert megatron-to-hf --input checkpoints/ --output exported/ --dtype fp8
    dsv3 convert verify --hf DeepSeek-V3/ --megatron checkpoints/
    dsv3 convert inventory --preset dsv3-671b --dtype fp8

Memory stays below three times the largest tensor, whatever the model's size. A conversion that was stopped goes on
with the same command; nothing appears under the output's name before all of it is there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

from dsv3_megatron.config.family_json import model_of_folder
from dsv3_megatron.config.load import add_verify_files
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.config.training import require_license
from dsv3_megatron.process.cores import usable_cores


class ProgressBar:
    """Bytes done, on a terminal; nothing elsewhere."""

    def start(self, what: str, num_bytes: int) -> Callable[[int], None]:
        """A new bar; returns what adds bytes to it, from any thread."""
        from tqdm import tqdm

        bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=what, disable=None, mininterval=0.5)
        lock = threading.Lock()

        def add(count: int) -> None:
            with lock:
                bar.update(count)

        return add


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 convert",
        description="Convert between Hugging Face's checkpoints of DeepSeek-V3-style models and ours.")
    commands = parser.add_subparsers(dest="command", required=True)
    workers = min(8, usable_cores())

    add = commands.add_parser("hf-to-megatron", help="make a checkpoint to start a run from (--load)").add_argument
    add("--input", required=True, metavar="DIR", help="folder with config.json and safetensors")
    add("--output", required=True, metavar="DIR", help="folder to make; must not exist or be empty")
    for name in ("tensor", "pipeline", "expert"):
        add(f"--{name}-model-parallel-size", type=int, default=1, metavar="N",
            help="layout to check the model against and to record; the checkpoint loads under any (%(default)s)")
    add("--expert-tensor-parallel-size", type=int, default=1, metavar="N", help="likewise (%(default)s)")
    _add_common(add, workers)

    add = commands.add_parser(
        "megatron-to-hf", help="make a folder in Hugging Face's layout", description="Make a folder in Hugging Face's "
        "layout. Transformers loads it; which other programs do not take which models is said when it is made, and is "
        "in docs/export/README.md.").add_argument
    add("--input", required=True, metavar="DIR", help="folder of checkpoints")
    add("--output", required=True, metavar="DIR", help="folder to make; must not exist or be empty")
    add("--iteration", type=int, metavar="N", help="which checkpoint (the newest)")
    add("--dtype", choices=("bf16", "fp8", "fp32"),
        help="of the matrices (as the checkpoint's source was, or as the weights were trained)")
    add("--ema", action="store_true", help="export the moving average of the weights that the run kept (--ema-decay)")
    add("--tokenizer-model", metavar="DIR", help="folder with the tokenizer to add (the source's or the run's)")
    add("--max-shard-gb", type=float, default=4.25, metavar="X", help="largest file in GB (%(default)s)")
    add("--no-mtp", action="store_true", help="leave the MTP modules out: mlx-lm refuses their tensors, and "
        "Transformers names each one as unexpected")
    add("--license", default="unknown", metavar="ID", help="the hub's name of a licence, for the model card "
        "(%(default)s)")
    _add_common(add, workers)

    add = commands.add_parser("verify", help="compare two checkpoints tensor by tensor").add_argument
    add("--hf", required=True, metavar="DIR", help="folder in Hugging Face's layout")
    add("--megatron", required=True, metavar="DIR", help="folder of checkpoints")
    add("--iteration", type=int, metavar="N", help="which checkpoint (the newest)")
    add("--workers", type=int, default=workers, metavar="N", help="tensors compared at a time (%(default)s)")
    add_verify_files(add, "the input")

    add = commands.add_parser("inventory", help="list what a model's checkpoint holds, without weights").add_argument
    of_model = commands.choices["inventory"].add_mutually_exclusive_group()
    of_model.add_argument("--preset", choices=sorted(PRESETS), default="dsv3-671b", help="(%(default)s)")
    of_model.add_argument("--from-hf", metavar="FOLDER", help="the model of this folder's config.json, in place of a "
                          "preset's")
    add("--dtype", choices=("bf16", "fp8", "fp32"), default="fp8", help="(%(default)s)")
    add("--max-shard-gb", type=float, default=4.25, metavar="X", help="largest file in GB (%(default)s)")
    add("--list", action="store_true", help="list every tensor as a JSON line: file, name, dtype, shape")
    options = parser.parse_args(arguments)
    if getattr(options, "workers", 1) < 1:
        parser.error(f"--workers {options.workers} must be at least 1")
    return options


def _add_common(add: Any, workers: int) -> None:
    add("--workers", type=int, default=workers, metavar="N", help="files written at a time (%(default)s)")
    add_verify_files(add, "the input")
    add("--verify", action="store_true", help="compare every tensor with the source before the result gets its name, "
        "and print a table")


def _hf_to_megatron(options: argparse.Namespace) -> None:
    from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron

    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        expert_model_parallel_size=options.expert_model_parallel_size,
        expert_tensor_parallel_size=options.expert_tensor_parallel_size)
    table = convert_to_megatron(options.input, options.output, parallel=parallel, num_workers=options.workers,
                                is_verified=options.verify, verify_files=options.verify_files,
                                progress=ProgressBar())
    if table:
        print(table)
    print(f"{options.output}: start a run from it with --config {options.output}/model.json --load {options.output}")


def _megatron_to_hf(options: argparse.Namespace) -> None:
    require_license("--license", options.license)
    from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face

    table = convert_to_hugging_face(
        options.input, options.output, iteration=options.iteration, dtype=options.dtype,
        tokenizer=options.tokenizer_model, num_workers=options.workers,
        max_shard_bytes=int(options.max_shard_gb * 1e9), is_verified=options.verify, is_average=options.ema,
        is_without_mtp=options.no_mtp, license_id=options.license, losses=_losses(options.input, options.iteration),
        verify_files=options.verify_files, progress=ProgressBar())
    if table:
        print(table)
    print(options.output)


def _losses(folder: str, iteration: int | None) -> Any:
    """Last losses of the run that saved a checkpoint, where its logs are still there."""
    from dsv3_megatron.checkpoint.folder import read_manifest
    from dsv3_megatron.checkpoint.hf.model_card import Losses
    from dsv3_megatron.metrics.run_records import last_losses

    manifest = read_manifest(folder, iteration)
    return Losses(*last_losses(manifest.run.get("logging", {}).get("tensorboard_dir"), manifest.progress.iteration))


def _verify(options: argparse.Namespace) -> None:
    import torch

    from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
    from dsv3_megatron.checkpoint.hf.audit import audit
    from dsv3_megatron.checkpoint.hf.stored import MegatronWeights

    directory = HuggingFaceDirectory(options.hf, verify=options.verify_files)
    directory.check_copies()
    is_master = directory.stored["lm_head.weight"].dtype == torch.float32
    table = audit(directory, MegatronWeights(options.megatron, options.iteration, verify=options.verify_files),
                  is_master=is_master, num_workers=options.workers, progress=ProgressBar())
    print(table)
    table.require_expected()


def _inventory(options: argparse.Namespace) -> None:
    from dsv3_megatron.checkpoint.hf.safetensors_file import NAMES
    from dsv3_megatron.checkpoint.hf.weight_files import inventory, plan_shards

    model = model_of_folder(options.from_hf) if options.from_hf else preset(options.preset).model
    shards = plan_shards(model, options.dtype, int(options.max_shard_gb * 1e9))
    if options.list:
        for shard in shards:
            for entry in shard.entries:
                print(json_text({"file": shard.file, "name": entry.name, "dtype": NAMES[entry.dtype],
                                  "shape": list(entry.shape)}))
        return
    print(inventory(shards))


_COMMANDS = {"hf-to-megatron": _hf_to_megatron, "megatron-to-hf": _megatron_to_hf, "verify": _verify,
             "inventory": _inventory}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    options = _parse_arguments(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dsv3_megatron").setLevel(logging.INFO)
    try:
        from dsv3_megatron.platform import prepare

        prepare()  # before anything imports Megatron-Core
        _COMMANDS[options.command](options)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0
