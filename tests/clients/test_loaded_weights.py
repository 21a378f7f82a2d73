"""vLLM's and SGLang's loaders on exports: each parameter that they leave is the export's, MTP modules too.

The loaders run whole, with their checks of names, shapes and FP8 blocks, and what they leave is compared bit for bit.
For SGLang, which cannot compute here, rows of `readers.py` are held against it that can be seen while it loads. vLLM
drafts with the MTP module, and the drafts are those of the library's reference.

Legend: S positions, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv3_megatron.certification.reference import linear, main_model, mtp_module
from dsv3_megatron.certification.reference_weights import Architecture
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.readers import DIFFERS, REFUSES
from dsv3_megatron.data.tokenizer import load_tokenizer
from tests.clients.environments import CLIENTS, ROOT
from tests.clients.exports import FP8, QUESTION, SHAPES, Shape, export
from tests.clients.loaded_weights import (
    SGLANG_NAMES,
    VLLM_NAMES,
    Names,
    differences,
    merged,
    of_the_draft,
    of_the_model,
    values,
)
from tests.clients.pages import Reader
from tests.hugging_face import dequantized

LATENTS = CLIENTS["vllm"].needs
CASES = {
    # All have MTP modules.
    "bf16": Shape({**SHAPES["tiny"].changes, **LATENTS}, dtype="bf16"),
    "fp8": Shape({**FP8, **LATENTS, "mtp_num_layers": 1}, dtype="fp8"),
    "full-rank-query": Shape({**LATENTS, "q_lora_rank": None}, dtype="bf16"),
    "two-mtp": Shape({**LATENTS, "mtp_num_layers": 2}, dtype="bf16"),
    # What is refused, or merged with scales that are not those of the rows.
    "no-shared": Shape({**LATENTS, "num_shared_experts": 0}, dtype="bf16"),
    **{name: Shape({**SHAPES[name].changes, **LATENTS, "mtp_num_layers": 1}, dtype="fp8") for name in (
        "fp8-narrow-experts", "fp8-uneven-blocks", "fp8-moved-ffn", "fp8-moved-query", "fp8-fewer-queries")},
}


@dataclass(frozen=True)
class Server:
    """A server whose loader is run.

    Attributes:
        names: How it names what it merges.
        cases: What it is given.
        shared_with_the_draft: Parameters that its draft takes from the model after it has been loaded.
    """

    names: Names
    cases: tuple[str, ...]
    shared_with_the_draft: tuple[str, ...] = ()


SERVERS = {
    # It ends itself where there are no shared experts, and what it refuses is in test_readers_table.py.
    "vllm": Server(VLLM_NAMES, ("bf16", "fp8", "full-rank-query", "two-mtp", "fp8-moved-ffn", "fp8-moved-query")),
    "sglang": Server(SGLANG_NAMES, tuple(CASES), ("model.embed_tokens.weight", "lm_head.weight")),
}
NUM_TOKENS = 24
# Scales of a cache of keys and values in FP8, which an export has not.
CACHE_SCALES = ("k_scale", "v_scale")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exports of the cases."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, folder in folders.items():
        export(folder, CASES[name])
    return {name: folder / "exported" for name, folder in folders.items()}


def loaded_by(name: str, exports: dict[str, Path], folder: Path) -> dict[str, Path]:
    """For each export the folder of what a client's loader left, by `NAME_loads.py`."""
    outs = {case: folder / case for case in exports}
    for out in outs.values():
        out.mkdir()
    ids = load_tokenizer(exports["bf16"]).encode(QUESTION).ids
    (folder / "request.json").write_text(json.dumps({"ids": ids, "num_tokens": NUM_TOKENS, "models": {
        case: {"export": str(path), "out": str(outs[case])} for case, path in exports.items()}}))
    client = CLIENTS[name]
    with Reader(client, folder) as reader:
        environment = reader.environment
    done = subprocess.run([str(client.programs / "python"), str(ROOT / f"tests/clients/{name}_loads.py"),
                           "request.json"], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return outs


@pytest.fixture(scope="module")
def loaded(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of what a client's loader left of a case; each loads all its cases once."""
    @functools.cache
    def of_all(name: str) -> dict[str, Path]:
        cases = {case: path for case, path in exports.items() if case in SERVERS[name].cases}
        return loaded_by(name, cases, tmp_path_factory.mktemp(name))

    return lambda name, case: of_all(name)[case]


def read(export: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of an export, and its layers without MTP modules."""
    return load_file(export / "model.safetensors"), HuggingFaceDirectory(export).model.num_layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "case"), [pytest.param(name, case, marks=CLIENTS[name].mark)
                                            for name, server in SERVERS.items() for case in server.cases])
def test_every_tensor_is_loaded_or_the_export_refused(exports: dict[str, Path], loaded: Any, name: str, case: str
                                                      ) -> None:
    """What `readers.py` says, as far as loading shows it: refused, or rows with another row's scale."""
    (weights, num_layers), out, server = read(exports[case]), loaded(name, case), SERVERS[name]
    effects = CASES[case].effects(CLIENTS[name].reader, HuggingFaceDirectory(exports[case]).model)
    is_refused, differs = False, False
    for kind, expected, own in (("model", of_the_model, CACHE_SCALES),
                                ("draft", of_the_draft, (*CACHE_SCALES, *server.shared_with_the_draft))):
        file, refused = out / f"{kind}.safetensors", out / f"refused-{kind}.txt"
        if file.exists():
            found = load_file(file)
            assert differences(found, expected(weights, num_layers, server.names), own) == []
            plain = expected(dequantized(weights, torch.float32), num_layers, server.names)
            differs |= bool(differences(values(found), plain, own))
        elif kind == "model" or CASES[case].model.mtp_num_layers:
            said = refused.read_text().splitlines()[-1]
            print(f"{name}: {case}: {kind}: {said}")
            assert re.search(r"divisible by|Only 1 nextn|loaded_weight.shape|KeyError: .+shared_experts", said), said
            is_refused = True
    assert (is_refused, differs) == (REFUSES in effects, DIFFERS in effects)


def test_what_is_lost_or_moved_is_found() -> None:
    """Planted: a tensor that is not there, one too many, other values, another shape, a scale that is another row's."""
    gate, up = torch.rand(192, 128).to(torch.float8_e4m3fn), torch.rand(192, 128).to(torch.float8_e4m3fn)
    weights = {"a.mlp.gate_proj.weight": gate, "a.mlp.up_proj.weight": up,
               "a.mlp.gate_proj.weight_scale_inv": torch.tensor([[1.0], [2.0]]),
               "a.mlp.up_proj.weight_scale_inv": torch.tensor([[3.0], [4.0]])}
    expected = merged(weights, VLLM_NAMES)
    assert set(expected) == {"a.mlp.gate_up_proj.weight", "a.mlp.gate_up_proj.weight_scale_inv"}
    assert differences(expected, expected) == []
    assert differences({"a": gate}, {"b": gate}) == ["a: not of the export", "b: not loaded"]
    assert differences({"a": gate, "x.k_scale": gate}, {"a": up}, CACHE_SCALES) == ["a: other values"]
    assert differences({"a": gate[:3]}, {"a": gate}) == ["a: [3, 128], not [192, 128]"]
    # 384 rows: of their three blocks the second begins in the gate's rows and ends in the up projection's.
    three = {**expected, "a.mlp.gate_up_proj.weight_scale_inv": torch.tensor([[1.0], [2.0], [4.0]])}
    assert differences(values(three), merged(dequantized(weights, torch.float32), VLLM_NAMES)) == [
        "a.mlp.gate_up_proj.weight: other values"]


def reference_drafts(export: Path, ids: list[int]) -> torch.Tensor:
    """What the reference's MTP module predicts behind each position but the last, as vLLM runs it, [S - 1, V].

    vLLM gives it no embedding in position 0; training does, so a table with a row of zeros stands for it.
    """
    arch = Architecture.of(HuggingFaceDirectory(export).model)
    weights = {name: value.float() for name, value in
               dequantized(load_file(export / "model.safetensors"), torch.float32).items()}
    embedding = weights["model.embed_tokens.weight"]
    tokens_BS = torch.tensor([ids])
    h_BSH, _, _ = main_model(weights, arch, tokens_BS[:, :-1])
    weights["model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros_like(embedding[:1])])
    shifted_BS = tokens_BS[:, 1:].clone()
    shifted_BS[:, 0] = len(embedding)
    h_BSH, _ = mtp_module(weights, arch, 1, h_BSH, shifted_BS)
    return linear(h_BSH, weights["lm_head.weight"])[0].log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16", "full-rank-query"])
@CLIENTS["vllm"].mark
def test_vllm_drafts_what_the_mtp_module_predicts(exports: dict[str, Path], loaded: Any, case: str) -> None:
    """Most drafts are the reference's likeliest token of 288: vLLM computes in bf16, where near ones change places."""
    told = json.loads((loaded("vllm", case) / "drafts.json").read_text())
    text = load_tokenizer(exports["bf16"]).encode(QUESTION).ids + told["answer"]
    expected_SV = reference_drafts(exports[case], text)
    num_equal = 0
    for step in told["drafts"]:
        position = step["position"][step["sampled"][0]]
        assert step["next"] == [text[position + 1]]
        num_equal += expected_SV[position].argmax().item() == step["draft"][0][0]
    print(f"vLLM: {case}: {num_equal} of {len(told['drafts'])} drafts")
    assert len(told["drafts"]) >= NUM_TOKENS // 2 and num_equal >= 0.75 * len(told["drafts"])
