"""Pretraining of DeepSeek-V3-style models on Megatron-Core: from raw text to weights.

The packages in the order in which they build on each other; each may use those before it, never those after it:

    config/       what a run is, as checked dataclasses         process/     signals, ranks, cores; no torch
    platform/     the device, and stand-ins without CUDA        kernels/     Triton kernels for FP8
    ops/          mathematics on tensors, each with a reference
    data/         text -> tokens on disk -> batches             parallel/    groups, layouts, exchanges of rows
    model/        modules of one pipeline stage                 schedule/    what a pipeline rank computes when
    optim/        AdamW, master weights, routers' biases
    checkpoint/   saving, loading, Hugging Face's layout        metrics/     counts and measurements
    generation/   text from a model                             reports/     tables, pictures and pages of a run
    planning/     time and memory before a run                  guards/      bad steps, hangs, folders of a run
    runs/         the training loop, where all rooms meet       commands/    one module a command of `dsv3`

`__main__.py` is the command `dsv3` for `python -m` and torchrun. Begin to read at runs/trainer.py.
"""

__version__ = "0.1.0"
