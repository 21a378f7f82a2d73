"""The pages of docs/export/, followed with each program: log-probabilities and answers are this library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.data.tokenizer import load_tokenizer
from tests.clients.environments import RUNNERS
from tests.clients.exports import (
    QUESTION,
    TEXT,
    TOLERANCE,
    make_quickstart,
    our_answer,
    our_log_probabilities,
    our_model,
    shapes_of,
)
from tests.clients.pages import Reader, page_text


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=RUNNERS[name].mark) for name in RUNNERS])
def test_a_page(tmp_path: Path, groups: Any, name: str) -> None:
    client = RUNNERS[name]
    make_quickstart(tmp_path, shapes_of(client)["tiny"])
    with Reader(client, tmp_path) as reader:
        printed = reader.follow(page_text(client))
    exported = tmp_path / "exported"
    model = our_model(exported, groups)
    ours_SV = our_log_probabilities(model, load_tokenizer(exported).encode(TEXT).ids)
    theirs_SV = torch.from_numpy(np.load(tmp_path / "logprobs.npy"))
    difference = (theirs_SV - ours_SV).abs().max().item()
    print(f"{client.reader}: {list(theirs_SV.shape)}, largest difference of a log-probability {difference:.1e}")
    assert theirs_SV.shape == ours_SV.shape and difference <= TOLERANCE
    assert our_answer(model, exported, QUESTION) in printed[-1].splitlines()
