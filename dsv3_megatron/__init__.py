"""Pretraining of DeepSeek-V3-style models on Megatron-Core: from raw text to weights.

The packages in the order in which they build on each other; each may use those before it, never those after it:

    config/       what a run is, as checked dataclasses         process/     signals, ranks, cores; no torch
    platform/     the device, and stand-ins without CUDA        kernels/     Triton kernels for FP8
    ops/          mathematics on tensors, each with a reference
    data/         text -> tokens on disk -> batches             parallel/    groups, layouts, exchanges of rows
    model/        modules of one pipeline stage                 schedule/    what a pipeline rank computes when
    optim/        AdamW, master weights, routers' biases
    checkpoint/   saving, loading, Hugging Face's layout        metrics/     counts, logs, pictures
    generation/   text from a model                             planning/    time and memory before a run
    guards/       bad steps, hangs, folders of a run

The modules that bring them together: trainer.py (the training loop), train.py (the entry point of a training process),
evaluator.py and evaluate.py (losses of a checkpoint), generate.py (text from one). Begin to read at trainer.py.
"""

__version__ = "0.1.0"
