"""The training command as a process: fast and light where it does not train, one line where a setting is wrong."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.commands import train
from dsv3_megatron.config.load import build_parser
from dsv3_megatron.config.presets import PRESETS
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import fingerprint

HEAVY = {"torch", "numpy", "megatron", "yaml", "transformers", "tensorboard"}


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "COLUMNS": "200", **environment})


def test_help_answers_in_under_a_second_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _run("-X", "importtime", "-m", "dsv3_megatron", "train", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "dsv3_megatron" in imported and not HEAVY & imported
    # Processor time: it is what the command takes, however busy the machine is.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.stdout.startswith("usage: bash examples/pretrain_dsv3.sh [--preset NAME] [--from-hf FOLDER] "
                                  "[--config FILE] [flags]")
    for action in build_parser()._actions:
        assert all(flag in done.stdout for flag in action.option_strings)


PRINT_EVERY_PRESET = """
import contextlib, io, json, sys
from dsv3_megatron.commands import train
tables = {}
for name in sys.argv[1:]:
    for extra in ([], ["--json"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert train.main(["--preset", name, "--print-model", *extra]) == 0
        tables[name + "".join(extra)] = out.getvalue()
print(json.dumps({"tables": tables, "modules": sorted(sys.modules)}))
"""


def test_print_model_of_every_preset_without_torch() -> None:
    done = _run("-c", PRINT_EVERY_PRESET, *PRESETS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not HEAVY & set(report["modules"])
    for name in PRESETS:
        text, values = report["tables"][name], json.loads(report["tables"][f"{name}--json"])
        assert text.startswith(f"{name}: ")
        numbers = {word.strip(",") for word in text.split()}
        parameters = values["parameters"]
        assert parameters["main_total"] + parameters["mtp_total"] == parameters["total"]
        for count in ("main_total", "main_active", "main_active_without_embedding", "mtp_total", "total"):
            assert f"{parameters[count]:,}" in numbers, (name, count)
    assert "671,026,404,352" in report["tables"]["dsv3-671b"]
    assert "11,610,067,968" in report["tables"]["dsv3-671b"]


def test_print_model_takes_the_layout_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--print-model", "--pipeline-model-parallel-size", "2", "--world-size", "4"]) == 0
    assert "on 4 ranks" in capsys.readouterr().out
    assert train.main(["--print-model", "--pipeline-model-parallel-size", "3", "--world-size", "4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "must divide world_size=4" in captured.err


def test_a_wrong_setting_ends_the_process_with_2_and_one_line() -> None:
    done = _run("-m", "dsv3_megatron", "train", "--preset", "dsv3-671b", "--expert-model-parallel-size", "6",
                WORLD_SIZE="1024", RANK="0")
    assert done.returncode == train.EXIT_CONFIG == 2
    assert done.stdout == ""
    assert done.stderr == ("error: expert_model_parallel_size=6 must divide num_experts=256; try 2, 4 or 8\n")


@pytest.mark.parametrize("arguments", [
    ["--num-layer", "3"], ["--config", "absent.yaml"], ["--lr", "abc"], ["--cp-comm-type", "p3p"],
    ["--pipeline-model-parallel-size", "3"], ["--expert-model-parallel-size", "8"],
])
def test_a_wrong_setting_is_printed_by_the_rank_that_meets_it(arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert train.main(arguments) == 2
    first = capsys.readouterr()
    assert first.out == "" and first.err.startswith("error: ") and first.err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert train.main(arguments) == 2
    other = capsys.readouterr()
    assert other.out == "" and other.err == f"{first.err[:-1]} (rank 1 of 4, on {socket.gethostname()})\n"


# -- the run's inputs ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Prefix of a dataset of 200 documents of 10 tokens by a tokenizer of 2,048."""
    with DatasetWriter(tmp_path / "tokens", vocab_size=2048, tokenizer_fingerprint="0123456789abcdef") as writer:
        writer.add_documents(np.arange(2000), np.full(200, 10))
    return str(tmp_path / "tokens")


SHORT = ["--split", "50,50,0"]  # of so little data, some for validation


def test_check_only_says_what_it_checked_a_line_each(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                     ) -> None:
    save = str(tmp_path / "new" / "folder")
    assert train.main(["--check-only", "--data-path", data, *SHORT, "--save", save]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    *lines, memory = captured.out.splitlines()
    assert lines == [
        "layout: 1 process = tensor 1 x pipeline 1 x data 1, expert 1, schedule 1f1b, 4 micro-batches of 2 x 256 "
        "tokens in a step of a replica",
        "length: 400 steps, 819,200 tokens",
        # 1,000 tokens are three samples of 256 and a rest: 3,200 and 128 samples are 1066.7 and 42.7 times that.
        f"data: {data}: 100 documents, 1,000 tokens for training; the run takes 3,200 samples of 256 tokens in all, "
        "1.07e+03 epochs of this",
        f"validation: {data}: 100 documents, 1,000 tokens for validation; the run takes 128 samples each time, every "
        "100 steps, 42.7 epochs of this",
        "vocabulary: 2,048 ids of the data's tokenizer in 2,048 rows",
        f"folders: save={save} can be written to"]
    assert memory.startswith("memory: about 0.1 GB at the peak of the fullest process")


def test_a_run_that_starts_says_nothing_of_what_is_well(data: str, capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_train", lambda command, rank: 77)
    assert train.main(["--data-path", data, *SHORT]) == 77
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert train.main(["--data-path", data, *SHORT, "--vocab-size", "8192"]) == 77
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("warning: vocabulary: more than half of the vocab_size=8192")


def test_every_run_checks_its_tokenizer_against_the_datas(data: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Not --check-only alone; the tokenizer that made the data is let through to the training."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}')
    monkeypatch.setattr(train, "_train", lambda command, rank: 77)
    arguments = ["--data-path", data, "--tokenizer-model", str(tmp_path), *SHORT]
    assert train.main(arguments) == 2
    mine = fingerprint(tmp_path)
    assert capsys.readouterr().err == (
        f"error: the data was made by tokenizer 0123456789ab, the run's tokenizer_model is {mine[:12]}: give the "
        "tokenizer that made the data, or preprocess again\n")
    with DatasetWriter(data, vocab_size=2048, tokenizer_fingerprint=mine, is_overwrite_allowed=True) as writer:
        writer.add_documents(np.arange(2000), np.full(200, 10))
    assert train.main(arguments) == 77


def test_check_only_plans_for_the_processes_it_is_told(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--check-only", "--data-path", data, *SHORT, "--expert-model-parallel-size", "2"]
    assert train.main([*arguments, "--world-size", "2"]) == 0
    assert train.main([*arguments, "--world-size", "3"]) == 2
    assert "must divide world_size=3" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "data_path is not set: give the training data's PREFIX (of PREFIX.bin and PREFIX.idx, made by "
         "dsv3 preprocess), as in --data-path PREFIX"),
    (["--data-path", "{folder}/absent"], "{folder}/absent.idx"),
    (["--data-path", "0.5", "{data}", "{data}"], "data_path=0.5 {data} {data} mixes weights and prefixes"),
    (["--data-path", "{data}", "--valid-data-path", "-1", "{data}"],
     "valid_data_path: the weight -1.0 of {data} must be a positive number"),
    (["--data-path", "{data}", "--vocab-size", "2000"],
     "vocabulary of the data (2048) larger than the model's (2000): {data} holds ids up to 2047; set vocab_size to at "
     "least 2048, or preprocess with a smaller tokenizer"),
    (["--data-path", "{data}", "--tokenizer-model", "{tokenizer}"],
     "the data was made by tokenizer 0123456789ab, the run's tokenizer_model is {fingerprint}: give the tokenizer that "
     "made the data, or preprocess again"),
    (["--data-path", "{data}", "--valid-data-path", "{other}"],
     "the datasets were made by different tokenizers ({data} by 0123456789ab, {other} by fedcba987654): preprocess all "
     "with one tokenizer"),
    (["--data-path", "{data}", "--tokenizer-model", "{folder}/absent"],
     "tokenizer_model={folder}/absent: {folder}/absent does not exist; give a folder with a tokenizer.json"),
    (["--data-path", "{data}", "--reset-attention-mask", "--eod-mask-loss"],
     "reset_attention_mask and eod_mask_loss need documents that end with an EOD token, and nothing says which token "
     "that is in {data}, which has no sidecar with an eod_id: give the tokenizer that made it (--tokenizer-model DIR), "
     "or leave reset_attention_mask and eod_mask_loss off"),
    (["--data-path", "{other}", "--reset-position-ids"],
     "reset_position_ids needs documents that end with an EOD token, and {other} was made without --append-eod"),
    (["--data-path", "{data}", "--load", "{folder}/empty", "--exit-on-missing-checkpoint"],
     "load={folder}/empty has no checkpoint"),
    (["--data-path", "{data}", "--save", "{data}.bin"], "save={data}.bin cannot be written to"),
    (["--data-path", "{data}", "--pipeline-model-parallel-layout", "Ettt"],
     "pipeline_model_parallel_layout='Ettt' holds 3 transformer layers (t); num_layers=4"),
])
def test_check_only_names_what_is_wrong(arguments: list[str], message: str, data: str, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(tmp_path / "other", vocab_size=2048, tokenizer_fingerprint="fedcba9876543210",
                       options={"append_eod": False, "eod_id": 1}) as writer:
        writer.add_documents(np.arange(10), np.array([4, 6]))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    places = {"data": data, "folder": str(tmp_path), "other": str(tmp_path / "other"),
              "tokenizer": str(tmp_path / "tokenizer"), "fingerprint": fingerprint(tmp_path / "tokenizer")[:12]}
    assert train.main(["--check-only", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.format(**places) in error
