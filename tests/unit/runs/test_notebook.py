"""A model in a notebook is the model of the commands: the trainer's steps, Transformers' logits, the command's texts.

Its process groups come and go with it, several models are there at once, and what is wrong is said with the way out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsv3_megatron as dsv3
from dsv3_megatron.commands import generate as generate_command
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from dsv3_megatron.model.global_names import whole_parameters
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.parallel.groups import destroy_groups
from dsv3_megatron.runs.notebook import Model
from dsv3_megatron.runs.trainer import Trainer
from tests.distributed.small_run import GLOBAL_BATCH, SEQ_LENGTH, small_run

ROOT = Path(__file__).resolve().parents[3]
SMALL: dict[str, Any] = {"num_layers": 2, "vocab_size": 128, "max_position_embeddings": 32, "precision": "fp32"}
ROWS = np.random.default_rng(1).integers(0, 128, size=(4, SEQ_LENGTH + 1))
STEPS = 3


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.from_preset("tiny", **SMALL) as built:
        yield built


def state(chunks: list[Any], groups: Any, num_layers: int) -> dict[str, torch.Tensor]:
    """Every weight and router bias by its global name."""
    found = {whole.name: whole.local.detach().clone() for chunk in chunks for whole in whole_parameters(chunk, groups)}
    return found | {f"bias {row}": router.expert_bias.clone() for row, router in routers(chunks, num_layers)}


def state_of(model: Model) -> dict[str, torch.Tensor]:
    built = model._alive()
    return state(list(built.stages), built.groups, model.config.num_layers)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- it is what the commands do --------------------------------------------------------------------


def test_steps_are_the_trainers_bit_for_bit(tmp_path: Path) -> None:
    """The same rows at the same learning rates, warm-up and decay included, in micro-batches of one row."""
    prefix = tmp_path / "train"
    with DatasetWriter(str(prefix), vocab_size=128) as writer:
        ids = np.random.default_rng(0).zipf(1.3, size=2000) % 128
        writer.add_documents(ids.astype(np.int64), np.full(20, 100))
    run = small_run(data_path=[str(prefix)], split="100,0,0", eval_interval=0, train_iters=STEPS, lr=3e-3,
                    lr_warmup_iters=2, moe_router_bias_update_rate=0.01)
    run.validate(1)
    trainer = Trainer(run)
    samples = [trainer.data.train[index] for index in range(STEPS * GLOBAL_BATCH)]
    reports = [trainer.train_step()[0] for _ in range(STEPS)]
    expected = state(list(trainer.chunks), trainer.groups, run.model.num_layers)
    destroy_groups()

    rows = np.stack([np.append(sample["tokens"].numpy(), sample["labels"][-1].item()) for sample in samples])
    with Model(run) as model:
        initial = state_of(model)
        for step, report in enumerate(reports):
            result = model.train_step(rows[step * GLOBAL_BATCH: (step + 1) * GLOBAL_BATCH],
                                      learning_rate=report.learning_rate)
            assert (result.loss, result.mtp_losses, result.balance_loss, result.grad_norm) == (
                report.lm_loss, report.mtp_losses, report.balance_loss, report.grad_norm)
            assert result.iteration == step + 1 and result.is_applied
        assert equal(state_of(model), expected) and not equal(initial, expected)
        assert any(value.count_nonzero() for name, value in expected.items() if name.startswith("bias"))


def test_logits_and_losses_are_transformers(model: Model, tmp_path: Path) -> None:
    """Of an exported model that has learned, so that its router biases are not zero."""
    transformers = pytest.importorskip("transformers")
    for _ in range(STEPS):
        model.train_step(ROWS)
    model.export(tmp_path / "exported")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ROWS), labels=torch.tensor(ROWS))
    logits = model.logits(ROWS)
    assert logits.dtype == torch.float32 and logits.shape == (4, SEQ_LENGTH + 1, 128) and not logits.requires_grad
    assert (logits - expected.logits).abs().max() < 1e-5
    assert model.loss(ROWS) == pytest.approx(expected.loss.item(), abs=1e-5)
    assert model.evaluate(ROWS).tokens == 4 * SEQ_LENGTH
    with Model.from_hugging_face(tmp_path / "exported", precision="fp32") as again:
        assert torch.equal(again.logits(ROWS), logits)


def test_texts_are_those_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(train_tokenizer(["the quick brown fox jumps over the lazy dog. "] * 3, vocab_size=300),
                   tmp_path / "tokenizer")
    with Model.from_preset("tiny", **SMALL | {"vocab_size": 300}, tokenizer=tmp_path / "tokenizer") as model:
        model.train_step(ROWS)
        model.save(tmp_path / "checkpoints")
        for options in ({}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}, {"speculative": "mtp"}):
            told = model.generate("the quick", max_new_tokens=9, **options)  # type: ignore[arg-type]
            flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
            code = generate_command.main(["--load", str(tmp_path / "checkpoints"), "--prompt", "the quick",
                                          "--max-new-tokens", "9", "--json", *flags])
            record = json.loads(capsys.readouterr().out)
            assert code == 0 and (record["text"], tuple(record["tokens"]), record["ended"]) == (
                told.text, told.token_ids, told.ended)
            assert str(told) == told.text and len(told.token_ids) == 9
        assert model.generate(model._encode("the quick"), max_new_tokens=9) == model.generate(
            "the quick", max_new_tokens=9)


def test_a_run_goes_on_from_a_saved_model(model: Model, tmp_path: Path) -> None:
    """A training run takes a model's checkpoint as its own, with the optimizer."""
    model.train_step(ROWS)
    model.save(tmp_path / "checkpoints")
    with DatasetWriter(str(tmp_path / "train"), vocab_size=128) as writer:
        writer.add_documents(ROWS.flatten(), np.array([ROWS.size]))
    run = model.run.override(data_path=[str(tmp_path / "train")], split="100,0,0", load=str(tmp_path / "checkpoints"),
                             seq_length=SEQ_LENGTH, train_iters=2, lr_decay_style="constant",
                             override_opt_param_scheduler=True, allow_data_change=True)
    trainer = Trainer(run)
    assert equal(state(list(trainer.chunks), trainer.groups, model.config.num_layers), state_of(model))
    report, _ = trainer.train_step()
    assert report.iteration == 2 and not report.skipped
    destroy_groups()


# -- its state -------------------------------------------------------------------------------------


def test_steps_saved_and_loaded_are_steps_in_one_go(model: Model, tmp_path: Path) -> None:
    """N steps = k steps, save, load, N - k steps, bit for bit; another model in between changes nothing."""
    for _ in range(2):
        model.train_step(ROWS)
    folder = model.save(tmp_path / "checkpoints")
    assert folder == tmp_path / "checkpoints/iter_0000002"
    with Model.load(tmp_path / "checkpoints", with_optimizer=True) as other:
        assert other.iteration == 2 and equal(state_of(other), state_of(model))
        third = model.train_step(ROWS)
        assert other.train_step(ROWS) == third
        assert equal(state_of(other), state_of(model))
    with Model.load(tmp_path / "checkpoints") as fresh:  # a new optimizer, the same weights and settings
        assert fresh.iteration == 0 and fresh.run.training.lr == model.run.training.lr
        first = fresh.train_step(ROWS)
        assert (first.loss, first.grad_norm) == (third.loss, third.grad_norm)
        assert not equal(state_of(fresh), state_of(model))
    model.save(tmp_path / "checkpoints")  # its own folder


def test_weights_alone_are_saved_before_the_first_step(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "weights")
    manifest = json.loads((tmp_path / "weights/iter_0000000/checkpoint.json").read_text())
    assert manifest["contents"] == "weights"
    with Model.load(tmp_path / "weights", with_optimizer=True) as other:
        assert equal(state_of(other), state_of(model)) and other.iteration == 0
        assert other.train_step(ROWS) == model.train_step(ROWS)


def test_the_seed_makes_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with Model.from_preset("tiny", **SMALL) as one:
        weights = state_of(one)
        one.train_step(ROWS)
        torch.manual_seed(6)
        with Model.from_preset("tiny", **SMALL) as two, Model.from_preset("tiny", **SMALL, seed=4) as three:
            assert equal(state_of(two), weights) and not equal(state_of(three), weights)
            result = two.train_step(ROWS)
    torch.manual_seed(5)
    with Model.from_preset("tiny", **SMALL) as four:
        assert equal(state_of(four), weights) and four.train_step(ROWS) == result
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_at_a_model_does_not_change_its_next_step(model: Model) -> None:
    with Model.from_preset("tiny", **SMALL) as other:
        for _ in range(2):
            other.logits(ROWS), other.evaluate(ROWS), other.generate([1, 2], max_new_tokens=3)
            assert other.train_step(ROWS) == model.train_step(ROWS)
        assert equal(state_of(other), state_of(model))


def test_any_number_of_rows_makes_a_step() -> None:
    """Three rows are micro-batches of one, four are two of two; the mean is that of all tokens."""
    with Model.from_preset("tiny", **SMALL, micro_batch_size=2, moe_router_bias_update_rate=0.0) as model:
        assert model.train_step(ROWS[:3], learning_rate=0.0).loss == pytest.approx(model.loss(ROWS[:3]), abs=1e-6)
        one, two = model.train_step(torch.tensor(ROWS), learning_rate=0.0), model.train_step(ROWS.tolist())
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm) and two.learning_rate == model.run.training.lr


def test_groups_go_with_the_last_model() -> None:
    one = Model.from_preset("tiny", **SMALL)
    two = Model.from_preset("tiny", **SMALL)
    one.close()
    one.close()
    assert torch.distributed.is_initialized() and "closed" in repr(one)
    assert two.loss(ROWS) > 0
    with pytest.raises(dsv3.ConfigError, match="this model is closed; make another one"):
        one.loss(ROWS)
    del two  # not closed, but gone
    assert not torch.distributed.is_initialized()


def test_a_model_that_cannot_be_made_leaves_nothing(tmp_path: Path, model: Model) -> None:
    model.save(tmp_path / "weights")
    model.close()
    with pytest.raises(dsv3.ConfigError, match="another architecture: num_layers=3"):
        Model.load(tmp_path / "weights", num_layers=3)
    assert not torch.distributed.is_initialized()


# -- where it comes from ---------------------------------------------------------------------------


def test_config_json_alone_makes_fresh_weights(model: Model, tmp_path: Path) -> None:
    model.train_step(ROWS)
    model.export(tmp_path / "exported")
    (tmp_path / "empty").mkdir()
    content = (tmp_path / "exported/config.json").read_text()
    (tmp_path / "empty/config.json").write_text(content)
    for path in (tmp_path / "empty", tmp_path / "exported/config.json"):
        with Model.from_hugging_face(path, precision="fp32") as fresh:
            assert "fresh weights of seed 1234" in repr(fresh)
            assert fresh.num_parameters == model.num_parameters and fresh.config.max_position_embeddings == 32
            assert state_of(fresh).keys() == state_of(model).keys()
            assert fresh.loss(ROWS) != model.loss(ROWS)
    with Model.from_hugging_face(tmp_path / "exported") as loaded:
        assert f"weights of {tmp_path / 'exported'}" in repr(loaded)


def test_fp8_steps_are_taken_as_in_a_run() -> None:
    with Model.from_preset("tiny", **SMALL) as plain, Model.from_preset("tiny", **SMALL, fp8="blockwise") as narrow:
        losses = [model.train_step(ROWS).loss for model in (plain, narrow)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: Model.from_preset("tny"), "preset='tny' is not known; choose one of tiny, laptop"),
    (lambda model: Model.from_preset("tiny", lrr=1), "lrr is not a field of a run; did you mean lr?"),
    (lambda model: Model.from_preset("tiny", pipeline_model_parallel_size=2), "use dsv3 train"),
    (lambda model: Model.from_preset("tiny", train_iters=2), "train_iters=2 plans a whole run"),
    (lambda model: Model.from_preset("tiny", hidden_size=-1), "hidden_size=-1 must be at least 1"),
    (lambda model: Model.from_preset("dsv3-671b"), "the weights of dsv3-671b take 1,"),
    (lambda model: Model.load("no/such/folder"), "load=no/such/folder does not exist; give a folder"),
    (lambda model: Model.from_hugging_face("no/such/folder"), "folder does not exist"),
    (lambda model: model.logits([1, 2]), r"token_ids has shape \[2\]; it must be \[batch, seq\]"),
    (lambda model: model.logits([[0.5]]), "token ids must be integers"),
    (lambda model: model.logits([[1, 128]]), r"id 128 in row 0, position 1 must lie in 0\.\.127"),
    (lambda model: model.logits([[1] * 33]), "rows of 33 tokens; they must not exceed the model's max_position_emb"),
    (lambda model: model.loss([[1], [2]]), "at least two tokens: the first predicts the second"),
    (lambda model: model.train_step([[1, 2, 3], [4]]), "rows of different lengths"),
    (lambda model: model.train_step([[1] * 34]), "max_position_embeddings=32 and the token after them; cut them"),
    (lambda model: model.train_step([[1, 2, 3]], learning_rate=-1.0), "lr=-1.0 must not be negative"),
    (lambda model: model.generate("a text"), "there is no tokenizer for a text: .* tokenizer=DIR, or give token ids"),
    (lambda model: model.generate([1, 400]), r"they must lie in 0\.\.127"),
    (lambda model: model.generate([1], max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
])
def test_errors_name_the_way_out(call: Callable[[Model], Any], message: str, model: Model) -> None:
    with pytest.raises(dsv3.ConfigError, match=message):
        call(model)
    assert model.loss(ROWS) > 0  # and it goes on


def test_rows_of_the_whole_context_can_be_learned(model: Model) -> None:
    assert model.train_step([[1] * 33]).is_applied


def test_what_is_there_is_not_written_over(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "checkpoints")
    with Model.load(tmp_path / "checkpoints") as other:
        with pytest.raises(dsv3.ConfigError, match="has checkpoints of another run or model; choose another folder"):
            other.save(tmp_path / "checkpoints")
        with pytest.raises(dsv3.ConfigError, match="is not empty; choose another output"):
            other.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(dsv3.ConfigError, match="one process, not 2; start it without torchrun, and use dsv3 train"):
        Model.from_preset("tiny", **SMALL)


# -- the package -----------------------------------------------------------------------------------


def test_the_import_is_cheap_and_help_has_the_model() -> None:
    """In a process of its own, which nothing prepared: no torch before `Model` is asked for, and no message after."""
    code = ("import sys, io, pydoc, contextlib; import dsv3_megatron as dsv3; assert 'torch' not in sys.modules; "
            "assert 'Model' in dir(dsv3); help = pydoc.render_doc(dsv3, renderer=pydoc.plaintext); "
            "assert 'train_step(self, token_ids' in help and 'from_preset' in help; "
            "model = dsv3.Model.from_preset('tiny', num_layers=2, vocab_size=64); print(model.logits([[1, 2]]).shape)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([1, 2, 64])\n", "")


def test_the_guides_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, in a folder where the quickstart has been."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(train_tokenizer(["def main(): import this"] * 3, vocab_size=300), tmp_path / "tokenizer")
    with Model.from_preset("tiny", **SMALL | {"vocab_size": 300}, tokenizer=tmp_path / "tokenizer") as model:
        model.save(tmp_path / "runs/quickstart/checkpoints")
    page = (ROOT / "docs/guides/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5 and all(block.count("\n") < 10 for block in blocks)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/guides/python.md", "exec"), names)
    assert names["result"].loss < 1.0 and "fresh weights of seed 1234" in capsys.readouterr().out
    for name in ("model", "again", "fresh"):
        names[name].close()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
        dsv3.Modell  # noqa: B018
