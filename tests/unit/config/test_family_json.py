"""A model's config.json is a run's architecture: what is read, what is refused, and runs that begin with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.commands import sft
from dsv3_megatron.config.family_json import model_config_from_json
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.presets import HUGGING_FACE, preset
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.metrics.parameters import count_parameters
from tests.family import FAMILY
from tests.hugging_face import config_json
from tests.unit.checkpoint.hf.published import V3


def test_the_published_file():
    published = config_json(V3)
    assert published["rope_scaling"]["factor"] == 40 and published["max_position_embeddings"] == 163840
    assert model_config_from_json(published) == V3


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "llama"}, "model_type='llama'; this library reads 'deepseek_v3'"),
    ({"index_topk": 2048}, "index_topk=2048: not known to this library"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is another model"),
    ({"scoring_func": "softmax"},
     "scoring_func='softmax': in a model of type 'deepseek_v3' transformers computes sigmoid affinities"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"rope_interleave": False}, "rope_interleave=False"),
    ({"rope_interleave": None}, "rope_interleave=None is another model"),
    ({"sliding_window": 512}, "sliding_window=512: not known to this library, and transformers caches"),
    ({"layer_types": ["linear_attention"] * 61}, "layer_types=['linear_attention'"),
    ({"original_max_position_embeddings": 8192}, "original_max_position_embeddings=8192 contradicts rope_scaling"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 contradicts num_attention_heads=128"),
    ({"qk_head_dim": 128}, "qk_head_dim=128 contradicts qk_nope_head_dim + qk_rope_head_dim=192"),
    ({"num_mtp_layers": 2}, "num_nextn_predict_layers=1 and num_mtp_layers=2 contradict each other"),
    ({"hidden_size": "7168"}, "hidden_size='7168' must be a whole number"),
    ({"hidden_size": None}, "hidden_size=null; it must be a number"),
    ({"n_group": 7}, "moe_router_num_groups=7 must divide num_experts=256"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type='dynamic' is not known"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings is missing"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "type='yarn' contradicts rope_type='default'"),
    ({"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                       "attention_factor": 1.2}}, "attention_factor=1.2: not known"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "factor: without effect under rope_type='default'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
     "rope_scaling and rope_parameters contradict each other: rope_type is 'yarn' in one and 'rope' in the other"),
    ({"rope_parameters": {**config_json(V3)["rope_scaling"], "rope_theta": 50000.0}},
     "rope_parameters and rope_theta contradict each other: rotary_base is 50000.0 in one and 10000.0 in the other"),
], ids=str)
def test_refused(change, message):
    with pytest.raises(ConfigError) as error:
        model_config_from_json(config_json(V3, **change), "x/config.json")
    assert str(error.value).startswith("x/config.json: ") and message in str(error.value)


def test_missing_setting():
    content = config_json(V3)
    del content["kv_lora_rank"]
    with pytest.raises(ConfigError, match="kv_lora_rank is missing"):
        model_config_from_json(content)


# -- --from-hf -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def write(content: Any, name: str = "model") -> str:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


# As the presets' own tests count them; V3.1 has V3's weights.
PARAMETERS = {"moonlight-16b": (15_960_108_544, 0), "kimi-k2": (1_026_408_209_408, 0),
              "deepseek-v3.1": (671_026_404_352, 11_610_067_968)}


@pytest.mark.parametrize("name", FAMILY)
def test_a_published_model_is_the_architecture_of_a_run(name: str, folder: Any) -> None:
    path = folder(FAMILY[name], name)
    run = parse_command(["--from-hf", path]).run
    assert run.model == model_config_from_json(FAMILY[name])
    assert run.training == TrainingConfig()
    assert (run.preset, run.from_hf, run.name) == (HUGGING_FACE, path, name)
    table = count_parameters(run.model)
    assert (table.main_total, table.mtp_total) == PARAMETERS[name]
    run.validate(8)
    assert parse_command(["--from-hf", f"{path}/config.json"]).run.model == run.model
    assert parse_command(["--from-hf", f"{path}/config.json"]).run.name == name


def test_a_preset_beside_it_says_the_rest_and_flags_say_it_last(folder: Any) -> None:
    path = folder(FAMILY["moonlight-16b"])
    run = parse_command(["--preset", "laptop", "--from-hf", path, "--num-layers", "5", "--lr", "1e-5"]).run
    asked = preset("laptop").override(lr=1e-5)
    assert (run.training, run.parallel, run.preset) == (asked.training, asked.parallel, "laptop")
    assert run.model == run.override(num_layers=27).override(num_layers=5).model
    assert run.override(num_layers=27).model == model_config_from_json(FAMILY["moonlight-16b"])


def test_a_sequence_is_not_longer_than_the_models_context(folder: Any) -> None:
    path = folder(FAMILY["moonlight-16b"] | {"max_position_embeddings": 512})
    assert parse_command(["--from-hf", path]).run.training.seq_length == 512
    assert parse_command(["--from-hf", path, "--seq-length", "64"]).run.training.seq_length == 64
    assert parse_command(["--preset", "tiny", "--from-hf", path]).run.training.seq_length == 256
    with pytest.raises(ConfigError, match="seq_length=1024 must not exceed max_position_embeddings=512"):
        parse_command(["--from-hf", path, "--seq-length", "1024"]).run.validate(1)


def test_a_file_may_name_it_and_change_it(folder: Any, file: Any) -> None:
    path = folder(FAMILY["moonlight-16b"])
    run = parse_command(["--config", file(f'preset = "tiny"\nfrom_hf = "{path}"\n[model]\nnum_layers = 7\n')]).run
    assert (run.preset, run.from_hf, run.model.num_layers, run.model.hidden_size) == ("tiny", path, 7, 2048)
    assert run.training == preset("tiny").training
    other = folder(FAMILY["moonlight-16b"] | {"vocab_size": 1024}, "other")
    assert parse_command(["--config", file(f'from_hf = "{path}"\n'), "--from-hf", other]).run.model.vocab_size == 1024
    with pytest.raises(ConfigError, match="from_hf, in section model, is of the run; write it outside the sections"):
        parse_command(["--config", file(f'[model]\nfrom_hf = "{path}"\n')])


@pytest.mark.parametrize("flags", [[], ["--preset", "laptop"]], ids=str)
def test_the_record_of_a_run_is_the_run_again_without_the_folder(folder: Any, file: Any, flags: list[str]) -> None:
    path = folder(FAMILY["moonlight-16b"])
    run = parse_command([*flags, "--from-hf", path, "--num-layers", "5"]).run
    record = file(json_text(run.as_dict()), "config.json")
    (Path(path) / "config.json").unlink()
    assert parse_command(["--config", record]).run == run


def test_the_record_of_a_run_that_began_with_a_checkpoint_is_read(file: Any) -> None:
    """Such a run has no preset, and no folder with a config.json."""
    values = preset("tiny").override(num_layers=6).as_dict()
    run = parse_command(["--config", file(json_text(values | {"preset": HUGGING_FACE}), "run.json")]).run
    assert run.preset == HUGGING_FACE and run.as_dict() == values | {"preset": HUGGING_FACE}
    del values["model"]["num_layers"]
    with pytest.raises(ConfigError, match="preset='hugging-face' is not known"):
        parse_command(["--config", file(json_text(values | {"preset": HUGGING_FACE}), "run.json")])


def test_a_fine_tuning_takes_it_too(folder: Any) -> None:
    run = sft.parse(["--from-hf", folder(FAMILY["moonlight-16b"]), "--train-iters", "5"]).run
    assert run.model == model_config_from_json(FAMILY["moonlight-16b"])
    assert (run.training.lr, run.data.sft) == (5e-6, True)


@pytest.mark.parametrize(("content", "message"), [
    ("{", "from_hf={0}: {0}/config.json cannot be read as a model's config.json: Expecting"),
    ("[]", "from_hf={0}: {0}/config.json cannot be read as a model's config.json: it must hold a JSON object"),
    ({}, "from_hf={0}: {0}/config.json: model_type=None; this library reads 'deepseek_v3' and 'kimi_k2'"),
    (FAMILY["kimi-k2"] | {"n_group": 5}, "from_hf={0}: {0}/config.json: moe_router_num_groups=5 must divide"),
    ({name: value for name, value in FAMILY["kimi-k2"].items() if name != "kv_lora_rank"},
     "from_hf={0}: {0}/config.json: kv_lora_rank is missing"),
])
def test_a_folder_that_cannot_be_used_is_named(folder: Any, content: Any, message: str) -> None:
    path = folder(content)
    with pytest.raises(ConfigError) as error:
        parse_command(["--from-hf", path])
    assert str(error.value).startswith(message.replace("{0}", path))


def test_a_folder_that_is_not_there(tmp_path: Path, file: Any) -> None:
    with pytest.raises(ConfigError, match="^from_hf=deepseek-ai/DeepSeek-V3: deepseek-ai/DeepSeek-V3 does not exist, "
                                          "and nothing is downloaded; give a folder with the model's config.json"):
        parse_command(["--from-hf", "deepseek-ai/DeepSeek-V3"])
    with pytest.raises(ConfigError, match=f"^from_hf={tmp_path}: {tmp_path} holds no config.json; give a folder"):
        parse_command(["--from-hf", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"^from_hf=\['a'\] must be a folder with a model's config.json"):
        parse_command(["--config", file("from_hf = ['a']\n")])
