"""Every test process uses Megatron-Core as the trainer does: after `prepare()`.

Importing Megatron-Core without it compiles element-wise functions with the C++ compiler, for seconds.
"""

from __future__ import annotations

from dsv3_megatron.platform import prepare

prepare()
