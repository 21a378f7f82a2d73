"""Experts that a rehearsal's tokens go to: as many as asked for, and no token twice to one expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.rehearsal.made_routing import imbalance_of, made_routing, require_imbalance


@given(st.sampled_from([(8, 2, 1), (8, 2, 4), (64, 6, 8), (256, 8, 64), (256, 8, 256)]), st.integers(1, 300),
       st.floats(0, 1))
def test_the_first_rank_has_the_rows_asked_for(sizes: tuple[int, int, int], tokens: int, part: float) -> None:
    experts, top_k, ep = sizes
    most = ep * min(top_k, experts // ep) / top_k
    imbalance = 1 + (most - 1) * part
    require_imbalance(imbalance, experts=experts, top_k=top_k, ep=ep)
    ids_TK = made_routing(tokens, experts=experts, top_k=top_k, ep=ep, imbalance=imbalance)
    assert ids_TK.shape == (tokens, top_k) and ids_TK.min() >= 0 and ids_TK.max() < experts
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())
    rows = torch.bincount(ids_TK.flatten(), minlength=experts).view(ep, -1).sum(1)
    if imbalance == 1:
        assert rows.max() - rows.min() <= max(top_k, experts // ep)
    elif ep > 1:
        assert abs(int(rows[0]) - imbalance * tokens * top_k / ep) <= 1


@pytest.mark.parametrize("imbalance", [0.5, 9.0, float("nan")])
def test_an_imbalance_that_cannot_be_is_refused(imbalance: float) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1, which is balance, and at most 8: then every token goes "
                                          r"to 8 of the first rank's 32 experts"):
        require_imbalance(imbalance, experts=256, top_k=8, ep=8)


def test_the_mean_over_ranks_is_one() -> None:
    assert sum(imbalance_of(rank, 2.5, ep=8) for rank in range(8)) == pytest.approx(8)
    assert imbalance_of(0, 1, ep=1) == 1
