"""What grouping output gradients in blocks of 128x128, the report's negative control, does to the gradients themselves.

A run is too short to diverge; its gradients show the harm at once. After some steps of training in FP8, one batch is
passed forward once as always and backward three times, with Dgrad exact (fp32), in tiles of 1x128, and in blocks:

    products     Dgrad of every linear, of the same output gradient: relative error of the whole, and the median and the
                 largest decile over tokens, each against its own norm
    gradients    of every layer's weights at the end of the backward pass, where the errors of Dgrad have added up

Forward passes are equal, routing too, so that all that differs is Dgrad.

Usage:
    python -m tools.experiments.fp8_gradients --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/fp8_gradients_tiny -- --precision fp32 --train-iters 40
writes docs/experiments/fp8_gradients_tiny.csv and .png and prints the table.

Source: DeepSeek-V3 report, appendix B.2.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tools.experiments.variants import common_flags, experiment_parser

if TYPE_CHECKING:
    import torch

EXACT, GROUPINGS = "exact", ("tile", "block")
_FP8 = ["--fp8", "blockwise", "--fp8-backend", "reference", "--eval-interval", "0", "--log-interval", "1000000"]
_COLOURS = {"tile": "#dc2626", "block": "#2563eb"}


@dataclass(frozen=True)
class Row:
    """One measured error, a share of the exact gradient's norm.

    Attributes:
        seed: Of the run.
        kind: "product", or "gradients" of a layer.
        name: The weight's global name, or the layer.
        grouping: "tile" or "block".
        error: Of the whole tensor.
        token_median: Of a product: median over tokens; None of gradients.
        token_decile: The largest but a tenth.
    """

    seed: int
    kind: str
    name: str
    grouping: str
    error: float
    token_median: float | None = None
    token_decile: float | None = None


def product_errors(products: Any, grad: torch.Tensor, weight: torch.Tensor, counts: Any) -> Iterator[tuple[str, tuple]]:
    """Errors of Dgrad in tiles and in blocks: of the whole, and median and largest decile over tokens."""
    import torch

    def dgrad(**changes: str) -> torch.Tensor:
        precision = dataclasses.replace(products.precision, **changes)
        return dataclasses.replace(products, precision=precision).input_grad(grad, weight, torch.float32, counts)

    exact = dgrad(dgrad="bf16")  # in the run's own precision
    norms = exact.norm(dim=1)
    for grouping in GROUPINGS:
        difference = dgrad(dgrad="fp8", grad_grouping=grouping) - exact
        # Tokens without a gradient, as those after the last label, have no error to be a share of.
        shares = (difference.norm(dim=1) / norms)[norms > 0]
        yield grouping, ((difference.norm() / norms.norm()).item(), shares.median().item(),
                         shares.quantile(0.9).item())


def measure(arguments: Sequence[str], seed: int) -> list[Row]:
    """Train, then compare backward passes of the next batch."""
    from dsv3_megatron.config.load import parse_command
    from dsv3_megatron.platform import prepare

    prepare()
    from megatron.core import parallel_state

    from dsv3_megatron.ops.fp8.products import Products
    from dsv3_megatron.runs.trainer import Trainer

    run = parse_command([*arguments, *_FP8, "--seed", str(seed)]).run
    run.validate(1)
    trainer = Trainer(run)
    for _ in range(run.training.train_iters - 1):
        trainer.train_step()
    (chunk,), batch = trainer.chunks, next(trainer.batches[0])
    modules = _weights(chunk)
    rows: list[Row] = []
    gradients: dict[str, dict[str, Any]] = {}
    observed = Products.input_grad

    def observe(products: Products, grad: Any, weight: Any, dtype: Any, counts: Any = None) -> Any:
        with mock.patch.object(Products, "input_grad", observed):
            rows.extend(Row(seed, "product", modules[id(weight)], grouping, *errors)
                        for grouping, errors in product_errors(products, grad, weight, counts))
        return observed(products, grad, weight, dtype, counts)

    for grouping in (EXACT, *GROUPINGS):
        _set_dgrad(chunk, grouping)
        chunk.zero_grad_buffer()
        # Products are looked at where the gradients that come to them are exact.
        with mock.patch.object(Products, "input_grad", observe if grouping == EXACT else observed):
            _backward(chunk, batch, run.training.mtp_loss_scaling_factor)
        gradients[grouping] = {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}
    parallel_state.destroy_model_parallel()
    return rows + [Row(seed, "gradients", layer, grouping, error) for grouping in GROUPINGS
                   for layer, error in layer_errors(gradients[grouping], gradients[EXACT]).items()]


def layer_errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of all gradients of each layer, by "layer N", "mtp" and "embedding"."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, expected in exact.items():
        layer = re.search(r"decoder\.layers\.(\d+)\.", name)
        other = next((part for part in ("mtp", "embedding") if part in name), None)
        key = f"layer {layer.group(1)}" if layer else other
        if key is not None:
            squares[key][0] += (got[name] - expected).double().square().sum().item()
            squares[key][1] += expected.double().square().sum().item()
    return {key: (error / total) ** 0.5 for key, (error, total) in squares.items() if total}


def _weights(chunk: torch.nn.Module) -> dict[int, str]:
    """Names of the FP8 modules' weights by the id that the product sees."""
    from dsv3_megatron.model.experts import GroupedExperts
    from dsv3_megatron.model.fp8_modules import fp8_modules

    names: dict[int, str] = {}
    for placed in fp8_modules(getattr(chunk, "module", chunk)):
        module: Any = placed.module
        if isinstance(module, GroupedExperts):
            names[id(module.linear_fc1.weight)] = placed.name
            names[id(module.linear_fc2.weight)] = placed.name.replace("linear_fc1", "linear_fc2")
        else:
            names[id(module.weight)] = placed.name
    return names


def _set_dgrad(chunk: torch.nn.Module, grouping: str) -> None:
    from dsv3_megatron.model.fp8_modules import fp8_modules

    changes = {"dgrad": "bf16"} if grouping == EXACT else {"dgrad": "fp8", "grad_grouping": grouping}
    for placed in fp8_modules(getattr(chunk, "module", chunk)):
        module: Any = placed.module
        if module.fp8 is not None:
            lines, backend = module.fp8
            module.fp8 = tuple(dataclasses.replace(line, **changes) for line in lines), backend


def _backward(chunk: Any, batch: Any, mtp_weight: float) -> None:
    losses = chunk(input_ids=batch.tokens_BS, position_ids=batch.position_ids_BS, attention_mask=None,
                   labels=batch.labels_BS)
    (losses.main_BS.mean() + mtp_weight * sum(loss_BS.mean() for loss_BS in losses.mtp_BS)).backward()


def summary(rows: Sequence[Row]) -> str:
    """Of each kind of weight, over layers and seeds, and of each layer's gradients."""
    lines = ["| Dgrad of | tile: error | token, median | token, 90% | block: error | token, median | token, 90% |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for kind in dict.fromkeys(_kind(row) for row in rows if row.kind == "product"):
        cells = []
        for grouping in GROUPINGS:
            chosen = [row for row in rows if row.kind == "product" and _kind(row) == kind and row.grouping == grouping]
            cells += [f"{statistics.fmean(values):.1%}" for values in (
                [row.error for row in chosen], [row.token_median or 0.0 for row in chosen],
                [row.token_decile or 0.0 for row in chosen])]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "| gradients of | tile | block |", "| --- | ---: | ---: |"]
    for name in dict.fromkeys(row.name for row in rows if row.kind == "gradients"):
        found = (statistics.fmean(row.error for row in rows if row.kind == "gradients" and row.name == name
                                  and row.grouping == grouping) for grouping in GROUPINGS)
        lines.append(f"| {name} | {' | '.join(f'{value:.1%}' for value in found)} |")
    return "\n".join(lines)


def _kind(row: Row) -> str:
    """The weight's name within its layer."""
    return re.sub(r"^.*?(self_attention|mlp|mtp_model_layer)\.", r"\1.", row.name).replace(
        "mtp_model_layer.", "").replace("self_attention.", "")


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        for row in rows:
            writer.writerow(["" if value is None else f"{value:.6g}" if isinstance(value, float) else value
                             for value in dataclasses.astuple(row)])


def draw(rows: Sequence[Row], path: Path, preset: str) -> None:
    """Errors as bars, in tiles and in blocks: over tokens by kind of weight, and of each layer's gradients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained")
    panels = (("Dgrad: 90% of tokens err by less, %", "product", _kind, lambda row: row.token_decile),
              ("gradients at the end of backward: error, %", "gradients", lambda row: row.name, lambda row: row.error))
    for axes, (label, kind, name_of, value_of) in zip(all_axes, panels, strict=True):
        names = list(dict.fromkeys(name_of(row) for row in rows if row.kind == kind))
        for offset, grouping in ((-0.2, "tile"), (0.2, "block")):
            heights = [100 * statistics.fmean(value_of(row) for row in rows if row.kind == kind and name_of(row) == name
                                              and row.grouping == grouping) for name in names]
            axes.barh([index + offset for index in range(len(names))], heights, 0.38, color=_COLOURS[grouping],
                      label=grouping)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(color="#e5e7eb", axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="upper right", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"Output gradients in tiles and in blocks, {preset}", x=0.01, ha="left", fontsize=11,
                    fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the rows and the picture, print the tables."""
    options = experiment_parser((__doc__ or "").split("\n\n")[0]).parse_args(arguments)
    rows = [row for seed in options.seeds for row in measure(common_flags(options), seed)]
    write(rows, options.output.with_suffix(".csv"))
    draw(rows, options.output.with_suffix(".png"), options.preset)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
