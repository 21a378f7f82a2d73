"""How far two tensors are from each other, and the gradients of a model by global name."""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.model.global_names import whole_parameters

# Both sides compute in float64 (unit rounding 1.1e-16), with sums of at most some thousands of terms in another order.
# Largest seen: 2e-15 in outputs, 2e-13 in gradients, of routers whose terms nearly cancel. A difference of convention
# shows from about 1e-6 on.
FLOAT64_TOLERANCE = 1e-11


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude; absolute where all that is expected is 0."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    largest = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    return difference / largest if largest > 0 else difference


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = FLOAT64_TOLERANCE) -> None:
    """`relative_error` within the tolerance; a NaN is outside."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} exceeds {tolerance:.3g}"


def gradients_by_name(model: torch.nn.Module, groups: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The gradient of each parameter below `prefix`, routed experts one by one.

    Raises:
        AssertionError: a parameter got none.
    """
    found = {}
    for whole in whole_parameters(model, groups):
        if whole.name.startswith(prefix):
            gradient = whole.parameter.grad
            assert gradient is not None, f"{whole.name} got no gradient"
            found[whole.name] = gradient if whole.expert is None else gradient[whole.expert]
    assert found, f"no parameter below {prefix!r}"
    return found
