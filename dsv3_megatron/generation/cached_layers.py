"""A layer's weights, and the layer over rows of tokens, with the attention between its projections left to the caller.

Megatron-Core's layers cannot be handed a cache, its dispatcher moves tokens between ranks that one process does not
have, and at a few rows a step, where a product takes 50 microseconds, the calls of its modules take about a tenth of a
step (`laptop`, one row, one thread of an AMD EPYC). So the parts of a layer are run here from their weights, in the
layer's order. The weights are the modules' own parameters and views of them: nothing is copied, and what is loaded into
the modules later is seen here.

Under tensor parallelism every rank calls with the same rows. It has its heads, its features of an FFN and all experts,
and what the ranks' parts of a product add up to is summed as in training.

Everything is inference: gradients are off.

Shapes: T tokens (rows), H hidden, N heads, D query width, X its part without rotation, P rotated pairs, Z latent width,
W = Z + 2P a position's entry, U value width; K experts per token, R = T K routed rows, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.model.norm import RMSNorm
from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype
from dsv3_megatron.ops.experts import few_rows_experts, swiglu_experts
from dsv3_megatron.ops.linear import linear_forward, multiply_rows
from dsv3_megatron.ops.rms_norm import rms_norm
from dsv3_megatron.ops.rope import rotate_tail_
from dsv3_megatron.ops.swiglu import swiglu

# x [T, in], weight [out, in] -> [T, out].
ProductFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def product_like(weight: torch.Tensor) -> ProductFunction:
    """How rows are multiplied by weights of this dtype and device."""
    if choose_product_backend("auto", weight.device, weight.dtype) == "via_fp32":
        return linear_forward
    return multiply_rows


def multiply_at_least(multiply: ProductFunction, x_TI: torch.Tensor, weight: torch.Tensor, least_rows: int
                      ) -> torch.Tensor:
    """Multiply rows [T, in] by a weight [out, in], with zeros behind them where they are fewer than `least_rows`."""
    num_rows = len(x_TI)
    if num_rows < least_rows:
        x_TI = torch.nn.functional.pad(x_TI, (0, 0, 0, least_rows - num_rows))
    return multiply(x_TI, weight)[:num_rows]


def summing_product(module: Any) -> ProductFunction:
    """How rows are multiplied by a row-parallel layer's weight: over its ranks' parts of the input's features.

    Args:
        module: The layer.
    """
    multiply, group = product_like(module.weight), module.tp_group
    if group.size() == 1:
        return multiply

    def multiply_and_sum(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        part = multiply(x, weight)
        torch.distributed.all_reduce(part, group=group)
        return part

    return multiply_and_sum


class Norm:
    """RMSNorm of a module, by the function that training calls: another order of its few steps would round otherwise in
    one row of some thousands.
    """

    def __init__(self, module: RMSNorm) -> None:
        self._weight, self._eps = module.weight, module.eps

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""
        return rms_norm(x_TH, self._weight, self._eps)


class LatentAttention:
    """Weights of a layer's latent attention, and its projections.

    Attributes:
        latent_width: Z of an entry.
        up_NXZ: W_UK of each head.
        up_NUZ: W_UV of each head.
        softmax_scale: Multiplies the scores.

    Source: DeepSeek-V3 report, eq. 1-11.
    """

    def __init__(self, module: LocalMLASelfAttention) -> None:
        config = module.config
        self.softmax_scale = module.softmax_scale
        self.latent_width = config.kv_lora_rank
        self._heads, self._query_width = module.num_local_heads, config.qk_head_dim + config.qk_pos_emb_head_dim
        parts: Any = module
        self._query_down = self._query_norm = None
        if config.q_lora_rank is None:
            self._query_up: torch.Tensor = parts.linear_q_proj.weight
        else:
            self._query_down, self._query_up = parts.linear_q_down_proj.weight, parts.linear_q_up_proj.weight
            self._query_norm = Norm(parts.q_layernorm)
        self._down, self._norm = parts.linear_kv_down_proj.weight, Norm(parts.kv_layernorm)
        self._up: torch.Tensor = parts.linear_kv_up_proj.weight
        self._output: torch.Tensor = parts.linear_proj.weight
        self._multiply_output = summing_product(parts.linear_proj)
        self._up_widths = [config.qk_head_dim, config.v_head_dim]
        self.up_NXZ, self.up_NUZ = self._up.detach().view(self._heads, -1, self.latent_width).split(
            self._up_widths, dim=1)
        self._multiply = product_like(self._up)

    def project(self, x_TH: torch.Tensor, rotations_TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and all that has to be kept of a position.

        Args:
            x_TH: Normed input.
            rotations_TP: Complex, of each token's position.

        Returns:
            query_TND: Rotated; the rotated part is the last.
            entry_TW: The normed latent and, behind it, the rotated shared key.
        """
        if self._query_down is not None and self._query_norm is not None:
            query = self._multiply(self._query_norm(self._multiply(x_TH, self._query_down)), self._query_up)
        else:
            query = self._multiply(x_TH, self._query_up)
        query_TND = rotate_tail_(query.view(-1, self._heads, self._query_width), rotations_TP, is_steady=True)
        entry_TW = rotate_tail_(self._multiply(x_TH, self._down), rotations_TP, is_steady=True)
        latent_TZ = entry_TW[:, :self.latent_width]
        latent_TZ.copy_(self._norm(latent_TZ))
        return query_TND, entry_TW

    def expand(self, entry_TW: torch.Tensor, least_rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [T, N, D] and values [T, N, U] of positions.

        Args:
            entry_TW: Positions kept as `project` returns them.
            least_rows: Rows that are multiplied at least; zeros where there are fewer.
        """
        latent_TZ, shared_key_TR = entry_TW.split([self.latent_width, entry_TW.shape[1] - self.latent_width], dim=1)
        key_value = multiply_at_least(self._multiply, latent_TZ, self._up, least_rows)
        key_nope_TNX, value_TNU = key_value.view(len(key_value), self._heads, -1).split(self._up_widths, dim=-1)
        return torch.cat([key_nope_TNX, shared_key_TR.unsqueeze(1).expand(-1, self._heads, -1)], dim=-1), value_TNU

    def output(self, context_TNU: torch.Tensor) -> torch.Tensor:
        """What attention adds to the residual, [T, H]."""
        return self._multiply_output(context_TNU.flatten(1), self._output)


class SwiGLU:
    """A dense layer's FFN, or a layer's shared experts."""

    def __init__(self, module: Any) -> None:
        self._up, self._down = module.linear_fc1.weight, module.linear_fc2.weight
        self._multiply, self._multiply_down = product_like(self._up), summing_product(module.linear_fc2)

    def __call__(self, x_TH: torch.Tensor, least_rows: int = 1) -> torch.Tensor:
        """[T, H] -> [T, H]; there are as many rows as are wanted."""
        return self._multiply_down(swiglu(self._multiply(x_TH, self._up)), self._down)


class MixtureOfExperts:
    """Shared experts and, of each token, its routed ones. Source: DeepSeek-V3 report, eq. 12-16."""

    def __init__(self, module: Any) -> None:
        self._router: torch.Tensor = module.router.weight
        self._score, self._choose = module.router.scores, module.router.select
        self._num_experts: int = module.config.num_moe_experts
        self._fc1, self._fc2 = module.experts.linear_fc1.weight, module.experts.linear_fc2.weight
        self._each_fc1, self._each_fc2 = self._fc1.detach().unbind(0), self._fc2.detach().unbind(0)
        self._shared = None if module.shared_experts is None else SwiGLU(module.shared_experts)

    def __call__(self, x_TH: torch.Tensor, least_rows: int = 1) -> torch.Tensor:
        """[T, H] -> [T, H].

        Args:
            x_TH: Normed input.
            least_rows: Rows that an expert's products take at least; more than 1: they have the bits of training's.
        """
        wide = wide_dtype(x_TH.dtype)
        gates_TK, ids_TK = self._choose(self._score(multiply_rows(x_TH.to(wide), self._router.to(wide))))
        if len(x_TH) == 1:
            output_TH = self._of_a_token(x_TH, gates_TK, ids_TK)
        else:
            output_TH = self._of_all(x_TH, gates_TK, ids_TK, least_rows)
        return output_TH if self._shared is None else output_TH.add_(self._shared(x_TH))

    def _of_a_token(self, x_1H: torch.Tensor, gates_1K: torch.Tensor, ids_1K: torch.Tensor) -> torch.Tensor:
        """One row for each expert, in whatever order."""
        ids: list[int] = ids_1K[0].tolist()
        routed_KH = few_rows_experts(x_1H.expand(len(ids), -1), [(expert, 1) for expert in ids], self._each_fc1,
                                     self._each_fc2, gates_1K[0])
        return routed_KH.sum(0, keepdim=True)

    def _of_all(self, x_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, least_rows: int
                ) -> torch.Tensor:
        """Rows sorted by expert, and put back."""
        if least_rows > 1:
            # Training adds up a token's experts by their numbers, one after the other; so does this sum of a few.
            ids_TK, order_TK = ids_TK.sort(dim=-1)
            gates_TK = gates_TK.gather(1, order_TK)
        expert_R = ids_TK.flatten()
        order_R = expert_R.argsort(stable=True)
        counts = torch.bincount(expert_R, minlength=self._num_experts).tolist()
        sorted_RH = swiglu_experts(x_TH[order_R // ids_TK.shape[1]], counts, self._fc1, self._fc2,
                                   gates_TK.flatten()[order_R], least_rows=least_rows)
        routed_RH = torch.empty_like(sorted_RH)
        routed_RH[order_R] = sorted_RH
        return routed_RH.view(*ids_TK.shape, -1).sum(1)


# Attention of one layer: weights, rotated queries and the positions' entries -> what the output projection reads.
Attend = Callable[[LatentAttention, torch.Tensor, torch.Tensor], torch.Tensor]


class Layer:
    """Attention and FFN, each with its norm before and its residual around.

    Args:
        module: A transformer layer made of this library's local modules.
    """

    def __init__(self, module: Any) -> None:
        self.attention = LatentAttention(module.self_attention)
        self._attention_norm, self._ffn_norm = Norm(module.input_layernorm), Norm(module.pre_mlp_layernorm)
        self._ffn = MixtureOfExperts(module.mlp) if isinstance(module.mlp, MoELayer) else SwiGLU(module.mlp)

    def __call__(self, x_TH: torch.Tensor, rotations_TP: torch.Tensor, attend: Attend, least_rows: int = 1
                 ) -> torch.Tensor:
        """[T, H] -> [T, H], in place; of T tokens an expert's products take at least `least_rows`."""
        query_TND, entry_TW = self.attention.project(self._attention_norm(x_TH), rotations_TP)
        x_TH += self.attention.output(attend(self.attention, query_TND, entry_TW))
        x_TH += self._ffn(self._ffn_norm(x_TH), least_rows)
        return x_TH
