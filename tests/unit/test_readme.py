"""Statements of the README and of the user's pages that the code makes, so that they stay true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.metrics.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA, RUN = ((ROOT / "docs" / "guides" / name).read_text(encoding="utf-8") for name in ("data.md", "run.md"))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("pages", [(README, README), (DATA, RUN)], ids=["readme", "guides"])
def test_the_walkthrough_s_tokenizer_is_the_model_s(pages: tuple[str, str]) -> None:
    """The tokenizer that is trained first has the ids of the preset that is trained on its tokens."""
    trained = re.search(r"dsv3 train-tokenizer .*--vocab-size (\d+)", pages[0])
    run = re.search(r"pretrain_dsv3\.sh --preset (\S+) --data-path data/corpus_text_document[^`]*?"
                    r"(--vocab-size (\d+))?", pages[1])
    assert trained and run
    assert int(trained[1]) == int(run[3] or preset(run[1]).model.vocab_size)


def test_the_error_shown_is_the_error_given() -> None:
    shown = re.search(r"^error: (expert_model_parallel_size=(\d+) .*)$", RUN, re.MULTILINE)
    assert shown
    with pytest.raises(ConfigError) as error:
        preset("dsv3-671b").override(expert_model_parallel_size=int(shown[2])).validate(2048)
    assert str(error.value) == shown[1]


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_has_their_parameters(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (\S+) \+ (\S+) \|", RUN, re.MULTILINE)
    assert row
    table = count_parameters(preset(name).model)
    for shown, count in zip(row.groups(), (table.main_total, table.mtp_total), strict=True):
        unit = {"M": 1e6, "B": 1e9}.get(shown[-1], 1)
        digits = len(shown.rstrip("MB").partition(".")[2])
        assert float(shown.rstrip("MB").replace(",", "")) == (round(count / unit, digits) if unit > 1 else count)
