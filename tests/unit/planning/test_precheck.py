"""What the check before a run finds, and what it says: data, vocabulary, memory, folders, export."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.planning import precheck
from dsv3_megatron.planning.memory.estimate import estimate_memory

EOD = 1


def dataset(folder: Path, name: str, lengths: list[int], *, fill: int = 5, eod: int = EOD) -> str:
    """A dataset of documents of one token again and again, each with its EOD."""
    tokens = np.full(sum(lengths), fill)
    tokens[np.cumsum(lengths, dtype=np.int64) - 1] = eod
    with DatasetWriter(folder / name, vocab_size=2048, options={"append_eod": True, "eod_id": eod}) as writer:
        writer.add_documents(tokens, np.array(lengths, dtype=np.int64))
    return str(folder / name)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return dataset(tmp_path, "good", [100] * 100)


@pytest.mark.parametrize(("backend", "message"), [
    ("fused", "no engine: it needs a GPU; no cudnn: it needs a GPU"), ("flash", "no flash3: it needs a GPU"),
    ("local", ""), ("unfused", ""), ("auto", "")])
def test_attention_that_is_not_possible_here(backend: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "smallest_gpu_bytes", lambda: None)
    run = preset("tiny").override(attention_backend=backend)
    if message:
        with pytest.raises(ConfigError, match=f"attention_backend={backend} is not possible.*{message}"):
            precheck.check_attention(run)
    else:
        precheck.check_attention(run)
    precheck.check_attention(run, is_planned=True)
    wide = run.override(qk_nope_head_dim=256, precision="bf16", transformer_impl="local")
    if backend == "flash":
        with pytest.raises(ConfigError, match="no flash_padded: keys are at most 256 wide"):
            precheck.check_attention(wide, is_planned=True)


def run_of(*data_path: str, **changes: Any) -> RunConfig:
    run = preset("tiny").override(data_path=list(data_path), split="50,50", **changes)
    run.validate(1)
    return run


# -- data ----------------------------------------------------------------------------------------------


def test_epochs_of_each_dataset_of_a_blend(good: str, tmp_path: Path) -> None:
    """By hand: 8 x 400 = 3,200 samples, a quarter and three quarters of them; 4,999 // 256 = 19 and 999 // 256 = 3."""
    small = dataset(tmp_path, "small", [20] * 100)
    run = run_of("1", good, "3", small, eval_interval=0)
    texts = [told.text for told in precheck.check_run_data(run)]
    assert texts == [
        f"data: {good}: 50 documents, 5,000 tokens for training; the run takes 3,200 samples of 256 tokens in all, "
        f"{800 / 19:.3g} epochs of this",
        f"data: {small}: 50 documents, 1,000 tokens for training; the run takes 3,200 samples of 256 tokens in all, "
        f"{2400 / 3:.3g} epochs of this",
        "validation: off (eval_interval=0)"]


def test_each_dataset_of_a_run_with_phases(good: str) -> None:
    run = run_of(good, phases=[{"name": "a", "train_iters": 5}, {"name": "b", "train_iters": 5, "seq_length": 128}])
    texts = [told.text for told in precheck.check_run_data(run)]
    assert [text.split(":")[0] for text in texts] == [
        "data of phase a", "validation of phase a", "data of phase b", "validation of phase b"]
    assert "40 samples of 128 tokens" in texts[2]


@pytest.mark.parametrize(("lengths", "changes", "message"), [
    ([], {}, "has 0 documents (0 tokens in all) for training, fewer than one sample"),
    ([], {"eval_interval": 0}, "has 0 documents (0 tokens in all) for training, fewer than one sample"),
    ([3000], {"split": "99,1,0"}, "has 0 documents (3000 tokens in all) for validation, fewer than one sample"),
    ([300, 20], {}, "has 20 tokens for validation, fewer than one sample of seq_length + 1 = 257 needs: use more data, "
     "a shorter seq_length or another split; or --eval-interval 0 for no validation"),
    ([20, 300], {}, "has 20 tokens for training, fewer than one sample of seq_length + 1 = 257 needs"),
    ([256], {"split": "1"}, "has 1 documents (256 tokens in all) for training, fewer than one sample"),
])
def test_too_little_data(lengths: list[int], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        precheck.check_run_data(run_of(dataset(tmp_path, "data", lengths)).override(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"split": "99,1,0"}, {"split": "100,0,0"}])
def test_a_run_that_does_not_validate_needs_no_data_for_it(changes: dict[str, Any], tmp_path: Path) -> None:
    """And builds none: 3,000 tokens in one document are all for training."""
    from dsv3_megatron.data.datasets import build_datasets, dataset_config

    run = run_of(dataset(tmp_path, "data", [3000])).override(eval_interval=0, **changes)
    assert precheck.check_run_data(run)[-1].text == "validation: off (eval_interval=0)"
    data = build_datasets(dataset_config(run))
    assert data.valid is None and data.train[0]["tokens"].shape == (256,)


def test_a_split_without_validation_is_said(good: str) -> None:
    assert precheck.check_run_data(run_of(good).override(split="100,0,0"))[-1].text == (
        "validation: none: split=100,0,0 leaves no documents for it")


@pytest.mark.parametrize("purpose", ["training", "validation"])
def test_data_without_a_token_that_counts(good: str, tmp_path: Path, purpose: str) -> None:
    empty = dataset(tmp_path, "eod", [100] * 50, fill=EOD)
    paths = {"data_path": [empty if purpose == "training" else good],
             "valid_data_path": [good if purpose == "training" else empty]}
    run = preset("tiny").override(eod_mask_loss=True, **paths)
    message = f"the {purpose} data ({empty}) hold no other token to predict from: give --no-eod-mask-loss"
    with pytest.raises(ConfigError, match=r"^eod_mask_loss=True leaves out") as error:
        precheck.check_run_data(run)
    assert message in str(error.value)
    assert precheck.check_run_data(run.override(eod_mask_loss=False))
    if purpose == "validation":
        assert precheck.check_run_data(run.override(eval_interval=0))
    assert precheck.check_run_data(run.override(data_path=[empty, good], valid_data_path=[good]))


def test_the_one_token_that_counts_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "_IDS_READ", 7)
    for place in (0, 6, 7, 50, 97):
        tokens = np.full(200, EOD)
        tokens[place] = 9
        with DatasetWriter(tmp_path / f"at{place}", vocab_size=2048) as writer:
            writer.add_documents(tokens, np.array([98, 2, 100]))
        prefix = str(tmp_path / f"at{place}")
        assert precheck.has_counted_token(prefix, (0, 3), EOD) and precheck.has_counted_token(prefix, (0, 1), EOD)
        assert not precheck.has_counted_token(prefix, (1, 3), EOD)
        assert not precheck.has_counted_token(prefix, (0, 0), EOD)


# -- vocabulary ----------------------------------------------------------------------------------------


def test_ids_of_the_tokenizer_beside_rows_of_the_model(good: str, tmp_path: Path) -> None:
    vocab = {f"t{number}": number for number in range(2500)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    run = run_of(good).override(tokenizer_model=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^vocab_size=2048 must hold the 2500 ids of tokenizer_model="):
        precheck.check_vocabulary(run, [good])
    (told,) = precheck.check_vocabulary(run.override(vocab_size=2560), [good])
    assert told.text == ("vocabulary: 2,500 ids of the tokenizer and 2,048 ids of the data's tokenizer in 2,560 rows, "
                         "60 of them padding")
    wide = precheck.check_vocabulary(run.override(vocab_size=5000), [good])
    assert [told.is_warning for told in wide] == [False, True]


# -- memory --------------------------------------------------------------------------------------------


def test_memory_beside_the_smallest_gpu(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(good)
    (rank,) = estimate_memory(run, 1, device="cuda")
    monkeypatch.setattr(precheck, "smallest_gpu_bytes", lambda: rank.peak_bytes)
    (told,) = precheck.check_memory(run, 1)
    assert not told.is_warning
    monkeypatch.setattr(precheck, "smallest_gpu_bytes", lambda: rank.peak_bytes - 1)
    with pytest.raises(ConfigError) as error:
        precheck.check_memory(run, 1)
    message = re.fullmatch(r"pipeline rank 0 needs about ([\d.]+) GB, more than the \1 GB of a GPU here: (--.+) would "
                           r"need ([\d.]+) GB; dsv3 plan --search finds layouts that fit; or give "
                           r"--allow-memory-overflow, for an estimate that you know to be too high", str(error.value))
    assert message
    assert float(message[3]) <= float(message[1])
    parse_command(["--preset", "tiny", *shlex.split(message[2])])  # flags to paste
    (told,) = precheck.check_memory(run, 1, allows_overflow=True)
    assert told.is_warning and told.text.startswith("memory: pipeline rank 0 needs about")


def test_memory_beside_a_machine_that_is_named(good: str) -> None:
    """The report's run in BF16, with nothing recomputed, does not fit an H800, whatever machine looks at it."""
    run = preset("dsv3-671b").override(fp8="none", recompute_granularity=None)
    with pytest.raises(ConfigError, match=r"needs about 1\d\d\.\d GB, more than the 84\.9 GB of an h800: --"):
        precheck.check_memory(run, 2048, is_planned=True, hardware="h800")
    (told,) = precheck.check_memory(run, 2048, is_planned=True, hardware="h200", allows_overflow=True)
    assert "of an h200" in told.text
    with pytest.raises(ConfigError, match="hardware='h801' is not known"):
        precheck.check_memory(run, 2048, hardware="h801")


def test_memory_of_all_processes_of_a_machine_without_gpus(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "smallest_gpu_bytes", lambda: None)
    run = run_of(good)
    (rank,) = estimate_memory(run, 4, device="cpu")
    monkeypatch.setattr(precheck, "host_bytes", lambda: 4 * rank.peak_bytes - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert precheck.check_memory(run, 4)[0].is_warning
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not precheck.check_memory(run, 4)[0].is_warning
    (planned,) = precheck.check_memory(run, 4, is_planned=True)
    assert planned.text.endswith("on a GPU; there is none here to compare with: name one with --hardware")


@pytest.mark.parametrize(("answer", "expected"), [("81559\n143771\n", 81559 * 2**20), ("", None), ("[N/A]\n", None)])
def test_what_the_driver_says(answer: str, expected: int | None, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert precheck.smallest_gpu_bytes() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert precheck.smallest_gpu_bytes() is None


# -- folders and export --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["save", "tensorboard_dir", "export_hf", "trace_schedule"])
def test_a_place_that_cannot_be_written_to(field: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    changes = {"save": str(tmp_path / "save"), field: str(tmp_path / "file" / "below")}
    with pytest.raises(ConfigError, match=rf"^{field}=.*/file/below cannot be written to: .*file is not a folder"):
        precheck.check_folders(preset("tiny").override(**changes))
    changes[field] = "/proc/nowhere"
    with pytest.raises(ConfigError, match=rf"^{field}=/proc/nowhere cannot be written to: "):
        precheck.check_folders(preset("tiny").override(**changes))


def test_a_read_only_file_system_is_found_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"^tensorboard_dir=.* cannot be written to: Read-only file system \("):
        precheck.require_writable("tensorboard_dir", str(tmp_path))


def test_nothing_stays_behind(tmp_path: Path) -> None:
    run = preset("tiny").override(save=str(tmp_path / "a" / "b"), tensorboard_dir=str(tmp_path / "c"))
    assert precheck.check_folders(run)[0].text.startswith("folders: save=")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="is a folder; give the name of a file"):
        precheck.require_writable("trace_schedule", str(tmp_path), is_file=True)


@pytest.mark.parametrize(("changes", "message"), [
    ({"layernorm_epsilon": 1e-5}, "the model could not be exported: layernorm_epsilon=1e-05: config.json has"),
    ({"moe_router_group_score_topk": 1}, "the model could not be exported: moe_router_group_score_topk=1"),
    ({"moe_router_group_mask": "zero"}, "the model could not be exported: moe_router_group_mask='zero'"),
])
def test_settings_that_cannot_be_exported_are_found_before_the_run(changes: dict[str, Any], message: str,
                                                                   tmp_path: Path) -> None:
    run = preset("tiny").override(save=str(tmp_path / "save"), export_hf=str(tmp_path / "out"), **changes)
    with pytest.raises(ConfigError) as error:
        precheck.check_export(run)
    assert str(error.value).startswith(f"export_hf={tmp_path / 'out'}: {message}")


def test_where_an_export_cannot_go(tmp_path: Path) -> None:
    out, save = tmp_path / "out", tmp_path / "save"
    run = preset("tiny").override(save=str(save), export_hf=str(out))
    assert [told.text for told in precheck.check_export(run)] == [
        f"export: the model can be written to {out} in Hugging Face's layout"]
    with pytest.raises(ConfigError, match="is the folder of save too"):
        precheck.check_export(run.override(export_hf=str(save)))
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text(json.dumps({"input": "/elsewhere/iter_0000001"}))
    with pytest.raises(ConfigError, match=r"out.partial holds another conversion that was not finished \(of /els"):
        precheck.check_export(run)
    (partial / "conversion.json").write_text(json.dumps({"input": str(save / "iter_0000400")}))
    assert precheck.check_export(run)  # its own, which goes on
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="out is not empty; choose another output, or remove it"):
        precheck.check_export(run)


def test_split_sequences_are_told_and_their_memory_is_estimated() -> None:
    run = preset("tiny").override(context_parallel_size=2, global_batch_size=8)
    assert precheck.check_layout(run, 4)[0].text.startswith("layout: 4 processes = tensor 1 x context 2 x pipeline 1 x "
                                                            "data 2, expert 1")
    (told,) = precheck.check_memory(run, 4)
    whole, split = (max(rank.peak_bytes for rank in estimate_memory(each, 4, device="cpu"))
                    for each in (run.override(context_parallel_size=1), run))
    assert split < whole and f"about {split / 1e9:.1f} GB at the peak" in told.text
