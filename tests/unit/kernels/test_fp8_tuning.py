"""The table of tile sizes."""

import pytest


def test_tuning_table(tmp_path, monkeypatch):
    from dsv3_megatron.kernels import fp8_tuning

    monkeypatch.setenv("DSV3_FP8_TUNING", str(tmp_path / "tuning.json"))
    key = fp8_tuning.shape_key(4096, 7168, 2048, 1)
    assert key == fp8_tuning.shape_key(2049, 7168, 2048, 1) != fp8_tuning.shape_key(4097, 7168, 2048, 1)
    tuned = fp8_tuning.Tuned("deep_gemm", fp8_tuning.GemmConfig(64, 128, 4, 4))
    fp8_tuning.write_tuning({key: tuned}, "a GPU")
    fp8_tuning.write_tuning({"other": tuned}, "another GPU")
    assert fp8_tuning.read_tuning("a GPU") == {key: tuned} and fp8_tuning.read_tuning("none") == {}
    (tmp_path / "tuning.json").write_text('{"a GPU": {"x": {"implementation": "cublas", "config": {}}}}')
    with pytest.raises(ValueError, match="is not a table of measured FP8 configurations: implementations must be of"):
        fp8_tuning.read_tuning("a GPU")
    for config in fp8_tuning.CANDIDATES:
        assert config.stages * (config.block_m + config.block_n) * 128 <= 220_000
