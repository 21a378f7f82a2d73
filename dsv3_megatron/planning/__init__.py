"""What a run will need before it starts: plain arithmetic on its configuration, no torch.

Nothing is imported here. Memory of each pipeline rank:

    memory.py           RankMemory, estimate_memory           memory_state.py     parameters, gradients, optimizer
    memory_ledger.py    lifetimes of named tensors            memory_settings.py  what decides about sizes
    memory_layers.py    a layer's passes on a ledger          memory_ends.py      embedding, MTP, head and losses
    memory_schedule.py  passes in a schedule's order          memory_remedies.py  what would lower the worst rank's
"""
