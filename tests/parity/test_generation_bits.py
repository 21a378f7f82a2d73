"""With the training cache, decoding has the bits of a training forward that sums as generation does, whatever is
decoded together, in fp32 and in bf16, also where attention sums over several blocks of keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.generation.forward import CachedModel, Prompts
from dsv3_megatron.model.build import build_stages
from dsv3_megatron.model.steady_modules import set_steady
from dsv3_megatron.ops.backend import choose_product_backend
from dsv3_megatron.ops.steady_sums import KEY_BLOCK
from tests.parity.architectures import run_of, variant

PROMPT, LENGTH, COUNT = 5, 23, 3
# Two blocks of keys and a few keys of the third, which begins while tokens are generated.
LONG_PROMPT, LONG = 2 * KEY_BLOCK - 7, 2 * KEY_BLOCK + 9


def built(groups: Any, precision: str) -> Any:
    if precision == "bf16" and choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) != "native":
        pytest.skip("this processor has no units for bf16: it multiplies in fp32, which is tested as such")
    run = run_of(variant("groups", max_position_embeddings=1024), precision=precision)
    stages, _ = build_stages(run, groups, precision=precision)
    set_steady(stages)
    return stages[0].eval()


@pytest.fixture(params=["fp32", "bf16"])
def model(groups: Any, request: pytest.FixtureRequest) -> Any:
    return built(groups, request.param)


def random_tokens(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 48, (count, length), generator=torch.Generator().manual_seed(2))


def training_logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    with torch.no_grad():
        return model(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, labels=None)


def decoded(model: Any, tokens_BS: torch.Tensor, kind: str, width: int, prompt: int = PROMPT) -> torch.Tensor:
    """Logits from the prompt's last position on, `width` tokens a step."""
    cached, length = CachedModel(model), tokens_BS.shape[1]
    with torch.inference_mode():
        cache = cached.new_cache(kind, num_rows=len(tokens_BS), capacity=length)
        prompts = Prompts.pack(tokens_BS[:, :prompt].tolist(), cached.device)
        last_BH = cached.prefill(prompts, cache)[prompts.last_B(), 0]
        logits = [cached.logits(last_BH, least_rows=cache.least_rows).unsqueeze(1)]
        for at in range(prompt, length, width):
            hidden = cached.decode(tokens_BS[:, at: at + width], [at] * len(tokens_BS), cache).transpose(0, 1)
            logits.append(cached.logits(hidden, least_rows=cache.least_rows))
        return torch.cat(logits, dim=1)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("together", [1, COUNT])
def test_decoding_has_the_bits_of_training(model: Any, together: int, width: int) -> None:
    tokens_BS = random_tokens(COUNT, LENGTH)
    whole = training_logits(model, tokens_BS)[:, PROMPT - 1:]
    assert torch.equal(training_logits(model, tokens_BS[:1])[:, PROMPT - 1:], whole[:1])
    rows = torch.cat([decoded(model, part, "training", width) for part in tokens_BS.split(together)])
    assert torch.equal(rows, whole)


def test_decoding_has_the_bits_of_training_over_several_blocks_of_keys(model: Any) -> None:
    tokens_BS = random_tokens(2, LONG)
    whole = training_logits(model, tokens_BS)[:, LONG_PROMPT - 1:]
    assert torch.equal(decoded(model, tokens_BS, "training", 2, LONG_PROMPT), whole)


def test_the_default_cache_has_other_bits(model: Any) -> None:
    tokens_BS = random_tokens(COUNT, LENGTH)
    assert not torch.equal(decoded(model, tokens_BS, "latent", 1), training_logits(model, tokens_BS)[:, PROMPT - 1:])


def test_a_forward_that_sums_as_is_fastest_has_other_bits(groups: Any) -> None:
    """Or the tests above would say nothing about the sums."""
    model, tokens_BS = built(groups, "fp32"), random_tokens(2, LONG)
    steady = training_logits(model, tokens_BS)
    set_steady([model], False)
    fastest = training_logits(model, tokens_BS)
    torch.testing.assert_close(steady, fastest, rtol=1e-4, atol=1e-5)
    assert not torch.equal(steady, fastest)
