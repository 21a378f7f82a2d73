"""Every test process uses Megatron-Core as the trainer does: after `prepare()`.

Importing Megatron-Core without it compiles element-wise functions with the C++ compiler, for seconds.

Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before anything imports Triton, as
Megatron-Core does.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dsv3_megatron.platform import prepare

prepare()
