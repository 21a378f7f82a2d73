"""`dsv3 sft`: the base model's architecture, the report's settings, and a length in epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.folder import RunProgress, begin_save, finish_save
from dsv3_megatron.commands.sft import main, parse
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from tests.hugging_face import config_json
from tests.unit.data.chat.written import write_conversations


@pytest.fixture
def chat(tmp_path: Path) -> str:
    """Twenty conversations of which two share each of ten sequences."""
    write_conversations(tmp_path / "chat", [8] * 20, vocab_size=2048)
    return str(tmp_path / "chat")


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A checkpoint's manifest, without tensors."""
    run = preset("tiny").override(num_layers=6, seq_length=16, micro_batch_size=1, precision="bf16", vocab_size=2048)
    folder = str(tmp_path / "base")
    (begin_save(folder, 3) / "tensors").write_bytes(b"0")
    finish_save(folder, RunProgress(3, 24, 384), run.as_dict(), world_size=1, precision="bf16", versions={})
    return folder


def test_the_run_has_the_base_models_architecture_and_the_reports_settings(base: str, chat: str) -> None:
    run = parse(["--pretrained-checkpoint", base, "--data-path", chat, "--split", "100,0,0",
                  "--global-batch-size", "4"]).run
    assert run.model == preset("tiny").override(num_layers=6).model
    assert (run.training.seq_length, run.training.micro_batch_size, run.training.precision) == (16, 1, "bf16")
    training = run.training
    assert (training.lr, training.min_lr, training.lr_decay_style) == (5e-6, 1e-6, "cosine")
    assert training.lr_warmup_iters == 0
    assert (training.moe_router_bias_update_rate, training.moe_aux_loss_coeff, training.ema_decay) == (0, 0, 0)
    assert run.data.sft and not run.data.document_flags and run.checkpoint.load is None
    assert training.train_iters == 5  # twice ten sequences, four at a time
    run.validate(1)


@pytest.mark.parametrize(("flags", "steps"), [
    (["--epochs", "1"], 3), (["--epochs", "0.1"], 1), (["--epochs", "3", "--seq-length", "7"], 15),
    (["--train-iters", "9"], 9), (["--split", "50,50,0"], 3),
])
def test_a_length_in_epochs_is_rounded_up_to_steps(chat: str, flags: list[str], steps: int) -> None:
    given = ["--preset", "tiny", "--data-path", chat, "--seq-length", "16", "--global-batch-size", "4",
             "--split", "100,0,0"]
    words = [word for index, word in enumerate(given)
             if not any(flag in (word, given[index - 1]) for flag in flags if flag.startswith("--"))]
    assert parse([*words, *flags]).run.training.train_iters == steps


@pytest.mark.parametrize(("flags", "text"), [
    (["--epochs", "2", "--train-iters", "5"], "epochs=2: train_iters says how long the run is; leave one out"),
    (["--epochs", "0"], "epochs=0 must be greater than 0, and at most 1000"),
    (["--epochs", "much"], "argument --epochs: invalid"),
    (["--no-sft"], "sft=False: dsv3 sft trains on conversations; use dsv3 train for texts"),
    (["--pretrained-checkpoint", "gone"], "pretrained_checkpoint=gone: does not exist"),
])
def test_what_cannot_be_is_said(chat: str, flags: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--data-path", chat, "--split", "100,0,0", "--seq-length", "16", *flags])
    assert str(error.value).startswith(text)


def test_errors_end_with_2_before_anything_starts(chat: str, base: str, tmp_path: Path, capsys) -> None:
    assert main([]) == 2
    assert "data_path is not set" in capsys.readouterr().err
    assert main(["--data-path", chat, "--seq-length", "6", "--split", "100,0,0"]) == 2
    assert "20 conversation(s) of more than seq_length + 1 = 7 tokens" in capsys.readouterr().err
    given = ["--data-path", chat, "--split", "100,0,0", "--seq-length", "16", "--check-only"]
    assert main([*given, "--preset", "tiny", "--pretrained-checkpoint", base]) == 2
    said = capsys.readouterr().err
    assert (f"error: pretrained_checkpoint={base}: checkpoint iter_0000003 is of another architecture: num_layers=4 "
            "(checkpoint: 6)") in said
    model = preset("tiny").override(num_layers=2).model
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config_json(model)))
    assert main([*given, "--preset", "tiny", "--pretrained-checkpoint", str(tmp_path / "hf")]) == 2
    assert f"error: pretrained_checkpoint={tmp_path}/hf: " in capsys.readouterr().err


def test_check_only_says_what_the_data_hold(chat: str, capsys) -> None:
    given = ["--data-path", chat, "--split", "100,0,0", "--seq-length", "16", "--check-only", "--preset", "tiny"]
    assert main(given) == 0
    assert (f"data: {chat}: 20 conversations, 160 tokens for training in 10 samples, 94.1% full; the run takes 24 "
            "samples of 16 tokens in all") in capsys.readouterr().out
    assert main([*given[:4], "--long-conversations", "cut", "--seq-length", "6", *given[6:]]) == 0
    assert "20 conversations of more than 7 tokens are cut at their end" in capsys.readouterr().err


def test_conversations_are_packed_once(base: str, chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length in epochs, the checks and the run's own samples are of one packing; other files make another."""
    from dsv3_megatron.data.chat import packed_samples
    from dsv3_megatron.data.datasets import build_datasets, dataset_config
    from dsv3_megatron.planning.precheck import check_run_data

    packed = []
    real = packed_samples.pack_lengths
    monkeypatch.setattr(packed_samples, "pack_lengths",
                        lambda *given, **named: (packed.append(given[0].tolist()), real(*given, **named))[1])
    words = ["--pretrained-checkpoint", base, "--data-path", chat, "--split", "100,0,0"]
    run = parse(words).run
    check_run_data(run)
    first = build_datasets(dataset_config(run)).train[0]["tokens"]
    assert packed == [[8] * 20]
    write_conversations(f"{chat}2", [4] * 6, vocab_size=2048)
    for suffix in ("", "_mask"):
        for ending in ("bin", "idx", "json", "sums"):
            Path(f"{chat}2{suffix}.{ending}").replace(f"{chat}{suffix}.{ending}")
    second = build_datasets(dataset_config(parse(words).run)).train[0]["tokens"]
    assert packed == [[8] * 20, [4] * 6] and first.tolist() != second.tolist()
