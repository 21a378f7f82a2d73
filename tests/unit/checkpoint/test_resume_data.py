"""Resuming on data: a checkpoint knows its own, wherever they lie; what differs is named; a change must be meant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.checkpoint.folder import RunProgress, begin_save, finish_save
from dsv3_megatron.checkpoint.resume import plan_resumption
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data import contents
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.datasets import build_datasets, dataset_config
from dsv3_megatron.data.identity import data_identity
from dsv3_megatron.data.indexed_writer import DatasetWriter

BATCH, STEPS, SEQ = 8, 5, 16


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents.tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    for number, name in enumerate("abcd"):
        write(tmp_path / name, number)
    return preset("tiny").override(
        data_path=["2", str(tmp_path / "a"), "1", str(tmp_path / "b")], seq_length=SEQ, global_batch_size=BATCH,
        split="90,10,0", vocab_size=400)


def write(prefix: Path, number: int, *, fingerprint: str = "f" * 64) -> None:
    ids = np.random.default_rng(number).integers(2, 400, 30 * 25)
    ids[24::25] = 1
    with DatasetWriter(prefix, vocab_size=400, tokenizer_fingerprint=fingerprint, is_overwrite_allowed=True,
                       options={"append_eod": True, "eod_id": 1}) as writer:
        writer.add_documents(ids, np.full(30, 25))


def save(run: RunConfig, folder: Path, *, guards: dict[str, Any] | None = None, first_sample: int = 0) -> None:
    config = dataset_config(run)
    batches = BatchIterator(build_datasets(config).train, micro_batch_size=BATCH, global_batch_size=BATCH)
    for _ in range(STEPS):
        next(batches)
    data = {"identity": data_identity(config, run.data), "first_sample": first_sample, "position": batches.state_dict()}
    start = plan_resumption(run, None)
    (begin_save(folder, STEPS) / "__0_0.distcp").write_text("tensors")
    progress = RunProgress(STEPS, BATCH * STEPS, BATCH * STEPS * SEQ, guards or {}, start.schedules_at(STEPS), data)
    finish_save(folder, progress, run.as_dict(), versions={}, world_size=1, precision="fp32")


def test_the_same_data_go_on_where_they_were(run: RunConfig, tmp_path: Path) -> None:
    save(run, tmp_path / "saved", first_sample=3)
    start = plan_resumption(run, str(tmp_path / "saved"))
    assert start.first_sample == 3 and start.position is not None and not start.notes
    assert plan_resumption(run.override(allow_data_change=True), str(tmp_path / "saved")) == start
    assert not start.run.checkpoint.allow_data_change


def test_moved_data_and_data_without_their_sidecar_are_the_same(run: RunConfig, tmp_path: Path) -> None:
    save(run, tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    for name in "ab":
        for suffix in ("idx", "bin"):
            shutil.move(tmp_path / f"{name}.{suffix}", tmp_path / "elsewhere" / f"{name}2.{suffix}")
    moved = [str(tmp_path / "elsewhere" / f"{word}2") if word in "ab" else word for word in ("20", "a", "10", "b")]
    start = plan_resumption(run.override(data_path=moved), str(tmp_path / "saved"))
    assert start.position is not None and not start.notes
    resplit = run.override(split="9,0.5,0.5")  # the same share for training
    with pytest.raises(ValueError, match="does not exist"):
        plan_resumption(resplit, str(tmp_path / "saved"))
    assert not plan_resumption(resplit.override(data_path=moved), str(tmp_path / "saved")).notes


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"data_path": "2 a 1 c"}, "the data are a of 30 sequences, hash .*, c of 30 .* \\(checkpoint: a of .*, b of 30"),
    ({"data_path": "2 b 1 a"}, "the data are b of 30 sequences, hash .*, a of 30"),
    ({"data_path": "2 a 1 b 1 c"}, "the data are a .*, b .*, c"),
    ({"data_path": "a"}, "weights=None \\(checkpoint: \\[0.66"),
    ({"data_path": "1 a 1 b"}, "weights=\\[0.5, 0.5\\] \\(checkpoint: \\[0.66"),
    ({"data_path": "a b"}, "weights=None \\(checkpoint"),
    ({"seed": 7}, "seed=7 \\(checkpoint: 1234\\)"),
    ({"split": "95,5,0"}, "share for training=0.95 \\(checkpoint: 0.9\\)"),
    ({"valid_data_path": "d"}, "share for training=1.0 \\(checkpoint: 0.9\\)"),
    ({"eod_mask_loss": True}, "eod_mask_loss=True \\(checkpoint: False\\)"),
    ({"reset_attention_mask": True}, "reset_attention_mask=True \\(checkpoint: False\\)"),
    ({"reset_position_ids": True}, "reset_position_ids=True \\(checkpoint: False\\)"),
    ({"seq_length": 32, "override_opt_param_scheduler": True}, "seq_length=32 \\(checkpoint: 16\\)"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=[str(sorted(change.items())) for change, _ in CHANGES])
def test_other_data_are_named_and_must_be_meant(run: RunConfig, tmp_path: Path, changes: dict[str, Any], message: str
                                                ) -> None:
    save(run, tmp_path / "saved", guards={"counters": {"jumps": [[8, 16], [32, 36]]}})
    values = {name: [str(tmp_path / word) if word in "abcd" else word for word in value.split()]
              if name.endswith("data_path") else value for name, value in changes.items()}
    other = run.override(**values)
    with pytest.raises(ConfigError, match=f"trained on other data, or in another order: .*{message}.*"
                                          "--allow-data-change to go on with these: they are read from their first"):
        plan_resumption(other, str(tmp_path / "saved"))
    start = plan_resumption(other.override(allow_data_change=True), str(tmp_path / "saved"))
    assert start.first_sample == BATCH * STEPS + 12 and start.position is None
    assert "other data, read from their first sample" in start.notes[-1]


def test_data_made_again_under_the_same_name_are_other_data(run: RunConfig, tmp_path: Path) -> None:
    save(run, tmp_path / "saved")
    write(tmp_path / "a", 9)
    for _ in range(2):  # with a sidecar, and without
        with pytest.raises(ConfigError, match="the data are a of 30 sequences"):
            plan_resumption(run, str(tmp_path / "saved"))
        (tmp_path / "a.json").unlink(missing_ok=True)


def test_another_tokenizer_is_named(run: RunConfig, tmp_path: Path) -> None:
    save(run, tmp_path / "saved")
    for number, name in enumerate("ab"):
        write(tmp_path / name, number, fingerprint="0" * 64)
    with pytest.raises(ConfigError, match=r"order: tokenizer=000000000000 \(checkpoint: ffffffffffff\)"):
        plan_resumption(run, str(tmp_path / "saved"))


def test_a_checkpoint_that_does_not_know_its_data_is_taken_and_said(run: RunConfig, tmp_path: Path) -> None:
    (begin_save(tmp_path / "saved", STEPS) / "__0_0.distcp").write_text("tensors")
    finish_save(tmp_path / "saved", RunProgress(STEPS, BATCH * STEPS, BATCH * STEPS * SEQ), run.as_dict(), versions={},
                world_size=1, precision="fp32")
    start = plan_resumption(run, str(tmp_path / "saved"))
    assert "did not record its data: they are taken to be these" in start.notes[-1] and start.first_sample == 0


def test_a_phase_with_data_of_its_own_is_compared_with_them(run: RunConfig, tmp_path: Path) -> None:
    phases = [{"name": "one", "train_iters": STEPS}, {"name": "two", "train_iters": 2, "seq_length": 2 * SEQ,
                                                     "data_path": str(tmp_path / "c")}]
    phased = preset("tiny").override(**{name: getattr(run.data, name) for name in ("data_path", "split")},
                                     seq_length=SEQ, global_batch_size=BATCH, vocab_size=400, phases=phases)
    save(phased, tmp_path / "saved")
    start = plan_resumption(phased, str(tmp_path / "saved"))
    assert not start.notes and start.start_of(start.recipe.spans[1]) == BATCH * STEPS
    ahead = [phases[0], {**phases[1], "data_path": str(tmp_path / "d")}]
    assert plan_resumption(phased.override(phases=ahead), str(tmp_path / "saved")).position is not None
