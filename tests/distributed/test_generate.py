"""The command on whole checkpoints: of a run under PP2 x EP2, of its conversion, against Transformers' `generate`.

The run's MTP module is in the stage before that of the head and the loss.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.data.folder_checksums import CHECKSUMS
from dsv3_megatron.data.tokenizer import load_tokenizer
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.trained_text import train_on_words
from tests.signing import sign

pytestmark = pytest.mark.distributed

NEW_TOKENS = 12
PROMPTS = ["the quick", "fox", "seven wizards quietly vex", "dog while"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, `hf` converted from it, `prompts.jsonl`."""
    folder = train_on_words(tmp_path_factory.mktemp("generate"))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def generate(*arguments: Any) -> str:
    (printed,) = run_ranks(1, "dsv3_megatron", "generate", "--max-new-tokens", NEW_TOKENS, *arguments)
    return printed


def tokens_of(printed: str) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in printed.splitlines()]


def test_a_run_and_its_conversion_generate_what_transformers_does(trained: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    tokenizer = load_tokenizer(trained / "tokenizer")
    model = DeepseekV3ForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                                 eos_token_id=1, pad_token_id=2)[0, ids.shape[1]:].tolist()
        expected.append([token for token in new if token not in (1, 2)])
    prompts = ("--prompts", trained / "prompts.jsonl", "--json")
    assert tokens_of(generate("--load", trained / "run", "--batch-size", 4, *prompts)) == expected
    assert tokens_of(generate("--load", trained / "hf", "--batch-size", 3, "--kv-cache", "full", "--speculative", "mtp",
                              "--precision", "fp32", *prompts)) == expected


def test_a_text_is_printed_after_its_prompt(trained: Path) -> None:
    text = generate("--load", trained / "run", "--prompt", PROMPTS[0], "--temperature", 0.9, "--speculative", "mtp")
    assert text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0]) + 5


def test_checkpoint_and_export_have_the_tokenizer(trained: Path, tmp_path: Path) -> None:
    """They generate the same where the folder that the run took it from is not."""
    for name in ("run", "hf"):
        shutil.copytree(trained / name, tmp_path / name)
    sign(tmp_path / "run" / "iter_0000004", lambda content: content["run"]["data"].update(tokenizer_model="/gone"))
    prompts = ("--prompts", trained / "prompts.jsonl", "--json", "--precision", "fp32")
    texts = {name: generate("--load", tmp_path / name, *prompts) for name in ("run", "hf")}
    assert texts["run"] == texts["hf"] and len(texts["run"].splitlines()) == len(PROMPTS)


@pytest.mark.parametrize("command", [("dsv3_megatron", "generate", "--prompt", "fox", "--temperature", 0.7),
                                     ("dsv3_megatron", "generate", "--prompt", "fox", "--speculative", "mtp"),
                                     ("dsv3_megatron", "evaluate", "--json", "--data-path")])
def test_weights_that_are_not_finite_are_named(command: tuple[Any, ...], trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "hf", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "hf" / CHECKSUMS).unlink()  # the export was made so; what its checksums find is tested elsewhere
    data = (trained / "train",) if command[1] == "evaluate" else ()
    with pytest.raises(RankError, match=r"(?s)exit code 2.*the weights are not finite: process 0: "
                                        r"decoder\.layers\.1\.self_attention\.linear_proj\.weight \(1 of "):
        run_ranks(1, *command[:2], "--load", tmp_path / "hf", *command[2:], *data)
