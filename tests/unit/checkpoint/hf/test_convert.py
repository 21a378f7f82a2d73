"""Conversions there and back, what stops them, and that nothing half-done is ever under the final name."""

from __future__ import annotations

import dataclasses
import errno
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_megatron.certification.reference_weights import is_router_bias
from dsv3_megatron.checkpoint.byte_ranges import write_tensor
from dsv3_megatron.checkpoint.folder import CheckpointError, read_manifest
from dsv3_megatron.checkpoint.hf import row_strips, to_hugging_face, to_megatron
from dsv3_megatron.checkpoint.hf.directory import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.checkpoint.hf.workplace import single_threaded_workers
from dsv3_megatron.commands import convert as convert_checkpoint
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.data.folder_checksums import read_folder_checksums, require_all_whole
from dsv3_megatron.data.hashed_files import HashedFile
from dsv3_megatron.ops.fp8.published import quantize_weight_blocks
from tests.family import FAMILY, small_folder
from tests.hugging_face import QUANTIZED, config_json, dequantized, published_weights, quantized, write_checkpoint
from tests.parity.architectures import variant
from tests.signing import sign

ROOT = Path(__file__).resolve().parents[4]
# Wider than one block, and no multiple of it.
WIDE = dataclasses.replace(variant("plain"), hidden_size=130, moe_ffn_hidden_size=136, num_experts=4)
ITERATION = "iter_0000000"


def make_source(folder: Path, kind: str, model: Any = WIDE, num_shards: int = 3, **changes: Any) -> Path:
    weights = published_weights(model, torch.float32 if kind == "fp32" else torch.bfloat16)
    if kind == "fp8":
        weights = quantized(weights)
    if kind == "bf16-bias":  # as transformers writes a model cast to bf16
        weights = {name: value.bfloat16() for name, value in weights.items()}
    return write_checkpoint(folder, config_json(model, **changes), weights, num_shards)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_files(one: Path, other: Path) -> None:
    """An export has the other's files, and their checksums."""
    names = sorted(file.name for file in one.iterdir())
    assert sorted({*names, "checksums.json"}) == sorted(file.name for file in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


# ---- there and back ----


@pytest.mark.parametrize(("kind", "name", "num_shards"), [
    ("bf16", "plain", 3), ("fp32", "plain", 0), ("fp8", "plain", 2), ("bf16-bias", "mtp-2-groups", 3),
    ("fp8", "no-shared", 3), ("fp8", "full-rank-query", 0), ("bf16", "all-dense", 1), ("fp32", "yarn-mscale", 2)])
def test_there_and_back_is_the_same_files(tmp_path, kind, name, num_shards):
    model = WIDE if name == "plain" else variant(name)
    source = make_source(tmp_path / "hf", kind, model, num_shards)
    (source / "tokenizer.json").write_text('{"model": "é"}')
    (source / "modeling_deepseek.py").write_text("print('never run')")
    there = convert_to_megatron(source, tmp_path / "ours", is_verified=True)
    back = convert_to_hugging_face(tmp_path / "ours", tmp_path / "back", is_verified=True)
    assert_same_files(source, tmp_path / "back")
    for table in (there, back):
        assert table is not None
        assert sum(row.num_tensors for row in table.rows) == sum(row.num_identical for row in table.rows)
        assert sum(row.num_tensors for row in table.rows) == len(HuggingFaceDirectory(source).tensors)
        assert "identical" in str(table)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "hf", "ours"], "nothing is left over"


@pytest.mark.parametrize("name", FAMILY)
def test_models_of_the_family_there_and_back(tmp_path, name):
    """The same files again, `config.json` too, from its own model type, frequencies and scales."""
    content, weights = small_folder(name)
    source = write_checkpoint(tmp_path / "hf", content, weights, 2)
    convert_to_megatron(source, tmp_path / "ours", is_verified=True)
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "back", is_verified=True)
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_other_spellings_of_the_weights_there_and_back(tmp_path, kind):
    """Experts in one tensor a projection and stored frequencies are the same files again, and are the same model."""
    model = dataclasses.replace(WIDE, moe_ffn_hidden_size=128)  # FP8's blocks divide between gate and up
    apart = make_source(tmp_path / "apart", kind, model, 0)
    weights = load_file(apart / "model.safetensors")
    fused = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for layer in (1, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts"
        for end in ("", "_scale_inv") if kind == "fp8" else ("",):
            gate, up, down = (torch.stack([weights[f"{prefix}.{expert}.{name}_proj.weight{end}"].view(torch.uint8)
                                           for expert in range(model.num_experts)]) for name in ("gate", "up", "down"))
            dtype = weights[f"{prefix}.0.gate_proj.weight{end}"].dtype
            fused[f"{prefix}.gate_up_proj{end}"] = torch.cat((gate, up), 1).view(dtype)
            fused[f"{prefix}.down_proj{end}"] = down.view(dtype)
    for layer in range(3):
        fused[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.tensor(
            [10000.0 ** (-2 * pair / 8) for pair in range(4)])
    source = write_checkpoint(tmp_path / "hf", config_json(model), fused, 2)
    convert_to_megatron(source, tmp_path / "ours", is_verified=True)
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "back", is_verified=True)
    assert_same_files(source, tmp_path / "back")
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "published", dtype="fp32", is_verified=True)
    expected = dequantized(weights)
    result = read_all(tmp_path / "published")
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name].float()) for name in result)


def test_mtp_left_out_by_transformers(tmp_path):
    """config.json speaks of an MTP module that the weights do not have."""
    weights = {name: value for name, value in published_weights(WIDE).items() if "model.layers.3." not in name}
    source = write_checkpoint(tmp_path / "hf", config_json(WIDE), weights)
    convert_to_megatron(source, tmp_path / "ours")
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    assert read_manifest(tmp_path / "ours").run["model"]["mtp_num_layers"] == 0


def test_bf16_to_fp8_is_the_reference_quantizer(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    convert_to_megatron(source, tmp_path / "ours")
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "fp8", dtype="fp8", is_verified=True)
    original, result = read_all(source), read_all(tmp_path / "fp8")
    num_matrices = 0
    for name, value in original.items():
        if value.ndim == 2 and any(f"{part}.weight" in name for part in QUANTIZED):
            values, scales = quantize_weight_blocks(value)
            assert torch.equal(result[name].view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(result[name + "_scale_inv"], scales), name
            num_matrices += 1
        else:
            assert result[name].dtype == value.dtype and torch.equal(result[name], value), name
    assert len(result) == len(original) + num_matrices
    content = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert content["quantization_config"]["weight_block_size"] == [128, 128]
    assert HuggingFaceDirectory(tmp_path / "fp8").is_fp8


def test_fp8_to_bf16_and_fp32(tmp_path):
    source = make_source(tmp_path / "hf", "fp8")
    convert_to_megatron(source, tmp_path / "ours")
    expected = dequantized(read_all(source))
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        convert_to_hugging_face(tmp_path / "ours", tmp_path / dtype, dtype=dtype, is_verified=True)
        result = read_all(tmp_path / dtype)
        assert result.keys() == expected.keys()
        for name, value in result.items():
            assert value.dtype == (torch.float32 if is_router_bias(name) else torch_dtype)
            assert torch.equal(value.float(), expected[name].float()), name
        assert "quantization_config" not in json.loads((tmp_path / dtype / "config.json").read_text())


def test_dtypes_mixed_within_one_parameter(tmp_path):
    """A gate in BF16 on an up-projection in FP32, one expert in FP32: held in FP32, and written as they were."""
    weights = published_weights(WIDE)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.2.gate_proj.weight"):
        weights[name] = weights[name].float() * 1.0001
    source = write_checkpoint(tmp_path / "hf", config_json(WIDE), weights)
    convert_to_megatron(source, tmp_path / "ours", is_verified=True)
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_weights_that_are_not_what_was_converted(tmp_path):
    source = make_source(tmp_path / "hf", "fp8")
    convert_to_megatron(source, tmp_path / "ours")
    scales = tmp_path / "ours" / ITERATION / "hf_scales.safetensors"
    content = load_file(scales)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    content[name] = content[name] * 1.5
    save_file(content, scales)
    sign(tmp_path / "ours" / ITERATION)
    with pytest.raises(CheckpointError, match="o_proj.weight is not what was converted"):
        convert_to_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_run_that_starts_from_it(tmp_path):
    """model.json is a --config whose architecture is the checkpoint's; the layout is checked and recorded."""
    source = make_source(tmp_path / "hf", "bf16")
    layout = ParallelConfig(pipeline_model_parallel_size=3, expert_model_parallel_size=2)
    convert_to_megatron(source, tmp_path / "ours", parallel=layout)
    run = parse_command(["--config", str(tmp_path / "ours" / "model.json")]).run
    assert run.model == MegatronWeights(tmp_path / "ours").model == HuggingFaceDirectory(source).model
    manifest = read_manifest(tmp_path / "ours")
    assert manifest.contents == "weights" and manifest.progress.iteration == 0
    assert manifest.run["parallel"]["pipeline_model_parallel_size"] == 3
    with pytest.raises(ConfigError, match="expert_model_parallel_size=3 must divide num_experts=4"):
        convert_to_megatron(source, tmp_path / "other", parallel=ParallelConfig(expert_model_parallel_size=3))
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.partial").exists()


# ---- stops ----


def stop_after(num_bytes: int, error: BaseException):
    """Writing bytes fails for good after so many."""
    real, done, lock = os.pwrite, 0, threading.Lock()

    def write(target: int, data: memoryview, offset: int) -> int:
        nonlocal done
        with lock:
            done += len(data)
            if done > num_bytes:
                raise error
        return real(target, data, offset)

    return mock.patch("os.pwrite", write)


def directions(tmp_path: Path):
    """Both conversions as (name, function, final folder, file that shows it is complete)."""
    source = make_source(tmp_path / "hf", "bf16", num_shards=6)
    convert_to_megatron(source, tmp_path / "ready", max_file_bytes=300_000)
    return [
        (lambda: convert_to_megatron(source, tmp_path / "ours", num_workers=1, max_file_bytes=300_000),
         tmp_path / "ours", "*/result/*/*.distcp"),
        (lambda: convert_to_hugging_face(tmp_path / "ready", tmp_path / "back", num_workers=1),
         tmp_path / "back", "*/result/*.safetensors"),
    ]


def test_disk_full_then_the_same_command_goes_on(tmp_path):
    for convert, output, pattern in directions(tmp_path):
        with (stop_after(800_000, OSError(errno.ENOSPC, "No space left on device")),
              pytest.raises(CheckpointError, match="could not be written: No space left on device; free some space "
                                                   "and give the same command again")):
            convert()
        assert not output.exists()
        finished = {file: file.stat().st_ino for file in tmp_path.glob(pattern) if file.stat().st_size}
        assert finished, "some files were complete"
        convert()
        renamed = {output / file.relative_to(tmp_path / f"{output.name}.partial/result"): inode
                   for file, inode in finished.items()}
        renamed = {Path(str(file).replace(".saving", "")): inode for file, inode in renamed.items()}
        assert {file: file.stat().st_ino for file in renamed} == renamed, "what was complete was not written again"
        assert not output.with_name(output.name + ".partial").exists()
    assert_same_files(tmp_path / "hf", tmp_path / "back")


def test_interrupted(tmp_path):
    for convert, output, _pattern in directions(tmp_path):
        with stop_after(800_000, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            convert()
        assert not output.exists()
        convert()
    assert_same_files(tmp_path / "hf", tmp_path / "back")


KILLED = """
import os, signal, sys
from dsv3_megatron.platform import prepare
prepare()
real, written = os.pwrite, 0
def write(*arguments):
    global written
    written += 1
    if written == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
os.pwrite = write
from dsv3_megatron.commands.convert import main
sys.exit(main(sys.argv[2:]))
"""


def test_killed_then_the_same_command_goes_on(tmp_path):
    source, output = make_source(tmp_path / "hf", "bf16", num_shards=6), tmp_path / "ours"
    command = ["hf-to-megatron", "--input", str(source), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, "40", *command], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert not output.exists() and (tmp_path / "ours.partial").exists()
    assert convert_checkpoint.main([*command, "--verify"]) == 0
    assert convert_checkpoint.main(["megatron-to-hf", "--input", str(output), "--output", str(tmp_path / "back")]) == 0
    assert_same_files(source, tmp_path / "back")


def test_another_conversion_was_under_way(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    with stop_after(100_000, OSError(errno.EIO, "I/O error")), pytest.raises(CheckpointError, match="I/O error"):
        convert_to_megatron(source, tmp_path / "ours")
    other = make_source(tmp_path / "hf2", "bf16")
    with pytest.raises(CheckpointError, match=r"ours.partial holds another conversion .*input was .*hf.*, is .*hf2"):
        convert_to_megatron(other, tmp_path / "ours")
    os.utime(next(source.glob("*.safetensors")), (0, 0))
    with pytest.raises(CheckpointError, match="holds another conversion that was not finished .files was"):
        convert_to_megatron(source, tmp_path / "ours")


@pytest.mark.parametrize(("name", "message"), [
    ("result/*/__0_0.distcp", r"__0_0\.distcp is damaged: the \d+ bytes from offset 0 on .*; remove .*__0_0\.distcp"
     r"\.json, and the file is written again"),
    ("finished/*/__0_0.distcp.json", r"__0_0\.distcp\.json cannot be gone on from \(.*\): remove it, and the file is "),
    ("conversion.json", r"conversion\.json does not say what is being converted \(.*\): remove .*ours\.partial"),
])
def test_what_was_finished_and_is_damaged_is_not_gone_on_from(tmp_path, name, message):
    source = make_source(tmp_path / "hf", "bf16", num_shards=6)
    with stop_after(800_000, OSError(errno.EIO, "I/O error")), pytest.raises(CheckpointError, match="I/O error"):
        convert_to_megatron(source, tmp_path / "ours", num_workers=1, max_file_bytes=300_000)
    (file,) = (tmp_path / "ours.partial").glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_to_megatron(source, tmp_path / "ours", num_workers=1, max_file_bytes=300_000)
    assert not (tmp_path / "ours").exists()


def test_unfinished_work_behind_a_link_is_not_taken_over(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ours.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"ours\.partial is a link, where a folder of this user's would be"):
        convert_to_megatron(source, tmp_path / "ours")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_processes_at_once(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    entered, go_on = threading.Event(), threading.Event()

    def wait(*_arguments: Any, **_keywords: Any) -> None:
        entered.set()
        assert go_on.wait(60)

    with mock.patch.object(HuggingFaceDirectory, "check_copies", wait):
        thread = threading.Thread(target=convert_to_megatron, args=(source, tmp_path / "ours"))
        thread.start()
        assert entered.wait(60)
        with pytest.raises(CheckpointError, match="ours.partial is being written by another process"):
            convert_to_megatron(source, tmp_path / "ours")
        go_on.set()
        thread.join()
    assert (tmp_path / "ours" / ITERATION).is_dir()


def test_outputs_that_are_refused(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("full", "full is not empty; choose another output"), ("file", "exists and is not a folder")):
        with pytest.raises(CheckpointError, match=message):
            convert_to_megatron(source, tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    with (mock.patch("dsv3_megatron.checkpoint.hf.workplace.shutil.disk_usage", return_value=mock.Mock(free=1000)),
          pytest.raises(CheckpointError, match=r"needs 0.00 GB more, 0.00 GB are free there")):
        convert_to_megatron(source, tmp_path / "small")
    (tmp_path / "empty").mkdir()
    convert_to_megatron(source, tmp_path / "empty")
    assert (tmp_path / "empty" / ITERATION).is_dir()


def test_where_the_kernel_takes_a_part_at_a_time(tmp_path):
    """A file system may read and write less than it is asked to, as over a network."""
    source = make_source(tmp_path / "hf", "bf16")
    read, write = os.preadv, os.pwrite
    with (mock.patch("os.preadv", lambda file, views, at: read(file, [view[:1000] for view in views], at)),
          mock.patch("os.pwrite", lambda file, data, at: write(file, data[:700], at))):
        convert_to_megatron(source, tmp_path / "ours")
        convert_to_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    require_all_whole(tmp_path / "back", read_folder_checksums(tmp_path / "back"))


# ---- damage ----


def test_a_scale_that_is_no_number(tmp_path):
    source = make_source(tmp_path / "hf", "fp8")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    file = next(file for file in source.glob("*.safetensors") if name in load_file(file))
    content = load_file(file)
    for value, message in ((float("nan"), f"{file}: tensor {name} has nan for block .0, 1.; a scale must be"),
                           (1e-40, f"{file}: tensor {name} has scales from 1e-40")):
        content[name][0, 1] = value
        save_file(content, file)
        with pytest.raises(CheckpointError, match=message):
            convert_to_megatron(source, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        shutil.rmtree(tmp_path / "ours.partial")


def test_a_source_that_is_cut_while_it_is_read(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    file = max(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    size = file.stat().st_size
    with mock.patch.object(HuggingFaceDirectory, "check_copies", lambda self: os.truncate(file, size - 1000)), \
            pytest.raises(CheckpointError, match=rf"{file.name} ends within tensor model\.\S+: it is truncated"):
        convert_to_megatron(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def ours_of(tmp_path: Path) -> Path:
    convert_to_megatron(make_source(tmp_path / "hf", "bf16"), tmp_path / "ours")
    return tmp_path / "ours"


def test_our_checkpoint_damaged(tmp_path):
    ours = ours_of(tmp_path)
    file = ours / ITERATION / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"truncated or corrupt: __0_0.distcp has \d+ bytes"):
        convert_to_hugging_face(ours, tmp_path / "back")
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match=r"is truncated or corrupt: \S+ in __0_0.distcp: \S+ is damaged: .* from "
                       "offset 0 on do not have their checksum"):
        convert_to_hugging_face(ours, tmp_path / "back")
    sign(ours / ITERATION)
    with pytest.raises(CheckpointError, match=r"is truncated or corrupt: \S+ in __0_0.distcp: "):
        convert_to_hugging_face(ours, tmp_path / "back")
    file.write_bytes(whole)
    sign(ours / ITERATION, lambda content: content["run"]["model"].update(num_layers=4))
    with pytest.raises(CheckpointError, match=r"tensor decoder.layers.3.input_layernorm.weight is missing"):
        convert_to_hugging_face(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def flip_one_bit(ours: Path, name: str) -> None:
    weights = MegatronWeights(ours)
    tensor = HuggingFaceDirectory(ours.parent / "hf").tensors[name]
    ranges = weights.byte_ranges(tensor)
    assert ranges
    with open(ranges[0].file, "r+b") as stream:
        stream.seek(ranges[0].offset + 7)
        byte = stream.read(1)[0]
        stream.seek(ranges[0].offset + 7)
        stream.write(bytes([byte ^ 1]))


def test_verify_sees_one_bit(tmp_path, capsys):
    ours = ours_of(tmp_path)
    command = ["verify", "--hf", str(tmp_path / "hf"), "--megatron", str(ours)]
    assert convert_checkpoint.main(command) == 0
    table = capsys.readouterr().out.splitlines()
    num_tensors = len(HuggingFaceDirectory(tmp_path / "hf").tensors)
    assert re.split(r"\s{2,}", table[-1].strip())[:2] == ["all", str(num_tensors)]
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    flip_one_bit(ours, name)
    assert convert_checkpoint.main(command) == 2
    assert "do not have their checksum" in capsys.readouterr().err
    sign(ours / ITERATION)
    assert convert_checkpoint.main(command) == 2
    shown = capsys.readouterr()
    assert f"({name})" in shown.out and f"1 of {num_tensors - 3} tensors that are BF16" in shown.err


def test_a_failed_verification_publishes_nothing(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    name = "model.layers.1.self_attn.o_proj.weight"
    real = MegatronWeights.read

    def wrong(self, tensor, *arguments):
        value = real(self, tensor, *arguments)
        return value + 1 if tensor.name == name else value

    with (mock.patch.object(MegatronWeights, "read", wrong),
          pytest.raises(CheckpointError, match=f"differ; by .* {name}")):
        convert_to_megatron(source, tmp_path / "ours", is_verified=True)
    assert not (tmp_path / "ours").exists()


def test_two_architectures(tmp_path, capsys):
    ours = ours_of(tmp_path)
    other = make_source(tmp_path / "hf2", "bf16", dataclasses.replace(WIDE, hidden_size=128))
    assert convert_checkpoint.main(["verify", "--hf", str(other), "--megatron", str(ours)]) == 2
    assert "are of different architectures: " in capsys.readouterr().err


# ---- the command, and its parts ----


def test_the_command(tmp_path, capsys):
    source = make_source(tmp_path / "hf", "fp8")
    assert convert_checkpoint.main(["hf-to-megatron", "--input", str(source), "--output", str(tmp_path / "ours"),
                                    "--tensor-model-parallel-size", "2", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^F8_E4M3 +BF16 +\d+", shown, re.MULTILINE) and "--load" in shown
    assert convert_checkpoint.main(["megatron-to-hf", "--input", str(tmp_path / "ours"), "--output",
                                    str(tmp_path / "back"), "--dtype", "bf16", "--max-shard-gb", "0.001"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert convert_checkpoint.main(["hf-to-megatron", "--input", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert f"error: {tmp_path / 'config.json'} does not exist" in capsys.readouterr().err
    assert convert_checkpoint.main(["inventory", "--preset", "tiny", "--list"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"file": "model.safetensors", "name": "lm_head.weight", "dtype": "BF16",
            "shape": [2048, 128]} in lines


def test_tensors_of_several_strips(tmp_path):
    """Nothing larger than a strip is computed with at a time, and the result is the same, in all directions."""
    source = make_source(tmp_path / "hf", "fp8")
    convert_to_megatron(source, tmp_path / "ours")
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "wide", dtype="fp32")
    written: list[int] = []

    def write(target: HashedFile, offset: int, tensor: torch.Tensor) -> None:
        written.append(tensor.shape[0])
        write_tensor(target, offset, tensor)

    with (mock.patch.object(row_strips, "STRIP_ELEMENTS", 1), mock.patch.object(to_megatron, "write_tensor", write),
          mock.patch.object(to_hugging_face, "write_tensor", write)):
        convert_to_megatron(source, tmp_path / "ours in strips", is_verified=True)
        convert_to_hugging_face(tmp_path / "ours in strips", tmp_path / "back", is_verified=True)
        convert_to_hugging_face(tmp_path / "ours in strips", tmp_path / "wide in strips", dtype="fp32")
        convert_to_megatron(tmp_path / "wide", tmp_path / "ours wide")
        convert_to_hugging_face(tmp_path / "ours wide", tmp_path / "quantized", dtype="fp8", is_verified=True)
    assert_same_files(source, tmp_path / "back")
    assert_same_files(tmp_path / "wide", tmp_path / "wide in strips")
    assert max(written) == 128 and written.count(2) > 10, "tensors have 130 rows"
    quantized_again, wide = read_all(tmp_path / "quantized"), read_all(tmp_path / "wide")
    for name, value in quantized_again.items():
        if value.dtype == torch.float8_e4m3fn:
            values, scales = quantize_weight_blocks(wide[name])
            assert torch.equal(value.view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(quantized_again[name + "_scale_inv"], scales), name


def test_workers_compute_alone():
    """Each of several threads uses one core; afterwards the process, and what it starts, uses as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single_threaded_workers(2, "worker") as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
