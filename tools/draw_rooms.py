"""Draws docs/understanding/architecture.svg: the packages in the order in which they may import one another.

Usage: python tools/draw_rooms.py > docs/understanding/architecture.svg
"""

from __future__ import annotations

import html

from dsv3_megatron.config.streams import run_command

# A row's packages do not import each other; each imports those above it. Name, what it is for.
ROWS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("config", "settings of a run, and their rules"),),
    (("process", "signals, torchrun's variables, cores"),),
    (("platform", "device; Megatron-Core without CUDA"),),
    (("kernels", "Triton sources for FP8"),),
    (("ops", "one operation a file, with its reference"),),
    (("data", "text to tokens on disk to batches"),),
    (("parallel", "who holds what; groups; exchanges"),),
    (("model", "modules of one stage; a stage in pieces"),),
    (("schedule", "what a pipeline rank runs when"),),
    (("optim", "AdamW, moving average, router bias"),),
    (("checkpoint", "save, load, Hugging Face"), ("metrics", "what a run measures about itself")),
    (("generation", "text from a model"), ("reports", "what is drawn or told of a run")),
    (("planning", "time and memory, before a run"),),
    (("guards", "what watches over a run"),),
    (("runs", "the training loop; where all rooms meet"),),
    (("post_training", "a model that learns from its own answers"),),
    (("rehearsal", "ranks of a GPU run without a GPU"),),
    (("certification", "a layout against one process"),),
    (("papers", "what papers say, and what is given here"),),
    (("commands", "one module a command of dsv3"),),
)
WIDTH, BOX, GAP, MARGIN = 760, 34, 10, 16


def draw() -> str:
    """The picture as SVG, on a background of its own, so that it can be read in a dark theme too."""
    height = 2 * MARGIN + len(ROWS) * (BOX + GAP) - GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="14" role="img">',
        "<title>The packages of dsv3_megatron; each one imports only those above it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<path d="M {MARGIN + 8} {height - MARGIN} V {MARGIN + 10}" stroke="#5b6b7b" stroke-width="2"/>',
        f'<path d="M {MARGIN + 2} {MARGIN + 12} l 6 -12 l 6 12 z" fill="#5b6b7b"/>',
        f'<text transform="translate({MARGIN + 30} {height // 2}) rotate(-90)" text-anchor="middle" fill="#5b6b7b">'
        "may import</text>",
    ]
    left = MARGIN + 48
    for number, row in enumerate(ROWS):
        width = (WIDTH - MARGIN - left - (len(row) - 1) * GAP) / len(row)
        for place, (name, purpose) in enumerate(row):
            x, y = left + place * (width + GAP), MARGIN + number * (BOX + GAP)
            lines += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{BOX}" rx="5" fill="#eef3f8" stroke="#2f5f8f"/>',
                f'<text x="{x + 12:g}" y="{y + 22}" fill="#12324f"><tspan font-weight="bold">{name}</tspan>'
                f'<tspan dx="10" font-size="13">{html.escape(purpose)}</tspan></text>',
            ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Print the drawing."""
    print(draw(), end="")
    return 0


if __name__ == "__main__":
    run_command(main)
