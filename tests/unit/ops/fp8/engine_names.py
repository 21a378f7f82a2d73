"""Stand-ins for the classes of a recipe of Transformer Engine."""

import dataclasses
from enum import Enum


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


@dataclasses.dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)
