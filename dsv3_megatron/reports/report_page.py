"""A run on one page: losses, recipe, gradients, speed, memory, balance, and where a step's time goes.

Drawn from what `event_files.read_run` read. Curves come from metrics.jsonl where it has every step, else from the
event files' logged steps. A panel whose numbers a run does not have says so.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.config.run import run_name
from dsv3_megatron.metrics.event_files import RunLog
from dsv3_megatron.metrics.progress import compact
from dsv3_megatron.reports.plot import INK, MTP, MUTED, STYLE, TRAIN, VALIDATION, smooth, smoothing_window

Points = Sequence[tuple[int, float]]

# Event-file tag -> column of metrics.jsonl, which has it for every step.
_COLUMNS = {"lm loss": "lm_loss", "grad-norm": "grad_norm", "learning-rate": "learning_rate",
            "batch-size": "batch_size", "tokens-per-second": "tokens_per_second", "mfu": "mfu",
            "expert-load/max-violation": "max_violation"}
# Apart for every kind of colour vision (Okabe and Ito), dark enough on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5ba6", "#6b7280", "#8b5a2b")


def draw_report(log: RunLog, path: str | Path) -> None:
    """Write the page as a PNG.

    Args:
        log: Log of a run with at least one loss.
        path: File to write; its folder must exist.

    Raises:
        ValueError: there is no finite loss to draw.
    """
    page = _Page(log)
    if not page.points("lm loss"):
        raise ValueError(f"{log.directory} holds no step with a finite `lm loss`; there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "font.size": 9}):
        figure = plt.figure(figsize=(17, 12.2), dpi=100, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.935))
        figure.text(0.01, 0.99, title(log), ha="left", va="top", fontsize=15, fontweight="bold", color=INK)
        figure.text(0.01, 0.968, settings(log), ha="left", va="top", fontsize=9.5, color=MUTED, linespacing=1.4)
        grid = figure.add_gridspec(3, 4, height_ratios=[1.15, 1, 1.15])
        page.draw_losses(figure.add_subplot(grid[0, :2]))
        page.draw_recipe(figure.add_subplot(grid[0, 2]))
        page.draw_gradients(figure.add_subplot(grid[0, 3]))
        page.draw_speed(figure.add_subplot(grid[1, 0]))
        page.draw_time(figure.add_subplot(grid[1, 1]))
        page.draw_memory(figure.add_subplot(grid[1, 2]))
        page.draw_agreement(figure.add_subplot(grid[1, 3]))
        page.draw_balance(figure.add_subplot(grid[2, 0]))
        page.draw_entropy(figure.add_subplot(grid[2, 1]))
        page.draw_heat_map(figure.add_subplot(grid[2, 2]), "expert-load/now")
        page.draw_heat_map(figure.add_subplot(grid[2, 3]), page.fullest_layer())
        figure.savefig(str(path))
        plt.close(figure)


def title(log: RunLog) -> str:
    """The run's folder and its preset, or the model whose architecture it took; `run/tensorboard` is called `run`."""
    folder = log.directory.resolve()
    name = folder.parent.name if folder.name in ("tensorboard", "logs") else folder.name
    return f"{name}: {run_name(log.config['preset'], log.config.get('from_hf'))}" if log.config else name


def settings(log: RunLog) -> str:
    """Two lines on model, layout, training and machine, as far as the folder says."""
    if log.config is None:
        return "no config.json beside the event files"
    model, parallel, training = (log.config[section] for section in ("model", "parallel", "training"))
    environment = log.environment or {}
    degrees = "".join(f" {name}{parallel[field]}" for name, field in (
        ("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"),
        ("VPP", "num_virtual_stages_per_pipeline_rank"), ("EP", "expert_model_parallel_size"),
        ("ETP", "expert_tensor_parallel_size"), ("CP", "context_parallel_size")) if (parallel.get(field) or 1) > 1)
    tokens = log.scalars.get("consumed-tokens")
    first = [f"{model['num_layers']} layers of which {model['num_dense_layers']} dense, hidden {model['hidden_size']}",
             f"{model['num_experts']} experts, top {model['moe_router_topk']}",
             f"{model['mtp_num_layers']} MTP", f"sequence {training['seq_length']}",
             f"{training['train_iters']} steps planned"]
    second = [f"{environment.get('world_size', '?')} processes{degrees or ', not split'}",
              environment.get("precision", training["precision"]), environment.get("device", "device not noted"),
              f"{compact(tokens[-1][1])} tokens trained on" if tokens else ""]
    return "\n".join(" · ".join(part for part in line if part) for line in (first, second))


class _Page:
    """The panels of one run's page."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def points(self, tag: str) -> Points:
        """(step, value) of a tag, finite ones, of every step where metrics.jsonl has it."""
        records, column = self._log.records, _COLUMNS.get(tag)
        depth = re.fullmatch(r"mtp_(\d+) loss", tag)
        if records is not None and column:
            found: Points = records.column(column)
        elif records is not None and depth:
            losses = [(step, values[int(depth.group(1)) - 1]) for step, values in records.column("mtp_losses")]
            found = [(step, loss) for step, loss in losses if loss is not None]
        else:
            found = self._log.scalars.get(tag, [])
        return [(step, value) for step, value in found if value == value and abs(value) != float("inf")]

    def family(self, prefix: str, ending: str = "") -> dict[str, Points]:
        """Tags of one kind by what is between prefix and ending, in the order in which they were written."""
        return {tag[len(prefix):len(tag) - len(ending)]: self.points(tag) for tag in self._log.scalars
                if tag.startswith(prefix) and tag.endswith(ending) and len(tag) > len(prefix) + len(ending)}

    def draw_losses(self, axes: Any) -> None:
        _curve(axes, self.points("lm loss"), TRAIN, "main")
        for name, points in self.family("mtp_", " loss").items():
            _curve(axes, points, MTP, f"MTP {name}")
        whole = self.points("lm loss validation")
        named = self.family("lm loss validation/") or ({"": whole} if whole else {})
        for (name, points), marker in zip(named.items(), itertools.cycle("os^vD"), strict=False):
            axes.plot(*zip(*points, strict=True), color=VALIDATION, marker=marker, markersize=4, linewidth=1.2,
                      label=f"validation{name and ' ' + name}, last {points[-1][1]:.3f}")
        axes.set_ylabel("nats per token")
        _finish(axes, "losses", columns=3)

    def draw_recipe(self, axes: Any) -> None:
        _curve(axes, self.points("learning-rate"), TRAIN, "learning rate", is_smooth=False)
        axes.set_ylim(0)
        axes.set_ylabel("learning rate", color=TRAIN)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        _finish(axes, "learning rate and batch", columns=0)
        right = axes.twinx()
        _curve(right, self.points("batch-size"), VALIDATION, "batch", is_smooth=False)
        right.set_ylim(0)
        right.set_ylabel("sequences per step", color=VALIDATION)
        right.grid(False)

    def draw_gradients(self, axes: Any) -> None:
        for (name, points), colour in zip(self.family("grad-norm/").items(), _COLOURS, strict=False):
            _curve(axes, points, colour, name)
        whole = self.points("grad-norm")
        axes.plot(*zip(*whole, strict=True), color="black", linewidth=0.9, linestyle=":", label="whole")
        axes.set_yscale("log")
        axes.set_ylabel("L2 norm before clipping")
        _finish(axes, "gradient norm by component", columns=4)

    def draw_speed(self, axes: Any) -> None:
        speed, mfu = self.points("tokens-per-second"), self.points("mfu")
        _curve(axes, speed, TRAIN, "tokens/s")
        axes.set_ylim(0)
        axes.yaxis.set_major_formatter(lambda value, _: compact(value) if value else "0")
        axes.set_ylabel("tokens/s")
        if mfu:
            _finish(axes, "throughput and MFU", columns=0)
            right = axes.twinx()
            _curve(right, [(step, 100 * value) for step, value in mfu], VALIDATION, "MFU")
            right.set_ylim(0)
            right.set_ylabel("MFU in %", color=VALIDATION)
            right.grid(False)
            return
        flops = self.points("model-flops-per-second")
        rate = f", last {flops[-1][1] / 1e12:.3g} TFLOP/s" if flops else ""
        _finish(axes, f"throughput{rate}", columns=0)
        axes.text(0.98, 0.04, "MFU: the device's peak is not known", ha="right", color=MUTED, fontsize=8,
                  transform=axes.transAxes)

    def draw_time(self, axes: Any) -> None:
        phases = {name: points for name, points in self.family("time/").items() if points}
        if not phases:
            return _nothing(axes, "time per step by phase")
        steps = [step for step, _ in next(iter(phases.values()))]
        heights = [[1000 * value for _, value in points] for points in phases.values()]
        axes.stackplot(steps, heights, labels=list(phases), colors=_COLOURS, linewidth=0)
        axes.set_ylabel("ms per step, mean over ranks")
        # The first step warms up: caches, allocators, compilers.
        later = [sum(column) for column in list(zip(*heights, strict=True))[1:]]
        if later:
            axes.set_ylim(0, 1.25 * max(later))
        _finish(axes, "time per step by phase", columns=3)

    def draw_memory(self, axes: Any) -> None:
        kinds = self.family("memory/")
        if not any(kinds.values()):
            return _nothing(axes, "memory of the fullest process")
        for (name, points), colour in zip(kinds.items(), _COLOURS, strict=False):
            _curve(axes, [(step, value / 1e9) for step, value in points], colour, name, is_smooth=False)
        axes.set_ylim(0)
        axes.set_ylabel("GB")
        _finish(axes, "memory of the fullest process", columns=2)

    def draw_agreement(self, axes: Any) -> None:
        depths = self.family("mtp_", " agreement")
        if not any(depths.values()):
            return _nothing(axes, "MTP agrees with the main head")
        for (name, points), colour in zip(depths.items(), (MTP, *_COLOURS), strict=False):
            _curve(axes, points, colour, f"depth {name}")
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of positions")
        _finish(axes, "MTP agrees with the main head", columns=2)

    def draw_balance(self, axes: Any) -> None:
        layers = self.family("expert-load/layer-", "/max-violation")
        if not any(layers.values()):
            return _nothing(axes, "expert balance: max-violation")
        for points in layers.values():
            axes.plot(*zip(*points, strict=True), color=MUTED, alpha=0.35, linewidth=0.8)
        _curve(axes, self.points("expert-load/max-violation"), TRAIN, f"mean; grey: each of {len(layers)} layers")
        axes.set_ylim(0)
        axes.set_ylabel("fullest expert over the mean, minus 1")
        _finish(axes, "expert balance: max-violation", columns=1)

    def draw_entropy(self, axes: Any) -> None:
        if not self.points("expert-load/entropy"):
            return _nothing(axes, "expert balance: entropy and dead experts")
        for tag, colour, label in (("expert-load/entropy", TRAIN, "entropy of the load"),
                                   ("expert-load/dead-experts", VALIDATION, "dead experts"),
                                   ("expert-load/least-load", MTP, "emptiest expert over the mean")):
            _curve(axes, self.points(tag), colour, label)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share, mean over layers")
        _finish(axes, "expert balance: entropy and dead experts", columns=2)

    def fullest_layer(self) -> str:
        """Tag of the heat map over time of the layer whose load is least even at the end."""
        last = {layer: points[-1][1] for layer, points in self.family("expert-load/layer-", "/max-violation").items()
                if points}
        return f"expert-load/layer-{max(last, key=last.__getitem__)}/over-time" if last else ""

    def draw_heat_map(self, axes: Any, tag: str) -> None:
        if tag not in self._log.images:
            return _nothing(axes, "expert load over its mean")
        from PIL import Image

        image = Image.open(io.BytesIO(self._log.images[tag][1]))
        axes.imshow(image, interpolation="antialiased")
        # A small map is not blown up to fill the panel; it brings its own heading.
        axes.set_xlim(0, max(image.width, 330))
        axes.set_ylim(max(image.height, 180), 0)
        axes.set_anchor("NW")
        axes.set_axis_off()


def _curve(axes: Any, points: Points, colour: str, label: str, *, is_smooth: bool = True) -> None:
    """A line; the mean over a window of points where there are many, with the points behind it."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = smoothing_window(len(values)) if is_smooth else 1
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, smooth(values, window), color=colour, linewidth=1.5, label=label, marker=marker, markersize=3)


def _finish(axes: Any, name: str, *, columns: int) -> None:
    """Heading, name of the horizontal axis, and below it the legend if it has columns."""
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("iteration")
    if columns:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=8,
                    labelcolor=INK, columnspacing=1.2, handlelength=1.4, borderaxespad=0)


def _nothing(axes: Any, name: str) -> None:
    """A panel for numbers that the run does not have."""
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not in this run's logs", ha="center", va="center", color=MUTED, transform=axes.transAxes)
