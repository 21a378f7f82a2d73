"""Machines as data: every number has a source, published kernels come out as published, files are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.planning.machine.hardware import load_hardware, save_hardware
from dsv3_megatron.planning.machine.hardware_tables import find_hardware


def test_unseen_products_lie_between_the_nearest() -> None:
    h800 = find_hardware("h800")
    ratios = [point.ratio for point in h800.products if point.purpose == "fprop"]
    assert min(ratios) <= h800.ratio("fp8", "dgrad", 1, 4096, 5000, 5000) <= max(ratios)
    whole = h800.product_seconds("fp8", "fprop", groups=1, rows=4096, columns=5000, inner=5000)
    part = h800.product_seconds("fp8", "fprop", groups=1, rows=4096, columns=5000, inner=5000, sm_share=112 / 132)
    assert whole < part < whole * 132 / 112


def test_attention_rates_are_interpolated_between_published_lengths() -> None:
    h800 = find_hardware("h800")
    rates = [1e15 / h800.attention_seconds(1e15, is_backward=False, seq_length=length)
             for length in (64, 512, 3000, 4096, 16384, 131072)]
    assert rates == sorted(rates)
    assert rates[3] == pytest.approx(579e12) and rates[5] == pytest.approx(616e12)


def test_more_of_a_resource() -> None:
    h800 = find_hardware("h800")
    assert h800.scaled("fp8_flops", 1.1)["fp8_flops"] == pytest.approx(1.1 * 1979e12)
    assert h800.scaled("stream_busy_share", 1.1)["stream_busy_share"] == 1.0
    assert h800.scaled("movement:copy", 2).movement["copy"].value == 2 * h800.movement["copy"].value
    with pytest.raises(ValueError, match="h800 has no resource warp drive; it has bf16_flops"):
        h800.scaled("warp drive", 2)


def test_wrong_machines() -> None:
    with pytest.raises(ConfigError, match=r"hardware='h900' is not known; choose one of h800, h800-today, h100, h200, "
                                          "b200, gb200, gb300, a100"):
        find_hardware("h900")
    with pytest.raises(ConfigError, match="hardware=a100 has no fp8 products; it has bf16: leave fp8 at none"):
        find_hardware("a100").peak("fp8")
    with pytest.raises(ConfigError, match=r"hardware=nowhere.json: no such file; --save-hardware writes one"):
        find_hardware("nowhere.json")


def test_a_machine_is_read_back_from_its_file(tmp_path) -> None:
    h800, path = find_hardware("h800"), str(tmp_path / "machine.json")
    save_hardware(h800, path)
    assert load_hardware(path).as_dict() == h800.as_dict()
    (tmp_path / "wrong.json").write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match=r"wrong.json does not describe a machine \(KeyError: 'figures'\)"):
        load_hardware(str(tmp_path / "wrong.json"))


def test_a_figure_that_a_file_lacks_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    save_hardware(find_hardware("h800"), str(file))
    content = json.loads(file.read_text())
    content["figures"]["unknown"] = content["figures"].pop("bf16_best_share")
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="the machine has no figure 'bf16_best_share'; its file must be what"):
        load_hardware(str(file)).product_seconds("bf16", "fprop", groups=1, rows=4096, columns=4096, inner=4096)
