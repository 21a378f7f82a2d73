"""`dsv3 certify` finds what is planted, by its name, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.certified_faults import NOTHING, PLANTED
from tests.distributed.launch import run_command

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the certificates of all planted faults say, from one command."""
    file = tmp_path_factory.mktemp("verdicts") / "verdicts.json"
    done = run_command("tests.distributed.certified_faults", file, timeout_s=280)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(file).read_text())


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(verdicts, name):
    verdict = verdicts[name]
    assert not verdict["error"]
    assert any(re.search(PLANTED[name].named, text) for text in verdict["differences"]), verdict["differences"][:5]
    # One process is held to the definition whatever the layout does.
    gradients = [text for text in verdict["differences"] if text.startswith("gradient of")]
    assert {"against the definition" in text for text in gradients} <= {PLANTED[name].is_in_both}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_found_where_nothing_is_wrong(verdicts, name):
    assert verdicts[name] == {"differences": [], "error": ""}
