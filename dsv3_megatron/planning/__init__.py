"""What a run will need before it starts: plain arithmetic on its configuration, no torch.

Nothing is imported here. Time and cost:

    hardware.py         a machine as data                     hardware_tables.py  those known by name, with sources
    operations.py       what a linear, a norm does            layer_operations.py what layers and stages do
    network.py          bytes on the wire                     work.py             operations as seconds on a machine
    step_time.py        a step, through schedule/simulate     run_cost.py         phases, days, device-hours, money
    search.py           all layouts, ranked or rejected       report.py           text, JSON, picture
    calibrate.py        a machine fitted to a run's logs      micro_benchmarks.py a CPU measured; needs torch
    narrow_pass.py      what modules take beside it           operand_pools.py    what products are measured on
    precheck.py         will a run find what it needs?        flags.py            settings as flags to paste

Memory of each pipeline rank:

    memory.py             RankMemory, estimate_memory         memory_remedies.py   what would lower the fullest rank
    memory_settings.py    what decides about sizes            memory_buffers.py    tables, counts, weights in FP8
    memory_ledger.py      lifetimes of named tensors
    memory_operations.py  norms, products, attention          memory_layers.py     attention, dense layers, routing
    memory_moe.py         layers with experts                 memory_experts.py    the experts
    memory_ends.py        embedding, MTP, head and losses     memory_stage.py      a stage's passes
    memory_schedule.py    passes in a schedule's order        headroom.py          what a device leaves to a run

What a rank holds between steps is metrics/rank_state.py, which --print-model reads too.
"""
