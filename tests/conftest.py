"""Every test process uses Megatron-Core as the trainer does: after `prepare()`.

Importing Megatron-Core without it compiles element-wise functions with the C++ compiler, for seconds.

Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before anything imports Triton, as
Megatron-Core does.

Property tests have no deadline for an example: how long it takes is the machine's affair.

The kernels are those of this checkout, though an editable install finds the ones of the checkout that was installed.

A shell has its jobs in the background ignore SIGINT, and nohup has SIGHUP ignored: so would everything that a test
starts and then signals.

What the package's loggers say is as before after each test: commands that are called in this process set it by rank.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dsv3_megatron.platform import prepare

_kernels = importlib.util.spec_from_file_location(
    "dsv3_megatron.kernels", Path(__file__).resolve().parents[1] / "kernels" / "__init__.py")
assert _kernels is not None and _kernels.loader is not None
sys.modules["dsv3_megatron.kernels"] = importlib.util.module_from_spec(_kernels)
_kernels.loader.exec_module(sys.modules["dsv3_megatron.kernels"])

prepare()

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# On what is there already: where CI is set, Hypothesis takes the same examples each time.
hypothesis.settings.register_profile("untimed", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Keep the level of the package's loggers."""
    logger = logging.getLogger("dsv3_megatron")
    level = logger.level
    yield
    logger.setLevel(level)
