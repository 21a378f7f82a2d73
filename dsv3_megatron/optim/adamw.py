"""AdamW whose moments are stored in bf16: 4 bytes a parameter, or 6 with one of them in fp32, instead of 8.

The arithmetic is torch's fused AdamW in fp32: a block of moments is widened into a scratch buffer that stays in cache,
updated there together with the fp32 master weight, and rounded back. With fp32 moments the update is torch's bit for
bit; what bf16 changes is the rounding alone, to nearest or stochastic (`rounding.py`).

Rounding to nearest loses a change of less than half a bf16 step, 2^-9 of the value: the second moment stands still
where (1 - beta2) |g^2 / v - 1| is below that. At the report's beta2 = 0.95 it stops within 4 to 8% of its mean, at
0.999 a moment that should fall to zero never moves. Stochastic rounding has neither effect and is the default.

Megatron-Core knows bf16 moments (`exp_avg_dtype`) only with Transformer Engine's FusedAdam, which rounds to nearest.
This one is used for bf16 moments on every device, with or without Transformer Engine; fp32 moments use FusedAdam where
it is installed and torch's fused AdamW elsewhere. On CUDA one kernel updates all weights of a parameter group
(`fused_update.py`; not run there yet), with the same rounding of fp32 results that differ in their last bits.

Source: DeepSeek-V3 report, section 3.3.1: BF16 for the moments, FP32 for master weights and accumulated gradients;
Loshchilov and Hutter 2019, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dsv3_megatron.optim.fused_update import MOMENTS, FusedUpdate, Operands, blocks
from dsv3_megatron.optim.rounding import BLOCK, noise_key, noise_table, round_stochastically
from dsv3_megatron.optim.shards import ParameterShard


class NarrowMomentAdamW(torch.optim.AdamW):
    """AdamW over fp32 weights with each moment in a dtype of its own.

    Args:
        groups: Parameter groups of the optimizer that this one replaces; used, not copied.
        shards: Which elements of which parameters their tensors are: the identity that decides the rounding.
        exp_avg_dtype: Dtype of the first moment, fp32 or bf16.
        exp_avg_sq_dtype: Dtype of the second moment, fp32 or bf16.
        is_stochastic: Round bf16 moments stochastically instead of to nearest.
        seed: Seed of the stochastic rounding.
        is_fused: Update a group by one kernel: True, False, or None: where the weights are on a GPU.
    """

    def __init__(self, groups: list[dict[str, Any]], shards: Iterable[ParameterShard], *, exp_avg_dtype: torch.dtype,
                 exp_avg_sq_dtype: torch.dtype, is_stochastic: bool, seed: int, is_fused: bool | None = None) -> None:
        # The weights of a distributed optimizer may be views with a history, which the constructor would refuse.
        super().__init__([torch.nn.Parameter(torch.zeros(0))], fused=True)
        self.param_groups = groups
        self.dtypes = dict(zip(MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))
        self.is_stochastic, self.seed = is_stochastic, seed
        self._names = {shard.master: shard.names for shard in shards}
        self._scratch: dict[torch.device, _Scratch] = {}
        self.is_fused = is_fused
        self._fused = FusedUpdate(self._names, is_stochastic=is_stochastic, seed=seed)

    def allocate_state(self) -> None:
        """Give every weight without state the state of step 0."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._state_of(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load an optimizer's state; torch gives moments the dtype of their weights, here they get their own back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for moment in MOMENTS:
                if moment in state:
                    state[moment] = state[moment].to(self.dtypes[moment])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("NarrowMomentAdamW takes no closure: compute the gradients before step()")
        for index, group in enumerate(self.param_groups):
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            # Where Megatron-Core looks with Transformer Engine installed; and read from the device once a group.
            group["step"] = int(self._state_of(weights[0])["step"]) + 1
            torch._foreach_add_([self._state_of(weight)["step"] for weight in weights], 1)
            if self.is_fused if self.is_fused is not None else weights[0].is_cuda:
                self._fused.update(index, [self._operands(weight) for weight in weights], group)
            else:
                for weight in weights:
                    self._update(weight, group)

    def _state_of(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state |= {moment: torch.zeros_like(weight, dtype=dtype) for moment, dtype in self.dtypes.items()}
        return state

    def _operands(self, weight: torch.Tensor) -> Operands:
        state, gradient = self._state_of(weight), weight.grad
        assert gradient is not None
        return Operands(weight, gradient.contiguous(), (state[MOMENTS[0]], state[MOMENTS[1]]))

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(weight)
        if weight.device not in self._scratch:
            self._scratch[weight.device] = _Scratch(weight.device, self.is_stochastic)
        scratch = self._scratch[weight.device]
        beta1, beta2 = group["betas"]
        gradient = weight.grad
        assert gradient is not None
        for named in self._names[weight]:
            for block, offset, part in blocks(named):
                wide = [scratch.widen(moment, state[moment][part]) for moment in MOMENTS]
                torch._fused_adamw_(
                    [weight[part]], [gradient[part]], wide[:1], wide[1:], [], [state["step"]], lr=group["lr"],
                    beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                    maximize=False)
                for moment, values in zip(MOMENTS, wide, strict=True):
                    stored = state[moment][part]
                    if stored.dtype == torch.float32:
                        continue  # updated in place
                    if self.is_stochastic:
                        key = noise_key(self.seed, f"{named.name}.{moment}", group["step"], block)
                        round_stochastically(values, scratch.noise(moment, key, offset, stored.numel()), stored)
                    else:
                        stored.copy_(values)


class _Scratch:
    """Buffers of one block on one device: wide moments and noise."""

    def __init__(self, device: torch.device, is_stochastic: bool) -> None:
        self.moments = {moment: torch.empty(BLOCK, device=device) for moment in MOMENTS}
        self.tables, self.bits = {}, torch.empty(BLOCK if is_stochastic else 0, dtype=torch.int32, device=device)
        if is_stochastic:
            self.tables = {moment: noise_table(salt, device) for salt, moment in enumerate(MOMENTS)}

    def widen(self, moment: str, stored: torch.Tensor) -> torch.Tensor:
        """A stored moment in fp32: itself, or a copy in the buffer."""
        return stored if stored.dtype == torch.float32 else self.moments[moment][:stored.numel()].copy_(stored)

    def noise(self, moment: str, key: int, offset: int, count: int) -> torch.Tensor:
        """The random bits of `count` elements from `offset` of a block on."""
        return torch.bitwise_xor(self.tables[moment][offset:offset + count], key, out=self.bits[:count])


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that it makes at its first step; other optimizers make theirs when it is loaded."""
    if isinstance(optimizer, NarrowMomentAdamW):
        optimizer.allocate_state()
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not optimizer.state[weight]:
                on_device = group.get("fused") or group.get("capturable")
                optimizer.state[weight] = {
                    "step": torch.tensor(0.0, device=weight.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight)}
