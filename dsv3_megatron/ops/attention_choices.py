"""Which implementation computes core attention, by the run's setting and what is there. No torch: the planner asks too.

    engine         Transformer Engine's attention                      values of any width
    cudnn          cuDNN's, through torch                              values of any width
    flash3         FlashAttention-3 for Hopper, where installed        values of any width
    flash_padded   torch's FlashAttention, values padded to the keys' width
    sdpa_padded    whatever torch chooses, values padded
    blocked        this library's own, in tiles of queries; for a CPU
    reference      the whole matrix of scores

Of the settings, which are Megatron-LM's, `fused` is engine or cudnn, `flash` is flash3 or flash_padded, `unfused` is
reference, `local` is blocked, and `auto` is the first that is possible of the order above, on a CPU blocked.

None of those for a GPU has been run on one. What cuDNN takes is what its frontend says that the library is built with:
widths up to 128, or keys of 192 with values of 128 from version 9.19 on.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.training import ATTENTION_BACKENDS

_BY_SETTING = {
    "auto": ("engine", "cudnn", "flash3", "sdpa_padded"), "fused": ("engine", "cudnn"),
    "flash": ("flash3", "flash_padded"), "unfused": ("reference",), "local": ("blocked",),
}
PADDED = ("flash_padded", "sdpa_padded")
# Kernels that keep their result for backward, as they give it.
KEEP_RESULT = ("engine", "cudnn", "flash3")
_CUDNN_FOR_192_128 = 91900


@dataclass(frozen=True)
class AttentionCase:
    """What attention is computed of, and on.

    Attributes:
        device: "cpu" or "cuda".
        capability: Compute capability of the GPU.
        value_bytes: Bytes of a number: 2 of bf16 and fp16.
        query_width: Width of a query or key head.
        value_width: Width of a value head.
        has_documents: Attention stops at the ends of documents, which are computed one by one.
        packages: Names of those packages that are installed, of "transformer_engine" and "flash_attn_interface".
        cudnn_version: Version of cuDNN as torch gives it, 92600 for 9.26.0; 0: there is none.
    """

    device: str
    capability: tuple[int, int] = (9, 0)
    value_bytes: int = 2
    query_width: int = 192
    value_width: int = 128
    has_documents: bool = False
    packages: frozenset[str] = frozenset()
    cudnn_version: int = 92600


def choose_attention(setting: str, case: AttentionCase) -> tuple[str, str]:
    """Choose an implementation, and say why the ones before it were not taken.

    Raises:
        ConfigError: The setting does not exist, or nothing that it names is possible here.
    """
    if setting not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention_backend={setting!r} must be one of {', '.join(ATTENTION_BACKENDS)}; try auto")
    if setting == "auto" and case.device == "cpu":
        return "blocked", "cpu"
    refused: list[str] = []
    for name in _BY_SETTING[setting]:
        missing = _missing(name, case)
        if setting == "auto" and not missing and name == "cudnn" and case.has_documents:
            missing = "it would plan anew for each length of a document"
        if not missing:
            return name, "; ".join(refused) or f"{case.device}, heads of {case.query_width} and {case.value_width}"
        refused.append(f"no {name}: {missing}")
    raise ConfigError(f"attention_backend={setting} is not possible for heads of {case.query_width} and "
                      f"{case.value_width} ({'; '.join(refused)}); set attention_backend=auto")


def _missing(name: str, case: AttentionCase) -> str:
    """What an implementation lacks here, or nothing."""
    if name in ("reference", "blocked"):
        return ""
    if case.device != "cuda":
        return "it needs a GPU"
    if name == "sdpa_padded":
        return ""
    if case.value_bytes != 2:
        return f"it takes 16-bit numbers, not {8 * case.value_bytes}-bit"
    widths = (case.query_width, case.value_width)
    return {"engine": _engine, "cudnn": _cudnn, "flash3": _flash3, "flash_padded": _flash_padded}[name](case, widths)


def _engine(case: AttentionCase, _widths: tuple[int, int]) -> str:
    if "transformer_engine" not in case.packages:
        return "transformer_engine is not installed"
    return "documents are computed one by one" if case.has_documents else ""


def _cudnn(case: AttentionCase, widths: tuple[int, int]) -> str:
    if case.capability[0] not in (9, 10):
        return f"compute capability {case.capability[0]}.{case.capability[1]}, not 9.x or 10.x"
    if any(width % 8 for width in widths):
        return "widths must be multiples of 8"
    if max(widths) <= 128:
        return "" if case.cudnn_version else "torch has no cuDNN"
    if widths != (192, 128):
        return "widths above 128 are 192 with 128"
    return "" if case.cudnn_version >= _CUDNN_FOR_192_128 else f"cuDNN {case.cudnn_version} is older than 9.19"


def _flash3(case: AttentionCase, widths: tuple[int, int]) -> str:
    if "flash_attn_interface" not in case.packages:
        return "flash_attn_interface is not installed"
    if case.capability[0] != 9:
        return f"compute capability {case.capability[0]}.{case.capability[1]}, not 9.x"
    return "" if widths[0] == widths[1] <= 256 or widths == (192, 128) else "widths are alike, or 192 with 128"


def _flash_padded(case: AttentionCase, widths: tuple[int, int]) -> str:
    if case.capability[0] < 8:
        return f"compute capability {case.capability[0]}.{case.capability[1]} is below 8.0"
    return "" if max(widths) <= 256 and widths[1] <= widths[0] else "keys are at most 256 wide, and values no wider"
