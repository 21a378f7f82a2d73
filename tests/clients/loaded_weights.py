"""What a server must have loaded of an export: its tensors, merged as servers merge them, under the servers' names.

Written from the names alone: a gate's projection lies on top of the up projection, the query's down-projection on top
of the keys' and values', and the experts of a layer are one tensor. Scales of FP8 blocks are merged like the weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from tests.hugging_face import dequantized

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Names:
    """How a server names what it merges.

    Attributes:
        query_and_key: The down-projections of query, keys and values.
        experts: The experts of a layer, behind "mlp.".
        block: The transformer layer of an MTP module, behind the module's own name.
        module: The MTP module: {} stands for its layer's number.
        draft_head: The head of the draft, "" if it has none of the export's.
        draft_embedding: The embedding of the draft, "" if it has none of the export's.
    """

    query_and_key: str
    experts: str
    block: str
    module: str
    draft_head: str
    draft_embedding: str


VLLM_NAMES = Names("fused_qkv_a_proj", "experts.routed_experts", "mtp_block.", "model.layers.{}.",
                   "model.layers.{}.shared_head.head.weight", "model.embed_tokens.weight")
SGLANG_NAMES = Names("fused_qkv_a_proj_with_mqa", "experts", "decoder.", "model.", "", "")
# Of an MTP module, what is not a part of its transformer layer.
AROUND_THE_BLOCK = re.compile(r"(enorm|hnorm|eh_proj|shared_head\.norm|shared_head\.head|embed_tokens)\.")


def merged(weights: Tensors, names: Names) -> dict[str, torch.Tensor]:
    """The tensors of layers, under a server's names."""
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in weights.items():
        if match := re.fullmatch(r"(.+\.mlp\.)experts\.(\d+)\.(gate|down)_proj\.(\w+)", name):
            layer, number, kind, what = match.groups()
            if kind == "gate":
                value = torch.cat([value, weights[name.replace("gate_proj", "up_proj")]])
            key = f"{layer}{names.experts}.{'w13' if kind == 'gate' else 'w2'}_{what}"
            experts.setdefault(key, {})[int(number)] = value
        elif ".up_proj." in name:
            continue  # with its gate
        elif ".gate_proj." in name:
            result[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [value, weights[name.replace("gate_proj", "up_proj")]])
        elif ".q_a_proj." in name:
            result[name.replace("q_a_proj", names.query_and_key)] = torch.cat(
                [value, weights[name.replace("q_a_proj", "kv_a_proj_with_mqa")]])
        elif ".kv_a_proj_with_mqa." in name and name.replace("kv_a_proj_with_mqa", "q_a_proj") in weights:
            continue  # with the query's
        else:
            result[name] = value
    for key, tensors in experts.items():
        result[key] = torch.stack([tensors[number] for number in range(len(tensors))])
    return result


def of_the_model(weights: Tensors, num_layers: int, names: Names) -> dict[str, torch.Tensor]:
    """What the model must have: everything but the MTP modules."""
    return merged({name: value for name, value in weights.items() if _layer(name) < num_layers}, names)


def of_the_draft(weights: Tensors, num_layers: int, names: Names) -> dict[str, torch.Tensor]:
    """What the draft must have: the MTP modules, and of their embedding and head what the server takes."""
    own: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        layer = _layer(name)
        if layer < num_layers:
            continue
        rest, module = name.removeprefix(f"model.layers.{layer}."), names.module.format(layer)
        if rest == "embed_tokens.weight":
            if names.draft_embedding and layer == num_layers:
                own[names.draft_embedding] = value
        elif rest == "shared_head.head.weight":
            if names.draft_head:
                own[names.draft_head.format(layer)] = value
        else:
            own[module + ("" if AROUND_THE_BLOCK.match(rest) else names.block) + rest] = value
    return merged(own, names)


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 for one of no layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def values(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What a server's tensors stand for: FP8 times the scale of its block of 128 x 128, experts one by one."""
    flat, num_experts = dict(tensors), {}
    for name, value in tensors.items():
        if value.dim() == 3:
            num_experts[name] = len(flat.pop(name))
            flat |= {f"{number}/{name}": expert for number, expert in enumerate(value)}
    flat = dequantized(flat, torch.float32)
    for name in num_experts:
        if f"0/{name}" in flat:  # no scale
            flat[name] = torch.stack([flat.pop(f"{number}/{name}") for number in range(num_experts[name])])
    return flat


def differences(loaded: Tensors, expected: Tensors, not_of_an_export: Collection[str] = ()) -> list[str]:
    """Every name that only one of them has, and every tensor that is not equal in shape and value.

    Args:
        loaded: The parameters of a server. Its vocabulary may be filled up; rows beyond the export's are nobody's.
        expected: The tensors that it should have.
        not_of_an_export: Ends of names that a server has for itself.
    """
    found = [f"{name}: not loaded" for name in expected if name not in loaded]
    found += [f"{name}: not of the export" for name in loaded
              if name not in expected and not name.endswith(tuple(not_of_an_export))]
    for name in expected.keys() & loaded.keys():
        mine, theirs = expected[name], loaded[name]
        if name.endswith(("embed_tokens.weight", "head.weight")):
            theirs = theirs[:len(mine)]
        if mine.shape != theirs.shape:
            found.append(f"{name}: {list(theirs.shape)}, not {list(mine.shape)}")
        elif not torch.equal(mine.to(theirs.dtype).float(), theirs.float()):
            found.append(f"{name}: other values")
    return sorted(found)
