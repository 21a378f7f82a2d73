"""A generation before anything is allocated: what is planned and refused; and how texts and numbers are printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.commands import generate as command
from dsv3_megatron.commands.generate import CheckedRequest, GenerationRequest, Printer, check_request, summary
from dsv3_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from dsv3_megatron.generation.generator import GenerationStatistics, NewTokens, Options
from dsv3_megatron.generation.text import TextCodec
from tests.unit.generation.test_text import TEXTS, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `tokenizer`, and checkpoints of `tiny` without tensors: `run`, and `no-mtp`."""
    path = tmp_path_factory.mktemp("generate")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=300), path / "tokenizer")
    write_run(path / "run", tokenizer_model=str(path / "tokenizer"))
    write_run(path / "no-mtp", tokenizer_model=str(path / "tokenizer"), mtp_num_layers=0)
    (path / "prompts.jsonl").write_text('{"prompt": "the"}\n{"prompt": "quick brown"}\n')
    (path / "empty.jsonl").write_text('{"prompt": "the"}\n{"prompt": ""}\n')
    return path


def plan(folder: Path, world_size: int = 1, **request: Any) -> CheckedRequest:
    if "prompts" in request:
        request["prompts"] = str(folder / request["prompts"])
    return check_request(GenerationRequest(load=str(folder / request.pop("load", "run")), **request), world_size)


def test_a_prompt_as_the_run_was_trained(folder: Path) -> None:
    found = plan(folder, prompt="the fox", speculative="mtp", temperature=0.5, seed=3)
    assert found.run.training.precision == "fp32" and found.run.training.transformer_impl == "local"
    assert found.options.max_length == 256 and found.options.stop_ids == (1,)
    assert found.ids == (tuple(TextCodec(folder / "tokenizer").encode("the fox")),)
    assert (found.options.sampling.temperature, found.options.sampling.seed) == (0.5, 3)


def test_prompts_of_a_file(folder: Path) -> None:
    found = plan(folder, prompts="prompts.jsonl", batch_size=2, kv_cache="full")
    assert found.texts == ("the", "quick brown") and found.options.batch_size == 2


@pytest.mark.parametrize("request_, message", [
    ({}, "either --prompt TEXT or --prompts FILE.jsonl"),
    ({"prompt": "a", "prompts": "prompts.jsonl"}, "either --prompt TEXT or --prompts FILE.jsonl"),
    ({"prompt": "a\udc80"}, "--prompt: character 1 of the prompt is the byte 0x80, which is no UTF-8"),
    ({"prompt": ""}, "the prompt is empty; a model goes on from at least one token"),
    ({"prompts": "empty.jsonl"}, "prompt 2 of "),
    ({"prompt": "x" * 256}, "the prompt has 256 tokens, and the model's context is max_position_embeddings=256"),
    ({"prompt": "a", "load": "no-mtp", "speculative": "mtp"},
     "speculative=mtp needs a checkpoint with an MTP module, and this one has none (mtp_num_layers=0)"),
    ({"prompt": "a", "speculative": "eagle"}, "speculative='eagle' must be one of mtp"),
    ({"prompt": "a", "kv_cache": "half"}, "kv_cache='half' must be one of latent, full, training"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"prompt": "a", "batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"prompt": "a", "top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
    ({"prompt": "a", "load": "nothing"}, "nothing does not exist; give a folder of checkpoints"),
    ({"prompt": "a", "tokenizer_model": "nothing"}, "tokenizer_model=nothing: nothing does not exist"),
])
def test_what_is_refused(folder: Path, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(folder, **request_)
    assert message in str(error.value)


def test_several_processes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="generation runs in one process, not 4; start it without torchrun"):
        plan(folder, 4, prompt="a")


class TestCommand:
    def test_flags_become_a_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[GenerationRequest] = []
        monkeypatch.setattr(command, "carry_out", lambda request: seen.append(request) or 0)
        assert command.main(
            "--load c --prompt p --max-new-tokens 5 --temperature 0.5 --top-p 0.9 --seed 3 --speculative mtp "
            "--kv-cache full --batch-size 2 --tokenizer-model t --precision bf16 --json".split()) == 0
        assert seen == [GenerationRequest("c", "p", None, 5, 0.5, 0.9, 3, "mtp", "full", 2, "t", "bf16", True)]

    @pytest.mark.parametrize("arguments, message", [
        (["--prompt", "a"], "the following arguments are required: --load"),
        (["--load", "c", "--prompt", "a", "--top-p", "x"], "invalid float value: 'x'"),
    ])
    def test_one_line_says_what_is_wrong(self, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


class TestPrinter:
    def printed(self, folder: Path, prompts: list[str], events: list[tuple[int, str, str | None]], *,
                as_json: bool = False) -> list[str]:
        """What is there after each event."""
        codec, out = TextCodec(folder / "tokenizer"), io.StringIO()
        printer = Printer(codec, prompts, [codec.encode(prompt) for prompt in prompts], out, as_json=as_json)
        seen = [out.getvalue()]
        for prompt, text, ended in events:
            printer.add(NewTokens(prompt, tuple(codec.encode(text) if text else ()), ended))
            seen.append(out.getvalue())
        return seen

    def test_one_text_grows(self, folder: Path) -> None:
        assert self.printed(folder, ["the"], [(0, " fox", None), (0, " jumps", None), (0, "", "end-of-text")]) == [
            "the", "the fox", "the fox jumps", "the fox jumps\n"]

    def test_texts_wait_for_their_turn(self, folder: Path) -> None:
        assert self.printed(folder, ["a", "b", "c"], [
            (1, " x", None), (2, " y", "context"), (0, " z", None), (1, " x", "context"), (0, "", "end-of-text")]) == [
            "[1/3] a", "[1/3] a", "[1/3] a", "[1/3] a z", "[1/3] a z",
            "[1/3] a z\n[2/3] b x x\n[3/3] c y\n"]

    def test_json(self, folder: Path) -> None:
        *_, text = self.printed(folder, ["a", "b"], [(1, " 🦊", "context"), (0, " z", "max-new-tokens")], as_json=True)
        first, second = map(json.loads, text.splitlines())
        codec = TextCodec(folder / "tokenizer")
        assert first == {"prompt": "a", "text": " z", "tokens": codec.encode(" z"), "ended": "max-new-tokens"}
        assert second["text"] == " 🦊" and second["ended"] == "context"


def test_summary() -> None:
    statistics = GenerationStatistics(num_prompt_tokens=12, num_first_tokens=2, num_decoded_tokens=30, prefill_s=0.5,
                                      decode_s=2.0, num_steps=20, num_drafts=20, num_accepted=10,
                                      cache_bytes_per_token=70272)
    assert summary(statistics, Options(8, 16)).splitlines() == [
        "prompts: 12 tokens in 0.50 s", "new: 32 tokens; after each first one 15.0 tokens/s (30 in 2.00 s, 20 steps)",
        "cache: latent, 70,272 bytes a token", "speculative: 10 of 20 drafts accepted (50.0%)"]
    assert "speculative" not in summary(GenerationStatistics(), Options(8, 16))
