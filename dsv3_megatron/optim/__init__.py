"""One optimizer step: AdamW on fp32 master weights that are sharded over data-parallel ranks, and what follows it.

In reading order:

    optimizer.py    the optimizer of a run, made
    shards.py       which parts of which parameters this rank updates
    update.py       gradient norm, then the update, with room for a decision between them
    adamw.py        AdamW with moments in bf16
    fused_update.py the same by one launch on a GPU
    rounding.py     fp32 -> bf16, to nearest or stochastically
    router_bias.py  the routers' balancing biases, updated once a step
    ema.py          a moving average of the weights, in CPU memory
"""
