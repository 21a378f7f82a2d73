"""The tables of docs/understanding/names.md: how each weight is called here, in a checkpoint and by Hugging Face.

Usage: python tools/weight_names.py docs/understanding/names.md     writes the page anew, with the code's tables
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, checkpoint_place, tensors_by_parameter
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.streams import run_command

# Headings, and which of the weights that are left stand below them. The kinds of layers come once each.
_PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Embedding, final norm and head", lambda name: ".layers." not in name),
    ("Attention and norms of a layer", lambda name: ".mlp." not in name and not name.startswith("mtp.")),
    ("FFN of a dense layer", lambda name: ".layers.0.mlp." in name and not name.startswith("mtp.")),
    ("An MoE layer", lambda name: ".mlp." in name and not name.startswith("mtp.")),
    ("An MTP module", lambda name: name.startswith("mtp.") and ".mtp_model_layer." not in name),
    ("The layer of an MTP module, here one weight of it", lambda name: "self_attention.linear_proj" in name),
)


def tables(model: ModelConfig) -> str:
    """One table a part of the model, in the order of the forward pass; layers, experts and depths as letters.

    Args:
        model: With a dense layer, an MoE layer and an MTP module.
    """
    left = {name: tensors for name, tensors in tensors_by_parameter(model).items() if _is_shown(name, model)}
    lines: list[str] = []
    for heading, is_part in _PARTS:
        names = [name for name in left if is_part(name)]
        lines += [f"### {heading}", "", "| Global name | Key in a checkpoint | Hugging Face | Shape there |",
                  "|---|---|---|---|"]
        lines += [_row(name, left.pop(name), model) for name in names]
        lines.append("")
    assert all(name.startswith("mtp.layers.0.mtp_model_layer.") for name in left), f"weights without a table: {left}"
    return "\n".join(lines)


def _is_shown(name: str, model: ModelConfig) -> bool:
    """Whether it is of the layer, the expert and the depth that stand for the others of their kind."""
    layer = re.match(r"decoder\.layers\.(\d+)\.(mlp\.)?", name)
    shown = (0, model.num_dense_layers) if layer and layer[2] else (0,)
    return ((layer is None or int(layer[1]) in shown) and not re.search(r"\.experts\.[1-9]", name)
            and not re.match(r"mtp\.layers\.[1-9]", name))


def _row(name: str, tensors: Iterable[HuggingFaceTensor], model: ModelConfig) -> str:
    key, index = checkpoint_place(name)
    theirs = [(tensor.name, " x ".join(map(str, tensor.shape))) for tensor in tensors]
    cells = (f"`{_letters(name, model)}`", f"`{_letters(key, model)}`" + (", entry e" if index is not None else ""),
             "<br>above<br>".join(f"`{_letters(each, model)}`" for each, _ in theirs),
             "<br><br>".join(dict.fromkeys(shape for _, shape in theirs)))
    return "| " + " | ".join(cells) + " |"


def _letters(name: str, model: ModelConfig) -> str:
    name = re.sub(r"^mtp\.layers\.\d+", "mtp.layers.k", name)
    name = re.sub(rf"^model\.layers\.{model.num_layers}\.", "model.layers.N+k.", name)
    name = re.sub(r"^((?:decoder|model)\.layers)\.\d+", r"\1.n", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.e.", name)


def renew(page: str) -> str:
    """The page with the code's tables between its two marks."""
    begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{tables(preset('dsv3-671b').model)}\n{end}{rest.split(end)[1]}"


def main() -> int:
    """Write the page that is named anew."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("error: give the page to write anew, docs/understanding/names.md", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
