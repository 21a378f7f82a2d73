"""How a run is spread over processes: which rank holds what, who talks to whom, and rows that go between them.

In reading order:

    layout.py         layers -> pipeline stages; no torch
    placement.py      stages -> pipeline ranks; no torch
    roll_call.py      processes meet before torch.distributed starts
    communicators.py  one group for a set of ranks, made by those alone
    multiprocessors.py  which of a GPU's are for communication
    groups.py         the process groups of a run
    sequence_parts.py how a sequence is split: the one place that knows
    exchange.py       rows between ranks while something else is computed
    gated_rows.py     rows with their gates behind them
    narrow_rows.py    rows that travel in FP8
    expert_nodes.py   which of the experts' ranks share a node
    hops.py           two transfers as one
    route.py          how many rows go where, once for each node and rank
    node_journey.py   tokens to their experts by way of their nodes, and sums home
    narrow_latents.py latents that travel in FP8
    latent_ring.py    attention to tokens of other ranks, whose latents are passed on
    head_exchange.py  heads against tokens
    chunk_runner.py   what a pipeline asks of a stage, whose steps take turns
"""
