"""The memory of each pipeline rank: a pass over a stage is written down tensor by tensor, and the schedule adds passes.

Nothing is imported here. In reading order:

    estimate.py       RankMemory, estimate_memory       settings.py          what decides about sizes
    ledger.py         lifetimes of named tensors        operation_passes.py  norms, products, attention
    split_attention.py  attention to split sequences    layer_passes.py      attention, dense layers, routing
    moe.py            layers with experts
    expert_passes.py  the experts                       swiglu_passes.py     SwiGLU whose input is kept in FP8
    ends.py           embedding, MTP, head and losses
    stage_cost.py     a stage's passes                  moments.py           passes in a schedule's order
    buffers.py        tables, counts, weights in FP8    headroom.py          what a device leaves to a run
    remedies.py       what would lower the fullest rank
"""
