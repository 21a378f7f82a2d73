"""Pretraining of DeepSeek-V3-style models on Megatron-Core: from raw text to weights.

In a notebook `dsv3_megatron.Model` is a whole model in this process: logits, losses, training steps, texts.

    import dsv3_megatron as dsv3

    model = dsv3.Model.from_preset("tiny", vocab_size=2048)
    print(model.logits([[1, 2, 3]]).shape, model.train_step([[1, 2, 3, 4]]).loss)

The packages in the order in which they build on each other; each may use those before it, never those after it:

    config/       what a run is, as checked dataclasses         process/     signals, ranks, cores; no torch
    platform/     the device, and stand-ins without CUDA        kernels/     Triton kernels
    ops/          mathematics on tensors, each with a reference
    data/         text -> tokens on disk -> batches             parallel/    groups, layouts, exchanges of rows
    model/        modules of one pipeline stage                 schedule/    what a pipeline rank computes when
    optim/        AdamW, master weights, routers' biases
    checkpoint/   saving, loading, Hugging Face's layout        metrics/     counts and measurements
    generation/   text from a model                             reports/     tables, pictures and pages of a run
    planning/     time and memory before a run                  guards/      bad steps, hangs, folders of a run
    runs/         the training loop, where all rooms meet       rehearsal/   ranks of a GPU run without a GPU
    post_training/  a model that learns from answers of its own
    certification/  that a layout computes what one process does
    papers/       what papers say of DeepSeek-V3, and what is given here
    commands/     one module a command of `dsv3`

`__main__.py` is the command `dsv3` for `python -m` and torchrun. Begin to read at runs/trainer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# An installation has the kernels inside the package. In a checkout they are beside it (setup.py says why), and a
# checkout that is put on Python's path shall find its own, also where another one is installed.
if (_checkout := Path(__file__).resolve().parents[1]).joinpath("kernels", "fp8_gemm.py").is_file():
    __path__.append(str(_checkout))

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.version import __version__

if TYPE_CHECKING:
    from dsv3_megatron.runs.notebook import Model

__all__ = ["ConfigError", "Model", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Model`, and torch with it, when it is first asked for: `import dsv3_megatron` alone stays cheap."""
    if name != "Model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsv3_megatron.runs.rank import prepare_rank

    prepare_rank()  # before anything imports Megatron-Core
    from dsv3_megatron.runs.notebook import Model

    globals()["Model"] = Model
    return Model


def __dir__() -> list[str]:
    """The names of the package, `Model` among them before it is imported."""
    return sorted({*globals(), *__all__})
