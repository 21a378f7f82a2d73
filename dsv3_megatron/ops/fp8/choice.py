"""Which FP8 backend a run gets, from what it asked for and what the machine has."""

from __future__ import annotations

import logging

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.precision import FP8_BACKENDS
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend

logger = logging.getLogger(__name__)

# Hopper is the first with FP8 matrix units that this scaling is made for; Blackwell's scale in groups of 32.
NEEDED_CAPABILITY = (9, 0)


def resolve_fp8_backend(requested: str, *, transformer_impl: str, accumulation: str = "fp32") -> str:
    """Turn "auto" into a backend by what is there, or check that the one asked for can run; log a choice.

    Args:
        requested: "auto", "transformer_engine", "triton" or "reference".
        transformer_impl: The modules that the model is built from, resolved: "local" or "transformer_engine".
        accumulation: How the run's products are summed; a model of it, other than "fp32", is the reference's alone.

    Returns:
        "transformer_engine", "triton" or "reference".

    Raises:
        ConfigError: What was asked for cannot run here; the message says what is missing. "auto" does not fall back to
            the reference on a GPU: who asks for FP8 there asks for speed.
    """
    if requested not in FP8_BACKENDS:
        raise ConfigError(f"fp8_backend={requested!r} must be one of {', '.join(FP8_BACKENDS)}")
    if transformer_impl == "transformer_engine" and requested in ("triton", "reference"):
        raise ConfigError(f"fp8_backend={requested} computes in local modules, and this run is built from Transformer "
                          "Engine's; set transformer_impl=local")
    missing = _missing_for_triton()
    if requested == "triton" and missing:
        raise ConfigError(f"fp8_backend=triton needs what is not here: {' and '.join(missing)}; use "
                          "fp8_backend=reference, which computes the same numbers slowly on any device")
    if requested == "transformer_engine" and transformer_impl != "transformer_engine":
        raise ConfigError("fp8_backend=transformer_engine needs modules from Transformer Engine, and this run is built "
                          "from local ones; set transformer_impl=transformer_engine on a machine that has it")
    if requested != "auto":
        return requested
    if transformer_impl == "transformer_engine":
        chosen, reason = "transformer_engine", "the model is built from it"
    elif accumulation != "fp32":
        chosen, reason = "reference", f"fp8_accumulation={accumulation}"
    elif missing and torch.cuda.is_available():
        raise ConfigError(f"fp8=blockwise on {torch.cuda.get_device_name()} needs what is not here: "
                          f"{' and '.join(missing)}; set fp8=none, or fp8_backend=reference, which computes the same "
                          "numbers slowly on any device")
    else:
        chosen, reason = ("reference", f"no {' and no '.join(missing)}") if missing else ("triton", "Hopper")
    logger.info("fp8_backend auto: %s (%s)", chosen, reason)
    return chosen


def local_backend(name: str) -> ReferenceBackend:
    """The implementation of "reference" or "triton"."""
    if name == "reference":
        return REFERENCE
    assert name == "triton", name
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    return TritonBackend()


def packing_backend() -> ReferenceBackend:
    """What packs rows into FP8 records on this device, where nothing else of a run need be in FP8."""
    return local_backend("reference" if _missing_for_triton() else "triton")


def _missing_for_triton() -> list[str]:
    missing = [] if is_installed("triton") else ["triton package"]
    if not torch.cuda.is_available():
        return [*missing, "CUDA device"]
    capability = torch.cuda.get_device_capability()
    if capability[0] != NEEDED_CAPABILITY[0]:
        missing.append(f"compute capability 9.x (Hopper; this is {capability[0]}.{capability[1]})")
    return missing
