"""With the training cache, decoding has the bits of the training forward, whatever is decoded together.

It holds where a row's product does not depend on how many rows are multiplied at once, which is looked at first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.generation.forward import CachedModel, Prompts
from dsv3_megatron.model.build import build_stages
from dsv3_megatron.ops.backend import choose_product_backend
from tests.parity.architectures import run_of, variant

PROMPT, LENGTH, COUNT = 5, 23, 3


@pytest.fixture
def model(groups: Any) -> Any:
    if choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) != "native":
        pytest.skip("this processor has no units for bf16: its fp32 products depend on how many rows are multiplied")
    stages, _ = build_stages(run_of(variant("groups", max_position_embeddings=64), precision="bf16"), groups,
                             precision="bf16")
    return stages[0].eval()


def training_logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    with torch.no_grad():
        return model(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, labels=None)


def decoded(model: Any, tokens_BS: torch.Tensor, kind: str, width: int) -> torch.Tensor:
    """Logits from the prompt's last position on, `width` tokens a step."""
    cached = CachedModel(model)
    with torch.inference_mode():
        cache = cached.new_cache(kind, num_rows=len(tokens_BS), capacity=LENGTH)
        prompts = Prompts.pack(tokens_BS[:, :PROMPT].tolist(), cached.device)
        last_BH = cached.prefill(prompts, cache)[prompts.last_B(), 0]
        logits = [cached.logits(last_BH, least_rows=cache.least_rows).unsqueeze(1)]
        for at in range(PROMPT, LENGTH, width):
            hidden = cached.decode(tokens_BS[:, at: at + width], [at] * len(tokens_BS), cache).transpose(0, 1)
            logits.append(cached.logits(hidden, least_rows=cache.least_rows))
        return torch.cat(logits, dim=1)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("together", [1, COUNT])
def test_decoding_has_the_bits_of_training(model: Any, together: int, width: int) -> None:
    tokens_BS = torch.randint(0, 48, (COUNT, LENGTH), generator=torch.Generator().manual_seed(2))
    whole = training_logits(model, tokens_BS)[:, PROMPT - 1:]
    assert torch.equal(training_logits(model, tokens_BS[:1])[:, PROMPT - 1:], whole[:1])
    rows = torch.cat([decoded(model, part, "training", width) for part in tokens_BS.split(together)])
    assert torch.equal(rows, whole)


def test_the_default_cache_has_other_bits(model: Any) -> None:
    tokens_BS = torch.randint(0, 48, (COUNT, LENGTH), generator=torch.Generator().manual_seed(2))
    assert not torch.equal(decoded(model, tokens_BS, "latent", 1), training_logits(model, tokens_BS)[:, PROMPT - 1:])
