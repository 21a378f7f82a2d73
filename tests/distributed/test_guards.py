"""Each guard fires where it must, on every rank alike, and what is not applied leaves no trace."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from dsv3_megatron.checkpoint.folder import latest_iteration, read_manifest, saved_iterations
from dsv3_megatron.guards.decisions import EXIT_GUARD
from tests import signing
from tests.distributed.faulty_run import Fault
from tests.distributed.guarded_runs import BAD_STEP, bad_steps, steps_in_halves_and_whole, whole_runs
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import GLOBAL_BATCH, SEQ_LENGTH, differences
from tests.made_up_texts import write_texts

pytestmark = pytest.mark.distributed

INF = float("inf")
TP2, PP2, EP2 = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "expert_model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of text-like token statistics."""
    return write_texts(tmp_path_factory.mktemp("data") / "train", 150)


def once(kind: str, rank: int = 1, **values: object) -> Fault:
    return Fault(kind, [BAD_STEP], rank, **values)  # type: ignore[arg-type]


# name, layout, fault, what the log must say of it
NONFINITE = [
    ("gradient", {}, once("gradient", where="linear_proj.weight"), ["grad norm is nan", "linear_proj.weight"]),
    ("bf16 Inf", {"precision": "bf16"}, once("gradient", value=INF, where="final_layernorm.weight"),
     ["grad norm is ", "final_layernorm.weight"]),
    ("expert", EP2, once("gradient", where="experts.linear_fc2.weight"), ["grad norm is nan", "experts.linear_fc2"]),
    ("first stage", PP2, once("activation", rank=0, where="layers.0.mlp.linear_fc2"),
     ["lm loss is nan", "mtp_1 loss is nan", "micro-batch of samples 8 on rank 1"]),
    ("one replica", {}, once("activation", where="layers.1.mlp.shared_experts.linear_fc2"),
     ["lm loss is nan", "micro-batch of samples 9 on rank 1", "micro-batch of samples 11 on rank 1"]),
    ("DualPipe", {**PP2, "pipeline_schedule": "dualpipe"}, once("activation", rank=0, where="layers.0.mlp.linear_fc2"),
     ["lm loss is nan", "micro-batch of samples "]),
    ("MTP", PP2, once("activation", where="mtp.layers.0.eh_proj"), ["mtp_1 loss is nan"]),
    ("balance", {}, once("balance"), ["balance loss is nan"]),
    ("FP8", {"fp8": "blockwise"}, once("activation", value=INF, where="layers.0.mlp.linear_fc1"),
     ["lm loss is nan", "micro-batch of samples 9 on rank 1"]),
    ("FP8 dispatch", {**EP2, "fp8": "blockwise"}, once("activation", value=INF, where="layers.1.pre_mlp_layernorm"),
     ["lm loss is nan"]),
    ("copy", TP2, once("copy", where="q_layernorm.weight"), ["tensor-parallel rank's copy of a gradient"]),
]


def test_a_step_that_is_not_finite_leaves_no_trace_on_any_rank(data: str) -> None:
    both = run_ranks(2, bad_steps, data, [(name, changes, fault) for name, changes, fault, _ in NONFINITE])
    for name, _, _, signs in NONFINITE:
        for result in (ranks[name] for ranks in both):
            assert result.report.skipped and result.changed == [], name
            assert result.report.consumed_samples == BAD_STEP * GLOBAL_BATCH
            (event,) = result.events
            for sign in [*signs, f"iteration {BAD_STEP}: ", "skipped; samples 8 to 11 of the training data"]:
                assert sign in event, f"{name}: {sign} is not in {event}"
            assert not result.after.skipped
            assert result.counters["skipped"] == 1 and result.counters["consecutive_skips"] == 0
        kinds = {changed.split(":")[0] for ranks in both for changed in ranks[name].changed_after}
        assert kinds >= {"weight", "exp_avg", "exp_avg_sq", "steps", "bias"}, name
        assert both[0][name].report.lm_loss == pytest.approx(both[1][name].report.lm_loss, nan_ok=True)


def test_spikes_are_left_out_or_logged(data: str) -> None:
    scaled = once("scaled", rank=-1, value=1e4)
    cases = [("skip", {"on_spike": "skip"}, scaled), ("log", {"on_spike": "log"}, scaled),
             ("batch", {"on_spike": "skip", "spike_loss_threshold": 1.0}, Fault("corrupt", range(44, 48)))]
    for ranks in run_ranks(2, bad_steps, data, cases):
        for name in ("skip", "batch"):
            assert ranks[name].report.skipped and ranks[name].report.is_spike and ranks[name].changed == []
        assert "grad norm 1" in ranks["skip"].events[0] and "skipped; samples 8 to 11" in ranks["skip"].events[0]
        assert "lm loss" in ranks["batch"].events[0] and "skipped; samples 44 to 47" in ranks["batch"].events[0]
        assert ranks["log"].report.is_spike and not ranks["log"].report.skipped and ranks["log"].changed
        assert [ranks[name].counters["skipped"] for name in ("skip", "log")] == [1, 0]


def test_an_applied_step_is_megatrons_own_bit_for_bit(data: str) -> None:
    assert run_ranks(2, steps_in_halves_and_whole, data) == [[], []]


# -- rollback ------------------------------------------------------------------------------------------

# Steps of 4 samples, checkpoints at every 8th. Samples 44 to 47 are the 12th step's: back to 8, on with sample 48.
# Then sample 84 is the 18th step's first: back to 16, which stands at sample 80, on with sample 88.
CORRUPTED = [Fault("corrupt", range(44, 48)), Fault("corrupt", range(84, 88))]
ROLLBACK = {"on_spike": "rollback", "save_interval": 8, "keep_last": 0, "train_iters": 19, "spike_min_steps": 6,
            "spike_loss_threshold": 1.0}
JUMPS = [[32, 48], [80, 88]]


def test_rollback_resume_and_the_end_of_a_run(data: str, tmp_path: Path) -> None:
    def run(name: str, *faults: Fault, **changes: object) -> tuple[str, dict, list[Fault]]:
        return (name, {**ROLLBACK, "save": str(tmp_path / name), "tensorboard_dir": str(tmp_path / f"{name}-logs"),
                       **changes}, list(faults))

    # Stopped at 14, after one rollback; from there to the end, with the other one.
    stopped = str(tmp_path / "stopped")
    runs = [
        run("whole", *CORRUPTED),
        run("stopped", *CORRUPTED, Fault("stop", [14])),
        run("resumed", *CORRUPTED, save=stopped, load=stopped),
        run("ended", *CORRUPTED, max_rollbacks=1),
        run("poisoned", Fault("gradient", range(5, 99), 1, where="linear_proj.weight"), max_consecutive_skips=2),
    ]
    both = run_ranks(2, whole_runs, data, runs)
    for ranks in both:
        check_rollbacks(ranks["whole"])
        check_resume(ranks["whole"], ranks["stopped"], ranks["resumed"])
        assert ranks["ended"].code == ranks["poisoned"].code == EXIT_GUARD
        assert ranks["ended"].latest == 16, "the checkpoint before the spike stays the newest"
        assert ranks["poisoned"].latest == 0, "the one to go back to: nothing is saved of a run that a guard ends"
    check_files(tmp_path)


def test_a_rollback_over_a_phases_start_takes_its_old_steps_again(data: str, tmp_path: Path) -> None:
    """The spike is the second phase's first step; the steps since the checkpoint are the first phase's once more."""
    phases = [{"name": "first", "train_iters": 10}, {"name": "second", "train_iters": 3, "lr": 1e-3,
                                                     "global_batch_size": 2 * GLOBAL_BATCH}]
    changes = {name: value for name, value in ROLLBACK.items() if name != "train_iters"}
    changes |= {"phases": phases, "save": str(tmp_path)}
    both = run_ranks(2, whole_runs, data, [("run", changes, [Fault("corrupt", range(40, 48))])])
    for ranks in both:
        run = ranks["run"]
        assert run.code == 0 and run.latest == 13 and run.guard["counters"]["jumps"] == [[32, 48]]
        assert [report.iteration for report in run.reports] == [*range(1, 12), *range(9, 14)]
        again = run.reports[11:]
        assert [report.learning_rate for report in again] == [3e-3, 3e-3, 1e-3, 1e-3, 1e-3]
        assert [first for first, _ in run.samples[11:]] == [48, 52, 56, 64, 72]
        assert again[-1].consumed_samples == 10 * GLOBAL_BATCH + 3 * 2 * GLOBAL_BATCH
        assert not any(report.is_spike or report.skipped for report in again)


def check_rollbacks(whole) -> None:
    assert whole.code == 0 and whole.latest == 19
    assert whole.guard["counters"] == {"skipped": 2, "spikes": 2, "rollbacks": 2, "consecutive_skips": 0,
                                       "jumps": JUMPS}
    taken = [*range(1, 13), *range(9, 19), *range(17, 20)]
    assert [report.iteration for report in whole.reports] == taken
    assert [first for first, _ in whole.samples] == [*range(0, 48, 4), *range(48, 88, 4), *range(88, 100, 4)]
    # Jumped samples are not consumed: what schedules are keyed to follows the iteration.
    assert all(report.consumed_samples == report.iteration * GLOBAL_BATCH for report in whole.reports)
    assert [report.iteration for report in whole.reports if report.is_spike] == [12, 18]


def check_resume(whole, stopped, resumed) -> None:
    """The resumed run takes the steps of the uninterrupted one, bit for bit, and decides as it does."""
    assert stopped.code == resumed.code == 0 and stopped.guard["counters"]["jumps"] == JUMPS[:1]
    assert stopped.reports[-1].iteration == 14
    numbers = [(report.iteration, report.lm_loss, report.mtp_losses, report.grad_norm, report.is_spike)
               for report in resumed.reports]
    assert numbers == [(report.iteration, report.lm_loss, report.mtp_losses, report.grad_norm, report.is_spike)
                       for report in whole.reports[len(stopped.reports):]]
    assert resumed.guard == whole.guard
    assert differences(whole.state, resumed.state) == []


def check_files(folder: Path) -> None:
    manifest = read_manifest(folder / "whole")
    assert manifest.progress.consumed_tokens == 19 * GLOBAL_BATCH * SEQ_LENGTH
    assert manifest.progress.guards["counters"]["jumps"] == JUMPS
    events = [json.loads(line) for line in (folder / "whole-logs" / "guards.jsonl").read_text().splitlines()]
    assert [(event["iteration"], event["kind"], event["action"], event["samples"]) for event in events] == [
        (12, "spike", "rolled back", [44, 47]), (18, "spike", "rolled back", [84, 87])]
    # Which of the two is out of line depends on what the samples are that come between.
    assert all(event["reasons"][0].startswith(("lm loss ", "grad norm ")) for event in events)
    records = [json.loads(line) for line in (folder / "whole-logs" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, 20)), "steps taken back are not in the metrics"
    assert records[-1]["num_rollbacks"] == 2
    report = (folder / "ended-logs" / "guards-report.txt").read_text()
    for sign in ("a spike after 1 rollbacks (max_rollbacks=1)", "samples that rollbacks jumped over: 32 to 47",
                 "iteration 18: ", "ended the run; samples 84 to 87", "good steps (spike_window=16)",
                 "the last one before the spikes"):
        assert sign in report, report
    report = (folder / "poisoned-logs" / "guards-report.txt").read_text()
    for sign in ("3 updates in a row were left out (max_consecutive_skips=2)", "linear_proj.weight",
                 "Nothing was saved of this end: the newest checkpoint in ", " is that of iteration 0"):
        assert sign in report, report
    assert report == (folder / "poisoned" / "ended-by-guard.txt").read_text()
    assert not (folder / "whole" / "ended-by-guard.txt").exists()


# -- what a damaged state may cost ---------------------------------------------------------------------


def flip_a_bit(folder: Path) -> None:
    """Make one element of the newest checkpoint's output weight, and of its fp32 copy, about 1e37.

    As if the bit had flipped in memory before the save: the checksums are those of the damaged bytes.
    The largest in the row of token 1, which is the most frequent: nothing makes its logit small everywhere.
    """
    path = read_manifest(folder).path
    for key in ("output_layer.weight", "optimizer.state.param.output_layer.weight"):
        name, place, stored_bytes = first_piece(path, key)
        content = bytearray((path / name).read_bytes())
        values = torch.load(io.BytesIO(content[place:place + stored_bytes]), weights_only=True)
        largest = int(values[1].abs().argmax())
        at = content.index(values[1].numpy().tobytes(), place) + 4 * largest
        content[at + 3] ^= 0x40  # the exponent's highest bit of an fp32 number, little-endian
        (path / name).write_bytes(content)
    signing.sign(path)


def first_piece(path: Path, key: str) -> tuple[str, int, int]:
    """File, offset and bytes of a tensor's first piece."""
    metadata = FileSystemReader(path).read_metadata()
    index = min((index for index in metadata.storage_data if index.fqn == key), key=lambda index: index.offset)
    info = metadata.storage_data[index]
    return info.relative_path, info.offset, info.length


def files_of(folder: Path) -> dict[str, str]:
    """A hash of every file of a folder of checkpoints, without what tells of the end."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "ended-by-guard.txt"}


def test_a_flipped_bit_costs_no_sound_checkpoint_and_looks_like_no_progress(data: str, tmp_path: Path) -> None:
    """However often it is started again, stopped or exported; saved elsewhere it writes nothing there either."""
    save, other, logs = tmp_path / "saved", tmp_path / "other", tmp_path / "logs"
    changes = {"save": str(save), "save_interval": 4, "train_iters": 12, "keep_last": 3, "on_spike": "skip",
               "spike_min_steps": 6, "tensorboard_dir": str(logs), "ema_decay": 0.9, "eval_ema": True}
    assert run_ranks(2, whole_runs, data, [("begun", changes, [])])[0]["begun"].code == 0
    assert saved_iterations(save) == [4, 8, 12]
    flip_a_bit(save)
    before = files_of(save)
    changes |= {"load": str(save), "train_iters": 40, "save_interval": 1, "keep_last": 1}
    again = [("stopped", changes, [Fault("stop", [14])]),
             ("at its end", {**changes, "train_iters": 14, "max_consecutive_skips": 99,
                             "export_hf": str(tmp_path / "exported")}, []),
             ("again", changes, []), ("and again", changes, []),
             ("elsewhere", {**changes, "save": str(other)}, [])]
    for ranks in run_ranks(2, whole_runs, data, again):
        assert [ranks[name].code for name, _, _ in again] == [0, 0, EXIT_GUARD, EXIT_GUARD, EXIT_GUARD]
        assert all(report.skipped for name, _, _ in again for report in ranks[name].reports)
        assert len(ranks["again"].reports) == len(ranks["and again"].reports) == 6
    assert files_of(save) == before and latest_iteration(save) == 12
    assert not saved_iterations(other) and not (tmp_path / "exported").exists()
    report = (save / "ended-by-guard.txt").read_text()
    assert f"go back to an earlier one (write 8 into {save}" in report
    (save / "latest_checkpointed_iteration.txt").write_text("8\n")
    back = run_ranks(2, whole_runs, data, [("back", {**changes, "save_interval": 4, "train_iters": 13}, [])])[0]["back"]
    assert back.code == 0 and not (save / "ended-by-guard.txt").exists() and latest_iteration(save) == 13


# -- steps and validations without a token that counts -------------------------------------------------

UNCOUNTED = [
    ("replicas", {}), ("TP", TP2), ("PP", PP2), ("EP", EP2), ("zb1p", {**PP2, "pipeline_schedule": "zb1p"}),
    ("DualPipe", {**PP2, "pipeline_schedule": "dualpipe"}),
    ("DualPipeV", {**PP2, "pipeline_schedule": "dualpipev", "num_layers": 4}),
    ("bf16", {"precision": "bf16"}), ("without balance loss", {"moe_aux_loss_coeff": 0.0})]


def test_a_step_without_a_token_that_counts_is_left_out_on_every_layout(data: str) -> None:
    """Balance losses have gradients there too; none is applied, nothing is divided by zero."""
    cases = [(name, changes, once("uncounted", rank=-1)) for name, changes in UNCOUNTED]
    both = run_ranks(2, bad_steps, data, cases)
    for name, _ in UNCOUNTED:
        for result in (ranks[name] for ranks in both):
            assert result.report.skipped and result.changed == [], name
            assert (result.report.lm_loss, result.report.mtp_losses) == (None, ())
            assert np.isfinite(result.report.grad_norm) and result.report.consumed_samples == BAD_STEP * GLOBAL_BATCH
            assert result.events == [f"iteration {BAD_STEP}: no token of the step counts in the loss: skipped; samples "
                                     "8 to 11 of the training data"]
            assert not result.after.skipped and result.after.lm_loss is not None
            assert result.counters["skipped"] == 1 and result.counters["consecutive_skips"] == 0
        changed = {changed.split(":")[0] for ranks in both for changed in ranks[name].changed_after}
        assert changed >= {"weight", "exp_avg", "exp_avg_sq", "steps", "bias"}, name


def test_one_replica_without_a_token_that_counts_is_no_reason_to_leave_a_step_out(data: str) -> None:
    both = run_ranks(2, bad_steps, data, [("half", {}, once("uncounted", rank=1))])
    for ranks in both:
        assert not ranks["half"].report.skipped and ranks["half"].events == []
        assert np.isfinite(ranks["half"].report.lm_loss) and ranks["half"].changed
