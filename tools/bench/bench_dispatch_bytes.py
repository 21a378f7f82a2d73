"""Bytes that a token is on the network and within nodes: once for each node, against a row for each expert.

DeepSeek-V3's routing, 8 of 256 experts in 4 of 8 groups, on 64 ranks of 8 nodes. Tokens are chosen for by the router's
own function: from even affinities, and from skewed ones, in which experts are preferred so that the busiest has several
times the mean load. Each token is walked over its nodes and ranks. Beside it stands what the planner expects, from
other tokens, of which no expert is preferred:

    network    node: d(8) (1 - 1/8) (7,392 + 48)      alltoall: 8 (1 - 1/8) (7,392 + 16)
    in nodes   node: d(64) (1 - 1/8) (7,392 + 48)     alltoall: 8 (1/8 - 1/64) (7,392 + 16)

with d(P) the mean number of P equal parts of the experts that a token goes to. Home go rows in BF16 likewise.

Usage:
    python -m tools.bench.bench_dispatch_bytes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows  # noqa: E402

NODES, RANKS_PER_NODE = 8, 8


def choices(skew: float, tokens: int) -> tuple[object, float]:
    """Experts of tokens [T, K], and the load of the busiest expert over the mean.

    Args:
        skew: Standard deviation of what is added to an expert's logits, for all tokens; 0: even.
        tokens: Number of tokens.
    """
    import torch

    from dsv3_megatron.config.presets import preset
    from dsv3_megatron.model.router import choose_experts

    model = preset("dsv3-671b").model
    generator = torch.Generator().manual_seed(1)
    preferred_E = skew * torch.randn(model.num_experts, generator=generator)
    scores_TE = torch.sigmoid(torch.randn(tokens, model.num_experts, generator=generator) + preferred_E)
    ids_TK = choose_experts(scores_TE, torch.zeros(model.num_experts), top_k=model.moe_router_topk,
                            num_groups=model.moe_router_num_groups, group_top_k=model.moe_router_group_topk)
    load_E = torch.bincount(ids_TK.flatten(), minlength=model.num_experts)
    return ids_TK, float(load_E.max() / load_E.float().mean())


def walked(ids_TK: object) -> dict[str, tuple[float, float]]:
    """Rows of a token over the network and within nodes, by dispatcher: the mean over tokens and over their ranks."""
    import torch

    from dsv3_megatron.config.presets import preset

    assert isinstance(ids_TK, torch.Tensor)
    ranks = NODES * RANKS_PER_NODE
    rank_TK = ids_TK * ranks // preset("dsv3-671b").model.num_experts
    at_TNL = torch.zeros(len(ids_TK), ranks, dtype=torch.bool).scatter_(1, rank_TK, True)
    at_TNL = at_TNL.view(-1, NODES, RANKS_PER_NODE)
    sums = {"node": [0.0, 0.0], "alltoall": [0.0, 0.0]}
    for own in range(ranks):
        node, place = divmod(own, RANKS_PER_NODE)
        goes_TN = at_TNL.any(-1)
        beside_T = at_TNL.sum((1, 2)) - at_TNL[:, :, place].sum(1)
        sums["node"][0] += float(goes_TN.sum() - goes_TN[:, node].sum())
        sums["node"][1] += float(beside_T.sum())
        away_TK = rank_TK // RANKS_PER_NODE != node
        sums["alltoall"][0] += float(away_TK.sum())
        sums["alltoall"][1] += float((~away_TK & (rank_TK != own)).sum())
    count = ranks * len(ids_TK)
    return {way: (network / count, within / count) for way, (network, within) in sums.items()}


def report(tokens: int) -> list[Measurement]:
    """Print tables; return their numbers."""
    from dsv3_megatron.config.presets import preset
    from dsv3_megatron.ops.row_bytes import record_bytes
    from dsv3_megatron.planning.time.dispatch_bytes import Carried, bytes_of_row, destinations

    model = preset("dsv3-671b").model
    found: dict[str, dict[str, tuple[float, float]]] = {"expected": {}}
    for way in ("node", "alltoall"):
        expected = destinations(model, way, NODES, RANKS_PER_NODE)
        found["expected"][way] = (expected.network, expected.node)
    loads = {"expected": 1.0}
    for name, skew in (("even", 0.0), ("skewed", 0.5), ("very skewed", 1.5)):
        ids_TK, loads[name] = choices(skew, tokens)
        found[name] = walked(ids_TK)
    rows = []
    for name, ways in found.items():
        config = f"V3 routing, EP64 on 8 nodes, {name}"
        measured: dict[str, tuple[float, str]] = {"busiest_expert_to_mean": (loads[name], "1")}
        for way, rows_of in ways.items():
            out = bytes_of_row(way, record_bytes(model.hidden_size), Carried.ROUTING, model.moe_router_topk)
            for link, value in zip(("network", "within_nodes"), rows_of, strict=True):
                measured[f"{way}_rows_{link}"] = (value, "1")
                measured[f"{way}_dispatch_bytes_{link}"] = (value * out, "B")
                measured[f"{way}_combine_bytes_{link}"] = (value * 2 * model.hidden_size, "B")
        once, each = (measured[f"{way}_dispatch_bytes_network"][0] for way in ("node", "alltoall"))
        measured["network_bytes_node_to_alltoall"] = (once / each, "1")
        print(f"{config}: busiest expert {loads[name]:.1f}x the mean; network {once:,.0f} of {each:,.0f} B a token "
              f"({once / each:.3f}); rows "
              + ", ".join(f"{way} {a:.2f} and {b:.2f}" for way, (a, b) in ways.items()))
        rows += [Measurement("dispatch_bytes", config, metric, value, unit)
                 for metric, (value, unit) in measured.items()]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the count."""
    parser = argparse.ArgumentParser(description="Bytes of DeepSeek-V3's dispatch over the network and within nodes.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    from dsv3_megatron.platform import prepare

    prepare()
    rows = report(options.tokens)
    if not options.no_csv:
        path = append_rows("dispatch_bytes.csv", rows, "counted")
        print(f"appended to {path.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
