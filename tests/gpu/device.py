"""Where the tests of this folder compute: on the GPU, or, to rehearse them, on a CPU at small sizes.

REHEARSE_GPU_TESTS=1 rehearses (`python -m tools.gpu_session --rehearse` sets it): the same tests run where there is no
GPU, with kernels under Triton's interpreter, so that a wrong name or argument is found before a GPU is lent. It says
nothing of what a GPU computes.
"""

from __future__ import annotations

import os

import torch

IS_REHEARSED: bool = os.environ.get("REHEARSE_GPU_TESTS") == "1" and not torch.cuda.is_available()
DEVICE: torch.device = torch.device("cpu") if IS_REHEARSED else torch.device("cuda", 0)
