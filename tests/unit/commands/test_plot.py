"""`dsv3 plot`: a page of a run's folder, and what it says of a folder that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3_megatron.commands import plot as command
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.event_files import is_complete, read_run
from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token
from dsv3_megatron.metrics.measurements import Measurements, RouterMeasurements
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.writer import MetricsWriter
from dsv3_megatron.reports.report_page import _Page, settings, title

Plot = Callable[..., "Done"]
PNG = b"\x89PNG\r\n\x1a\n"


def report(iteration: int) -> StepReport:
    router = RouterMeasurements([3, 5], [10, 6], [0, 16, 0], [0.1, -0.1, 0.0, 0.0])
    seen = Measurements({1: router, 4: router}, {"router": 1.0, "head": 2.0}, (iteration / 20,),
                        {"data": 0.01, "optimizer": 0.2}, {"data": 0.02, "optimizer": 0.3}, {"host-peak-resident": 1e9})
    return StepReport(
        iteration=iteration, consumed_samples=8 * iteration, consumed_tokens=2048 * iteration, lm_loss=8.0 / iteration,
        mtp_losses=(9.0 / iteration,), balance_loss=1.0, grad_norm=5.0**0.5, learning_rate=1e-3, batch_size=8,
        step_time_s=0.5, expert_load={1: [30, 10, 20, 20], 4: [20, 20, 20, 20]}, mtp_weight=0.3, bias_update_rate=1e-3,
        measurements=seen if iteration == 1 or iteration % 2 == 0 else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten steps of a run that logs every second one."""
    run = preset("tiny")
    directory = tmp_path / "first-try" / "tensorboard"
    writer = MetricsWriter(directory, RunSpeed(256, flops_per_token(run.model, 256)), num_layers=4, log_interval=2)
    writer.write_config(run.as_dict(), environment={"world_size": 4, "precision": "fp32", "device": "a CPU"})
    for iteration in range(1, 11):
        writer.write_step(report(iteration))
    writer.write_validation(10, 1.0)
    writer.close()
    return directory


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


@pytest.fixture
def plot(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process: matplotlib takes seconds to import."""
    def run(*arguments: object) -> Done:
        code = command.main([str(argument) for argument in arguments])
        return Done(code, capsys.readouterr().err)

    return run


def event_file(folder: Path) -> Path:
    [path] = folder.glob("events.out.tfevents.*")
    return path


def test_a_run_is_drawn(folder: Path, tmp_path: Path, plot: Plot) -> None:
    done = plot(folder, "--output", tmp_path / "page.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.png").read_bytes()[:8] == PNG
    log = read_run(folder)
    assert title(log) == "first-try: tiny"
    assert settings(log) == (
        "4 layers of which 1 dense, hidden 128 · 8 experts, top 2 · 1 MTP · sequence 256 · 400 steps planned\n"
        "4 processes, not split · fp32 · a CPU · 20.5k tokens trained on")
    assert [step for step, _ in log.scalars["grad-norm/head"]] == [1, 2, 4, 6, 8, 10]
    assert log.images["expert-load/now"][0] == 10 and log.images["expert-load/now"][1][:8] == PNG
    assert log.cut_short == ()


def test_event_files_alone_are_enough(folder: Path, plot: Plot) -> None:
    for name in ("metrics.jsonl", "config.json", "environment.json"):
        (folder / name).unlink()
    done = plot(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "report.png").read_bytes()[:8] == PNG


def test_a_run_that_was_killed_is_drawn(folder: Path, plot: Plot) -> None:
    path = event_file(folder)
    path.write_bytes(path.read_bytes()[:-5])
    done = plot(folder)
    assert done.returncode == 0
    assert f"{path}: the last record is cut short" in done.stderr


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def second_record(path: Path) -> int:
    return 16 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("place", [0, 9, 13], ids=["length", "length's checksum", "bytes"])
def test_a_damaged_file_is_named(folder: Path, place: int, plot: Plot) -> None:
    path = event_file(folder)
    begin = second_record(path)
    assert is_complete(path)
    flip(path, begin + place)
    done = plot(folder)
    assert done.returncode == 2 and not (folder / "report.png").exists()
    assert done.stderr == (f"error: {path} is damaged: the record at byte {begin} does not have its checksum, and what "
                           "follows cannot be read; move the file away to draw the run without it\n")


@pytest.mark.parametrize(("prepare", "message"), [
    (lambda folder: event_file(folder).rename(folder.parent / "elsewhere"), "has no event files"),
    (lambda folder: (folder / "metrics.jsonl").write_text("nonsense\n"), "metrics.jsonl:1 (byte 0) is not a metrics"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
], ids=["no event files", "damaged metrics", "damaged config"])
def test_what_cannot_be_read_is_said(folder: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(folder)
    with pytest.raises(ValueError) as error:
        read_run(folder)
    assert message in str(error.value)


def test_the_folder_above_is_told_where_to_look(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there are some in {folder}"):
        read_run(folder.parent)
    with pytest.raises(ValueError, match="absent is not a folder; give the one that the run had as --tensorboard-dir"):
        read_run(tmp_path / "absent")


def test_nothing_to_draw(tmp_path: Path, plot: Plot) -> None:
    run = preset("tiny")
    writer = MetricsWriter(tmp_path / "logs", RunSpeed(256, flops_per_token(run.model, 256)), num_layers=4)
    writer.write_config(run.as_dict())
    writer.close()
    done = plot(tmp_path / "logs")
    assert done.returncode == 2 and "holds no step with a finite `lm loss`" in done.stderr


def test_a_run_whose_records_are_gone_is_drawn_without_them_and_that_is_said(folder: Path, plot: Plot) -> None:
    (folder / "metrics.jsonl").unlink()
    done = plot(folder)
    assert done.returncode == 0 and (folder / "report.png").exists()
    assert done.stderr == (f"{folder}/metrics.jsonl is missing, which a run writes beside config.json: drawn without "
                           "it\n")


def test_each_validation_set_is_drawn_by_its_name(folder: Path, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    directory, speed = tmp_path / "several", RunSpeed(256, flops_per_token(preset("tiny").model, 256))
    writer = MetricsWriter(directory, speed, num_layers=4)
    writer.write_step(report(1))
    writer.write_validation(1, 1.0, sets={"code": (1.0, ()), "web": (2.0, ())})
    writer.close()
    labels = {}
    for name, log in (("one", read_run(folder)), ("several", read_run(directory))):
        axes = Figure().add_subplot()
        _Page(log).draw_losses(axes)
        labels[name] = [str(line.get_label()) for line in axes.lines if str(line.get_label()).startswith("validation")]
    assert labels == {"one": ["validation, last 1.000"],
                      "several": ["validation code, last 1.000", "validation web, last 2.000"]}
