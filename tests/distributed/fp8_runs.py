"""What a few ranks do for the tests of FP8 over layouts: train a few steps, count the bytes they exchange, resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from dsv3_megatron.model.fp8_modules import fp8_modules
from tests.distributed.small_run import differences, small_run, start
from tests.distributed.test_checkpoint import continue_run


def train(changes: dict[str, Any], steps: int) -> tuple[list[float], dict[str, int], list[str]]:
    """Losses of the first steps, bytes sent in all-to-alls by dtype, and the names of modules with FP8 lines."""
    sent: Counter[str] = Counter()
    original = torch.distributed.all_to_all_single

    def counting(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[str(input.dtype)] += input.nbytes
        return original(output, input, *args, **kwargs)

    training = start(small_run(**changes))
    names = [placed.name for chunk in training.chunks for placed in fp8_modules(chunk.module)
             if getattr(placed.module, "fp8", None) is not None]
    torch.distributed.all_to_all_single = counting
    try:
        return [training.step(number) for number in range(steps)], dict(sent), names
    finally:
        torch.distributed.all_to_all_single = original


def several(cases: dict[str, dict[str, Any]], steps: int, resumed_changes: dict[str, Any] | None, directory: Path
            ) -> dict[str, Any]:
    """`train` for each case, and `resumed` as "resumed" if there are changes for it, in one launch of the ranks."""
    results: dict[str, Any] = {}
    for name, changes in cases.items():
        results[name] = train(changes, steps)
        parallel_state.destroy_model_parallel()
    if resumed_changes is not None:
        results["resumed"] = resumed(resumed_changes, directory)
    return results


def resumed(changes: dict[str, Any], directory: Path) -> tuple[list[str], list[float], list[float]]:
    """Train two steps, save, train another; and again from what was saved. What differs then, and both last losses."""
    straight = continue_run(changes, None, directory, 1)
    parallel_state.destroy_model_parallel()
    again = continue_run(changes, directory, None, 1)
    parallel_state.destroy_model_parallel()
    # NaN stands for what another rank has.
    known = [{name: tensor.nan_to_num(nan=-7.0) for name, tensor in result["after"].items()}
             for result in (straight, again)]
    return differences(*known), straight["losses"], again["losses"]
