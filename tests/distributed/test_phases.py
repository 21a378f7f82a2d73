"""Runs with phases: resumed in the middle of every ramp and at every boundary bit for bit; context that grows.

One process takes all steps and saves before each, then starts again from each save; so that modules and groups are new
while Python and Megatron-Core are imported once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dsv3_megatron.checkpoint.folder import read_manifest
from dsv3_megatron.config.launches import EXIT_NEXT_LAYOUT
from dsv3_megatron.config.phases import read_phases
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import small_run

pytestmark = pytest.mark.distributed

VOCAB, SEQ_LENGTH = 128, 16
# Warm-up and batch ramp, constant, cosine with another lambda, gamma 0, then YaRN to twice the length: 14 steps.
PHASES: list[dict[str, Any]] = [
    {"name": "ramp", "train_tokens": 16 * (4 + 4 + 4 + 6 + 6), "lr_warmup_iters": 3, "global_batch_size": 8,
     "global_batch_size_increment": 2},
    {"name": "decay", "train_iters": 3, "lr": 1e-4, "lr_decay_style": "cosine", "mtp_loss_scaling_factor": 0.1},
    {"name": "low", "train_iters": 2, "moe_router_bias_update_rate": 0.0},
    {"name": "long", "train_iters": 4, "seq_length": 32, "global_batch_size": 4, "lr": 5e-5, "rope_type": "yarn",
     "rotary_scaling_factor": 2.0, "original_max_position_embeddings": SEQ_LENGTH,
     "moe_router_bias_update_rate": 0.02},
]
# The ramp's first steps have fewer micro-batches than fill DualPipeV, its last ones as many.
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev", "micro_batch_size": 2})]


def phased_run(prefix: str, **changes: Any) -> RunConfig:
    return small_run(data_path=[prefix], split="90,10,0", lr=3e-3, phases=PHASES, eval_iters=1,
                     moe_router_bias_update_rate=0.01, keep_last=0, **changes)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset whose next token follows from the one before it, most of the time."""
    path = tmp_path_factory.mktemp("data") / "train"
    generator = np.random.default_rng(0)
    with DatasetWriter(str(path), vocab_size=VOCAB) as writer:
        lengths = generator.integers(20, 60, size=80)
        ids = generator.zipf(1.3, size=int(lengths.sum())) % VOCAB
        writer.add_documents(ids.astype(np.int64), lengths)
    return str(path)


def take_steps(run: RunConfig, folder: Path, starts: list[int]) -> dict[str, Any]:
    """The whole run, then the rest of it from each of `starts`; what each step reported, and the states at the ends."""
    from megatron.core import parallel_state

    found: dict[str, Any] = {"resumed": {}}
    found["whole"], found["valid"] = _train(run.override(save=str(folder)), save_at=starts)
    for start in starts:
        parallel_state.destroy_model_parallel()
        if torch.distributed.get_rank() == 0:
            (folder / "latest_checkpointed_iteration.txt").write_text(str(start))
        torch.distributed.barrier()
        found["resumed"][start], _ = _train(run.override(load=str(folder)), save_at=[])
    return found


def _train(run: RunConfig, save_at: list[int]) -> tuple[dict[str, Any], dict[int, float]]:
    from dsv3_megatron.runs.trainer import Trainer

    run.validate(torch.distributed.get_world_size())
    trainer = Trainer(run)
    steps, valid = {}, {}
    while trainer.step_plan is not None:
        read = _note_batches(trainer)
        report, _ = trainer.train_step()
        report = dataclasses.replace(report, step_time_s=0, measurements=None)
        steps[report.iteration] = dataclasses.asdict(report) | {
            "tokens": read.hexdigest(), "state": _state_hash(trainer)}
        if report.iteration in save_at:
            valid[report.iteration] = trainer.evaluate().main
            trainer.save(is_needed=True)
    return steps, valid


def _note_batches(trainer: Any) -> Any:
    """A digest of all tokens that this rank reads from now on, until another is asked for."""
    digest, read = hashlib.sha256(), type(trainer)._next_batch

    def note(batches: Any) -> Any:
        batch = read(trainer, batches)
        digest.update(batch.tokens_BS.numpy().tobytes())
        return batch

    trainer._next_batch = note
    return digest


def _state_hash(trainer: Any) -> str:
    """Of this rank's weights, moments and biases."""
    digest = hashlib.sha256()
    for chunk in trainer.chunks:
        for name, value in chunk.state_dict().items():
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.numpy().tobytes())
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for state in part.optimizer.state.values():
            for name in sorted(state):
                digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS, ids=["one-process", "PP2xEP2", "DualPipeV"])
def test_resume_anywhere_is_bit_for_bit(num_ranks: int, layout: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    run = phased_run(prefix, **layout)
    recipe = run.recipe()
    steps = recipe.num_steps
    assert [phase.start.iteration for phase in recipe.phases] == [0, 5, 8, 10] and steps == 14
    # In the warm-up, the ramp and the cosine; after lambda and gamma have changed; at and after the change to YaRN.
    starts = [2, 4, 6, 8, 10, 11] if num_ranks == 1 else [4, 10]
    for rank, found in enumerate(run_ranks(num_ranks, take_steps, run, tmp_path, starts, timeout_s=280)):
        whole = found["whole"]
        assert sorted(whole) == list(range(1, steps + 1))
        for start, resumed in found["resumed"].items():
            assert sorted(resumed) == list(range(start + 1, steps + 1))
            for iteration, step in resumed.items():
                wrong = [name for name in step if step[name] != whole[iteration][name]]
                assert not wrong, (rank, start, iteration, wrong)
        if rank == 0:
            _check_values(whole)


def _check_values(whole: dict[int, Any]) -> None:
    """What the steps were taken with, as the phases say."""
    columns = {name: [whole[iteration][name] for iteration in sorted(whole)] for name in whole[1]}
    assert columns["batch_size"] == [4, 4, 4, 6, 6] + [8] * 5 + [4] * 4
    assert columns["seq_length"] == [16] * 10 + [32] * 4
    assert columns["mtp_weight"] == [0.3] * 5 + [0.1] * 9
    assert columns["bias_update_rate"] == [0.01] * 8 + [0.0] * 2 + [0.02] * 4
    assert columns["phase"] == ["ramp"] * 5 + ["decay"] * 3 + ["low"] * 2 + ["long"] * 4
    assert columns["learning_rate"][:6] == pytest.approx([1e-3, 2e-3] + [3e-3] * 4)
    assert columns["learning_rate"][6:8] == pytest.approx([1e-4 + 2.9e-3 * 0.75, 1e-4 + 2.9e-3 * 0.25])
    assert columns["learning_rate"][8:] == [1e-4] * 2 + [5e-5] * 4
    tokens = np.cumsum([batch * length for batch, length in
                        zip(columns["batch_size"], columns["seq_length"], strict=True)])
    assert columns["consumed_tokens"] == tokens.tolist()
    assert columns["consumed_samples"] == np.cumsum(columns["batch_size"]).tolist()
    assert len(set(columns["tokens"])) == len(whole), "two steps read the same tokens"


def start_until_complete(run: RunConfig, folder: Path) -> dict[str, Any]:
    """What the launcher does of a run: start after start from the newest checkpoint, until one ends with 0."""
    from megatron.core import parallel_state

    found: dict[str, Any] = {"codes": [], "losses": {}, "context_ranks": {}}
    while 0 not in found["codes"]:
        parallel_state.destroy_model_parallel()
        trainer = start_once(run, folder)
        take_step = trainer.train_step

        def noted(trainer: Any = trainer, take_step: Any = take_step) -> Any:
            report, stopped = take_step()
            found["losses"][report.iteration] = report.lm_loss
            found["context_ranks"][report.iteration] = trainer.run.parallel.context_parallel_size
            return report, stopped

        trainer.train_step = noted
        with mock.patch("dsv3_megatron.runs.trainer.destroy_groups"):  # `run_ranks` wants them at the end
            found["codes"].append(trainer.train())
    parallel_state.destroy_model_parallel()
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    torch.distributed.barrier()
    again = start_once(run, folder)
    found["again"] = again.train_step()[0].lm_loss
    return found


def start_once(run: RunConfig, folder: Path) -> Any:
    from dsv3_megatron.runs.trainer import Trainer

    run = run.override(save=str(folder), load=str(folder) if any(folder.glob("iter_*")) else None)
    run.validate(torch.distributed.get_world_size())
    return Trainer(run)


def test_a_phase_has_its_own_layout(prefix: str, tmp_path: Path) -> None:
    """Two replicas, then two ranks that share each longer sequence; stopped within the second phase bit for bit."""
    longer = {"train_iters": 4, "seq_length": 32, "rope_type": "yarn", "rotary_scaling_factor": 2.0,
              "original_max_position_embeddings": SEQ_LENGTH}
    losses = {}
    for name, ranks, layout in (("alone", 1, {}), ("split", 2, {"context_parallel_size": 2})):
        run = phased_run(prefix, num_layers=2, save_interval=2).override(phases=read_phases([
            {"name": "short", "train_iters": 6}, {"name": "long", **longer, **layout}]))
        (tmp_path / name).mkdir()
        found = run_ranks(ranks, start_until_complete, run, tmp_path / name)
        losses[name] = found[0]["losses"]
        for rank in found:
            assert rank["codes"] == ([EXIT_NEXT_LAYOUT, 0] if layout else [0])
            assert list(rank["context_ranks"].values()) == [1] * 6 + [ranks] * 4
            assert rank["losses"] == losses[name] and rank["again"] == rank["losses"][9]
    # fp32 sums in another order, over ten steps.
    assert losses["split"] == pytest.approx(losses["alone"], rel=1e-4)


def in_phases(prefix: str, folder: Path) -> dict[str, Any]:
    """What is in the modules before and after each boundary, and in the checkpoints there."""
    from dsv3_megatron.model.rotary import RotaryTables
    from dsv3_megatron.optim.router_bias import routers
    from dsv3_megatron.runs.trainer import Trainer

    run = phased_run(prefix, save=str(folder))
    trainer = Trainer(run)

    def look() -> dict[str, Any]:
        attentions = [module for chunk in trainer.chunks for module in chunk.modules()
                      if isinstance(getattr(module, "rotary", None), RotaryTables)]
        assert len(attentions) == run.model.num_layers + run.model.mtp_num_layers
        return {"scales": sorted({module.softmax_scale for module in attentions}),
                "types": {module.rotary.config.rope_type for module in attentions},
                "biases": [router.expert_bias.tolist() for _, router in routers(trainer.chunks, run.model.num_layers)],
                "speed": (trainer.speed.seq_length, trainer.speed.flops.training),
                "weights": [mtp_weight(trainer)]}

    looks: dict[int, Any] = {}
    while trainer.step_plan is not None:
        trainer.train_step()
        looks[trainer.iteration] = look()
        if trainer.iteration in (10, 11):
            trainer.save(is_needed=True)
    return looks


def mtp_weight(trainer: Any) -> float:
    """The factor that the trainer's loss has on the MTP losses."""
    from dsv3_megatron.model.language_model import TokenLosses

    length = trainer.phase.training.seq_length
    losses = TokenLosses(torch.zeros(1, length), (torch.ones(1, length),))
    batch = next(trainer._iterate(trainer.data.train, 0)[0])
    return trainer._loss(batch, losses)[0].item() / (length - 1)


def test_what_changes_at_a_boundary(prefix: str, tmp_path: Path) -> None:
    (looks,) = run_ranks(1, in_phases, prefix, tmp_path)
    plain, yarn = 1 / 4, (0.1 * np.log(2) + 1) ** 2 / 4  # queries and keys are 16 wide
    for iteration, look in looks.items():
        is_long = iteration > 10
        assert look["scales"] == pytest.approx([yarn if is_long else plain])
        assert look["types"] == {"yarn" if is_long else "rope"}
        assert look["speed"][0] == (32 if is_long else 16)
        assert look["weights"] == [pytest.approx(0.3 if iteration <= 5 else 0.1, rel=1e-6)]
    assert looks[11]["speed"][1] > looks[10]["speed"][1]
    # gamma 0 leaves every bit of the biases; before and after it they move.
    assert looks[8]["biases"] == looks[9]["biases"] == looks[10]["biases"]
    assert looks[7]["biases"] != looks[8]["biases"] and looks[10]["biases"] != looks[11]["biases"]
    # A checkpoint is of the model of its last step's phase.
    before, after = (read_manifest(tmp_path, iteration).run for iteration in (10, 11))
    assert (before["model"]["rope_type"], before["training"]["seq_length"]) == ("rope", 16)
    assert (after["model"]["rope_type"], after["model"]["max_position_embeddings"]) == ("yarn", 32)
    assert (after["training"]["seq_length"], after["model"]["rotary_scaling_factor"]) == (32, 2.0)
    assert before["training"]["phases"] == after["training"]["phases"] == PHASES
