"""Lines of metrics.jsonl: written, read back, cut off."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.metrics.run_records import RunRecords, read_records, to_line, truncate_records


def test_diverged_values_are_strict_json() -> None:
    line = to_line({"kind": "step", "iteration": 1, "lm_loss": math.nan, "mtp_losses": (1.0, math.inf)})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "step", "iteration": 1, "lm_loss": None, "mtp_losses": [1.0, None],
        "nonfinite": ["lm_loss", "mtp_losses.1"]}


def test_reading_names_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"kind":"step","iteration":1,"lm_loss":2.0}\n'
    path.write_text(good + "not json\n" + good)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2 \(byte {len(good)}\) is not a metrics record"):
        read_records(path)
    path.write_text('{"kind":"step"}\n')
    with pytest.raises(ValueError, match=r":1 \(byte 0\) is not a metrics record: 'iteration'"):
        read_records(path)
    for iteration in ("1e3", '"1"', "null", "[]"):  # a run that goes on compares it with its own
        path.write_text(f'{{"kind":"step","iteration":{iteration}}}\n')
        for act in (read_records, lambda file: truncate_records(file, 1)):
            with pytest.raises(ConfigError, match=r":1 \(byte 0\) is not a metrics record: its iteration is no "):
                act(path)
    path.write_text(good + '{"kind":')
    assert len(read_records(path).steps) == 1


def test_truncating_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_records(path, 3) == (RunRecords([], []), 0)
    path.write_text("".join(f'{{"kind":"step","iteration":{i}}}\n' for i in range(1, 6)) + '{"ki')
    kept, num_dropped = truncate_records(path, 3)
    assert ([r["iteration"] for r in kept.steps], num_dropped) == ([1, 2, 3], 3)
    assert path.read_text().count("\n") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
