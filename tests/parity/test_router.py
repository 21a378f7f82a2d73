"""Choice of experts, loads, balance loss and bias updates against obvious loops.

Legend: T tokens, E experts, K experts per token, G groups, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_megatron.certification.reference import Architecture, sequence_balance_loss, updated_router_bias
from dsv3_megatron.certification.reference import select_experts as select_experts_of_one_token
from dsv3_megatron.model.router import DeepSeekRouter, select_experts
from dsv3_megatron.optim.router_bias import collect_expert_loads, routers, update_router_biases
from tests.parity.architectures import BASE, variant
from tests.parity.compare import assert_close

CHOICE = settings(max_examples=200)


@st.composite
def routing_problems(draw, *, ties: bool):
    """Affinities and biases that are exact in binary, so that sums of them are too, and a valid kind of grouping."""
    num_groups, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_experts, kept = num_groups * group_size, draw(st.integers(1, num_groups))
    top_k = kept * draw(st.integers(1, group_size)) if num_groups > 1 else draw(st.integers(1, num_experts))
    tokens = draw(st.integers(1, 4))
    if ties:
        scores = st.lists(st.integers(1, 7), min_size=num_experts, max_size=num_experts)
        scores_TE = torch.tensor(draw(st.lists(scores, min_size=tokens, max_size=tokens))) / 8
        bias_E = torch.tensor(draw(st.lists(st.integers(-16, 16), min_size=num_experts, max_size=num_experts))) / 8
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        scores_TE = torch.rand(tokens, num_experts, generator=generator, dtype=torch.float64) * 0.98 + 0.01
        bias_E = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    options = {"top_k": top_k, "num_groups": num_groups, "group_top_k": kept}
    if not ties:
        options["group_score_topk"] = draw(st.none() | st.integers(1, group_size))
    return scores_TE, bias_E, options


def architecture(num_experts: int, options: dict[str, Any]) -> Architecture:
    return Architecture.of(variant(
        "plain", num_experts=num_experts, moe_router_topk=options["top_k"],
        moe_router_num_groups=options["num_groups"], moe_router_group_topk=options["group_top_k"],
        moe_router_group_score_topk=options["group_score_topk"]))


def is_a_best_choice(chosen: list[int], biased_E: list[Fraction], options: dict[str, int]) -> bool:
    """Whether some order among equals makes `chosen` the top K of the best groups: every choice of groups is tried."""
    num_groups, kept = options["num_groups"], options["group_top_k"]
    size = len(biased_E) // num_groups
    members = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    per_group = max(1, options["top_k"] // kept)
    scores = [sum(sorted((biased_E[e] for e in group), reverse=True)[:per_group]) for group in members]
    for groups in itertools.combinations(range(num_groups), kept):
        others = set(range(num_groups)) - set(groups)
        if others and min(scores[group] for group in groups) < max(scores[group] for group in others):
            continue
        candidates = [expert for group in groups for expert in members[group]]
        left = [biased_E[expert] for expert in candidates if expert not in chosen]
        if set(chosen) <= set(candidates) and (not left or min(biased_E[e] for e in chosen) >= max(left)):
            return True
    return False


class TestChoice:
    @CHOICE
    @given(routing_problems(ties=False))
    def test_equals_a_loop_over_tokens(self, problem):
        """The experts and their order, and gates from the unbiased affinities."""
        scores_TE, bias_E, options = problem
        gates_TK, ids_TK = select_experts(scores_TE, bias_E, route_scale=2.5, **options)
        for scores_E, gates_K, ids_K in zip(scores_TE, gates_TK, ids_TK.tolist(), strict=True):
            arch = architecture(len(scores_E), options)
            assert ids_K == select_experts_of_one_token((scores_E + bias_E).tolist(), arch)
            expected_K = [2.5 * scores_E[e].item() / sum(scores_E[i].item() for i in ids_K) for e in ids_K]
            assert gates_K.tolist() == pytest.approx(expected_K, rel=1e-14)

    @CHOICE
    @given(routing_problems(ties=True))
    def test_rules_hold_with_ties(self, problem):
        """K distinct experts, the best in the best groups, in falling order, with gates that sum to the scale."""
        scores_TE, bias_E, options = problem
        gates_TK, ids_TK = select_experts(scores_TE, bias_E, route_scale=2.5, **options)
        size = scores_TE.shape[1] // options["num_groups"]
        for scores_E, gates_K, ids_K in zip(scores_TE, gates_TK, ids_TK.tolist(), strict=True):
            assert len(set(ids_K)) == options["top_k"] == len(ids_K)
            assert len({e // size for e in ids_K}) <= options["group_top_k"]
            biased_E = [Fraction(s) + Fraction(b) for s, b in zip(scores_E.tolist(), bias_E.tolist(), strict=True)]
            assert is_a_best_choice(ids_K, biased_E, options)
            assert [biased_E[e] for e in ids_K] == sorted((biased_E[e] for e in ids_K), reverse=True)
            # fp32: K products and a sum, each rounded to 6e-8.
            assert gates_K.sum().item() == pytest.approx(2.5, rel=1e-6)
            assert (gates_K > 0).all()

    @pytest.mark.parametrize("chosen", [[0, 1, 4, 8], [0, 1, 4, 6], [0, 1, 2, 3], [4, 5, 8, 9]])
    def test_the_rules_reject_other_choices(self, chosen):
        """Three groups, a second-best expert, one group, a worse group: the property above can fail."""
        biased_E = [Fraction(n) for n in (9, 8, 0, 0, 7, 6, 5, 0, 1, 1, 1, 1)]
        options = {"top_k": 4, "num_groups": 3, "group_top_k": 2}
        assert is_a_best_choice([0, 1, 4, 5], biased_E, options)
        assert not is_a_best_choice(chosen, biased_E, options)

    def test_a_dropped_group_stays_out_where_kept_affinities_are_negative(self):
        """Dropped groups are masked with -inf; 0 would let their experts in again."""
        bias_E = torch.tensor([-2.0, -2.0, -2.5, -2.5])
        _, ids_TK = select_experts(torch.full((1, 4), 0.5), bias_E, top_k=2, num_groups=2, group_top_k=1,
                                   route_scale=1.0)
        assert sorted(ids_TK[0].tolist()) == [0, 1]

    @CHOICE
    @given(routing_problems(ties=False))
    def test_zero_mask_equals_a_loop_over_tokens(self, problem):
        """The same biased affinities are chosen, those of dropped groups counted as 0; which of these is open."""
        scores_TE, bias_E, options = problem
        _, ids_TK = select_experts(scores_TE, bias_E, route_scale=2.5, group_mask="zero", **options)
        summed = options["group_score_topk"] or max(1, options["top_k"] // options["group_top_k"])
        for scores_E, ids_K in zip(scores_TE, ids_TK.tolist(), strict=True):
            arch = dataclasses.replace(architecture(len(scores_E), options), moe_router_group_mask="zero")
            biased_E = (scores_E + bias_E).tolist()
            kept = select_experts_of_one_token(biased_E, dataclasses.replace(
                arch, moe_router_group_mask="exclude", moe_router_topk=arch.num_experts,
                moe_router_group_score_topk=summed))
            expected = select_experts_of_one_token(biased_E, arch)
            assert len(set(ids_K)) == options["top_k"]
            assert [biased_E[e] if e in kept else 0.0 for e in ids_K] == [
                biased_E[e] if e in kept else 0.0 for e in expected]

    def test_a_dropped_group_comes_back_where_it_is_masked_with_zero(self):
        """The same affinities as above under the other mask: -1.5 of the kept group lose to 0 and 0."""
        bias_E = torch.tensor([-2.0, -2.0, -2.5, -2.5])
        _, ids_TK = select_experts(torch.full((1, 4), 0.5), bias_E, top_k=2, num_groups=2, group_top_k=1,
                                   route_scale=1.0, group_mask="zero")
        assert sorted(ids_TK[0].tolist()) == [2, 3]

    @pytest.mark.parametrize("group_score_topk, expected", [(None, [0]), (1, [0]), (2, [2])])
    def test_affinities_summed_to_a_group_score(self, group_score_topk, expected):
        """One expert of one group: the report compares 0.9 with 0.8, Transformers 0.9 + 0.1 with 0.8 + 0.7."""
        scores_TE = torch.tensor([[0.9, 0.1, 0.8, 0.7]])
        _, ids_TK = select_experts(scores_TE, torch.zeros(4), top_k=1, num_groups=2, group_top_k=1, route_scale=1.0,
                                   group_score_topk=group_score_topk)
        assert ids_TK[0].tolist() == expected

    def test_no_gradient_through_the_choice(self):
        scores_TE = torch.rand(5, 8, dtype=torch.float64, requires_grad=True)
        bias_E = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        gates_TK, ids_TK = select_experts(scores_TE, bias_E, top_k=2, num_groups=1, group_top_k=1, route_scale=2.5)
        gates_TK[:, 0].sum().backward()
        assert bias_E.grad is None
        assert (scores_TE.grad.gather(1, ids_TK) != 0).all() and (scores_TE.grad != 0).sum() == ids_TK.numel()


@pytest.fixture
def router(build) -> DeepSeekRouter:
    model, _ = build(variant("groups"))
    return model.decoder.layers[1].mlp.router


def hidden(length: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, batch, BASE.hidden_size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))


class TestRouter:
    def test_probabilities_and_map(self, router):
        x_SBH = hidden(6, 2)
        probs_TE, map_TE = router(x_SBH)
        scores_TE = torch.sigmoid(x_SBH.flatten(0, 1) @ router.weight.T)
        gates_TK, ids_TK = select_experts(scores_TE, router.expert_bias, top_k=4, num_groups=4, group_top_k=2,
                                          route_scale=2.5)
        for token, (gates_K, ids_K) in enumerate(zip(gates_TK, ids_TK.tolist(), strict=True)):
            assert sorted(ids_K) == map_TE[token].nonzero().flatten().tolist()
            assert_close(probs_TE[token, ids_K], gates_K, "probabilities")
            assert probs_TE[token].count_nonzero() == len(ids_K)

    def test_loads_add_up_over_micro_batches(self, router):
        expected_E = sum(router(hidden(5, 2, seed))[1].sum(0) for seed in range(4))
        assert torch.equal(router.tokens_per_expert, expected_E)
        assert router.tokens_per_expert.dtype == torch.int64

    def test_evaluation_counts_nothing(self, router):
        router.eval()
        router(hidden(5, 2))
        with torch.no_grad():
            router.train()(hidden(5, 2))
        assert router.tokens_per_expert.sum() == 0 and router.balance_loss_sum == 0

    def test_recomputation_counts_once(self, router):
        """Megatron-Core's recomputation runs the forward pass twice."""
        from megatron.core.tensor_parallel.random import checkpoint

        x_SBH = hidden(5, 2).requires_grad_()
        checkpoint(lambda x: router(x)[0], False, x_SBH).sum().backward()
        assert router.tokens_per_expert.sum() == 5 * 2 * 4
        assert x_SBH.grad is not None

    @pytest.mark.parametrize("top_k", [1, 4, 12])
    def test_balance_loss_and_its_gradient(self, build, top_k):
        """The same scores through ours and through the reference: counts of the unbiased, ungrouped top K."""
        model, _ = build(variant("groups", moe_router_topk=top_k, moe_router_num_groups=1,
                                 moe_router_group_topk=1))
        router = model.decoder.layers[2].mlp.router
        scores = torch.rand(9, 3, 12, dtype=torch.float64)
        ours_SBE, theirs_SBE = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        ours = router._balance_loss(ours_SBE)
        theirs = sequence_balance_loss(theirs_SBE.transpose(0, 1), top_k=top_k, alpha=router.balance_loss_coeff) * 3
        ours.backward()
        theirs.backward()
        assert_close(ours, theirs, "balance loss")
        assert_close(ours_SBE.grad, theirs_SBE.grad, "gradient of the balance loss")

    def test_balance_loss_sees_each_sequence_apart(self, build):
        """Experts that are even over the batch but not within a sequence are punished."""
        router = build(variant("groups"))[0].decoder.layers[1].mlp.router
        low, high = torch.full((6, 1, 6), 0.1).double(), torch.full((6, 1, 6), 0.9).double()
        apart = torch.cat([torch.cat([low, high], -1), torch.cat([high, low], -1)], dim=1)
        together = torch.cat([apart[:3], apart[3:].flip(1)])
        assert router._balance_loss(apart) > 1.5 * router._balance_loss(together)


class TestBiasUpdate:
    @settings(max_examples=100)
    @given(st.lists(st.integers(0, 2**40), min_size=2, max_size=9), st.sampled_from([1e-3, 0.0]))
    @example([2**40, 2**40, 2**40 + 1], 1e-3)
    @example([2**40 + 1, 2**40, 2**40 - 1], 1e-3)
    def test_equals_exact_arithmetic(self, load, rate):
        """b_i + rate * sign(mean - load_i), the mean as a fraction: a load one token off the mean moves its bias."""
        router = _bare_router(len(load))
        update_router_biases([router], torch.tensor([load]), num_layers=1, update_rate=rate)
        mean = Fraction(sum(load), len(load))
        expected = [rate * ((mean > n) - (mean < n)) for n in load]
        assert torch.equal(router.expert_bias, torch.tensor(expected, dtype=torch.float32))

    def test_whole_model(self, build):
        """Two steps of a model with MTP: loads of every layer in its row, the reference's update, counters reset."""
        model_config = variant("mtp-2-groups")
        model, _ = build(model_config)
        sizes = {"num_layers": model_config.num_layers, "num_mtp_layers": 2, "num_experts": 12,
                 "device": torch.device("cpu")}
        tokens_BS = torch.randint(0, 48, (2, 10), generator=torch.Generator().manual_seed(0))
        for _step in range(2):
            before = {row: router.expert_bias.clone() for row, router in routers([model], 3)}
            model(input_ids=tokens_BS, position_ids=torch.arange(10).expand(2, -1), attention_mask=None,
                  labels=tokens_BS)
            loads_LE, balance_L = collect_expert_loads([model], **sizes)
            assert loads_LE.sum(1).tolist() == [0, *[2 * 10 * 4] * 4]
            assert (balance_L[1:] > 0).all() and balance_L[0] == 0
            update_router_biases([model], loads_LE, num_layers=3, update_rate=1e-3)
            after = dict(routers([model], 3))
            assert set(after) == set(before) == {1, 2, 3, 4}
            for row, router in after.items():
                ids = torch.repeat_interleave(torch.arange(12), loads_LE[row])[:, None]
                assert torch.equal(router.expert_bias, updated_router_bias(before[row], ids, 1e-3))
                assert router.expert_bias.dtype == torch.float32
        assert collect_expert_loads([model], **sizes)[0].sum() == 0


def _bare_router(num_experts: int) -> DeepSeekRouter:
    """A router with nothing but its bias."""
    router = DeepSeekRouter.__new__(DeepSeekRouter)
    torch.nn.Module.__init__(router)
    router.layer_number, router.is_mtp_layer = 1, False
    router.register_buffer("expert_bias", torch.zeros(num_experts))
    return router
