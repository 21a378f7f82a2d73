"""Which way the head and its loss are computed, and that an unknown one is refused."""

import pytest
import torch

from dsv3_megatron.ops import head_loss_choices as choices
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize(("device", "capability", "value_bytes", "hidden", "chosen", "reason"), [
    ("cuda", 9, 2, 7168, "fused", "Hopper or later"),
    ("cuda", 10, 2, 7168, "fused", "Hopper or later"),
    ("cuda", 8, 2, 7168, "chunked", "8.x has no TMA"),
    ("cuda", 9, 4, 7168, "chunked", "32-bit"),
    ("cuda", 9, 2, 100, "chunked", "multiples of 16 bytes"),
    ("cpu", 0, 2, 7168, "chunked", "cpu"),
])
def test_choice(device, capability, value_bytes, hidden, chosen, reason):
    found = choices.choose_head_loss(device, capability=capability, value_bytes=value_bytes, hidden=hidden)
    assert found[0] == chosen and reason in found[1]


def test_kept_probabilities_are_multiplied_as_they_are_on_a_cpu_with_narrow_products():
    on_cpu = {"device": "cpu", "value_bytes": 2, "is_wide_product": False, "is_kept": True, "is_split": False}
    assert choices.multiplies_kept(**on_cpu)
    for other in ({"device": "cuda"}, {"value_bytes": 4}, {"is_wide_product": True}, {"is_kept": False},
                  {"is_split": True}):
        assert not choices.multiplies_kept(**(on_cpu | other))


def test_an_unknown_backend():
    hidden, weight, targets = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="backend='liger' of linear_cross_entropy must be one of auto, fused, chunked"):
        linear_cross_entropy(hidden, weight, targets, backend="liger")


def test_auto_says_once_what_it_chose(caplog):
    from dsv3_megatron.ops.backend import log_choice

    log_choice.cache_clear()
    with caplog.at_level("INFO", "dsv3_megatron"):
        for _ in range(2):
            linear_cross_entropy(torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2]))
    assert caplog.text.count("linear_cross_entropy: backend chunked (cpu)") == 1
    assert choices.chunk_tokens_on("cuda") > choices.chunk_tokens_on("cpu")
