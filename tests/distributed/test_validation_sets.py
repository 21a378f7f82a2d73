"""Several validation sets: each is what it would be alone, under every layout, and has its own tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.commands import train
from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import written_tags

pytestmark = pytest.mark.distributed

VOCAB = 128
RUN = (
    "--num-layers 4 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 --num-experts 8 "
    "--moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    f"--vocab-size {VOCAB} --seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 2 "
    "--lr-warmup-iters 0 --precision fp32 --eval-interval 1 --eval-iters 2 --ema-decay 0.5 --eval-ema").split()
# fp32 sums in another order, over two steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three datasets, each of other ids than the others."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("train", "code", "web")):
        with DatasetWriter(str(folder / name), vocab_size=VOCAB) as writer:
            ids = np.random.default_rng(number).integers(number * 30, VOCAB, size=2000)
            writer.add_documents(ids.astype(np.int64), np.full(50, 40))
    return {name: str(folder / name) for name in ("train", "code", "web")}


def run(folder: Path, prefixes: dict[str, str], valid: list[str], ranks: int = 1, *flags: str) -> list[dict[str, Any]]:
    """The records of a run of two steps."""
    run_ranks(ranks, "dsv3_megatron", "train", *RUN, "--data-path", prefixes["train"], "--valid-data-path", *valid,
              "--tensorboard-dir", str(folder), *flags)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == "validation"]


def test_each_set_is_validated_by_itself_under_every_layout(tmp_path: Path, prefixes: dict[str, str]) -> None:
    mixed = ["0.7", prefixes["web"], "0.3", prefixes["code"]]
    named = [f"code={prefixes['code']}", f"mixed={mixed[0]}", *mixed[1:], f"web={prefixes['web']}"]
    together = run(tmp_path / "together", prefixes, named)
    assert [record["iteration"] for record in validations(together)] == [1, 2]
    for name, blend in (("code", [prefixes["code"]]), ("mixed", mixed)):
        alone = run(tmp_path / name, prefixes, blend)
        steps = [[record["lm_loss"] for record in records if record["kind"] == "step"] for records in (alone, together)]
        assert steps[0] == steps[1], "validation changes no step"
        for own, several in zip(validations(alone), validations(together), strict=True):
            assert "sets" not in own
            assert several["sets"][name] == {key: own[key] for key in ("lm_loss", "mtp_losses")}
            if name == "code":  # the first
                assert {key: several[key] for key in own} == own
    losses = {name: found["lm_loss"] for name, found in validations(together)[1]["sets"].items()}
    assert list(losses) == ["code", "mixed", "web"] and len(set(losses.values())) == 3
    of_sets = {name for kind, name in written_tags(tmp_path / "together") if "validation" in name and "/" in name}
    assert of_sets == {f"{tag}/{name}" for name in losses for tag in (
        "lm loss validation", "lm loss validation ppl", "mtp_1 loss validation", "lm loss validation average")}
    for ranks, flags in ((4, ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]),
                         (2, ["--context-parallel-size", "2"])):
        found = validations(run(tmp_path / f"{ranks} ranks", prefixes, named, ranks, *flags))
        for one, other in zip(validations(together), found, strict=True):
            for name, expected in one["sets"].items():
                assert other["sets"][name]["lm_loss"] == pytest.approx(expected["lm_loss"], rel=TOLERANCE)
                assert other["sets"][name]["mtp_losses"] == pytest.approx(expected["mtp_losses"], rel=TOLERANCE)


def test_the_check_names_each_set(prefixes: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [*RUN, "--data-path", prefixes["train"], "--check-only", "--valid-data-path", f"code={prefixes['code']}"]
    assert train.main([*given, f"web={prefixes['web']}"]) == 0
    said = capsys.readouterr().out
    assert f"validation code: {prefixes['code']}" in said and f"validation web: {prefixes['web']}" in said
    assert train.main([*given, f"code={prefixes['web']}"]) == 2
    assert "gives the name code twice; give each validation set its own" in capsys.readouterr().err
