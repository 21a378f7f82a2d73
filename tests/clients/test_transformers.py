"""docs/export/transformers.md, followed with Transformers 5 and 4: log-probabilities and answers are this library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.clients.environments import CLIENTS, Client
from tests.clients.exports import QUESTION, TOLERANCE, make_quickstart, our_answer, our_log_probabilities, small_model
from tests.clients.pages import Reader, page_text

CLIENT_PARAMETERS = [pytest.param(CLIENTS[name], id=name, marks=CLIENTS[name].mark)
                     for name in ("transformers_5", "transformers_4")]


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENT_PARAMETERS)
def test_the_page(tmp_path: Path, groups: Any, client: Client) -> None:
    make_quickstart(tmp_path, small_model())
    with Reader(client, tmp_path) as reader:
        printed = reader.follow(page_text(client))
    ids = np.load(tmp_path / "ids.npy")[0].tolist()
    ours_SV = our_log_probabilities(tmp_path / "exported", ids, groups)
    difference = (torch.from_numpy(np.load(tmp_path / "logprobs.npy")) - ours_SV).abs().max().item()
    print(f"{client.reader}: largest difference of a log-probability {difference:.1e}")
    assert difference <= TOLERANCE
    assert printed[-1].splitlines()[-1] == our_answer(tmp_path / "exported", QUESTION, groups)
