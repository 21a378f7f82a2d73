"""Generation against a full forward pass, against Transformers' `generate`, and against itself without a shortcut.

Prefill and decoding of many steps must give the logits of one pass over the whole sequence, of the main model and of
the MTP module, whatever the cache and the lengths in the batch. Speculative decoding must not change greedy output, nor
the distribution of sampled output, which is known exactly where the vocabulary is small.

Legend: B sequences, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsv3_megatron.certification.reference_weights import Architecture
from dsv3_megatron.config.router_functions import SCORE_FUNCTIONS
from dsv3_megatron.generation import speculative
from dsv3_megatron.generation.forward import CachedModel, Prompts
from dsv3_megatron.generation.generator import Generator, Options
from dsv3_megatron.generation.sampling import Sampling, distribution
from tests.parity.architectures import variant
from tests.parity.compare import FLOAT64_TOLERANCE, assert_close
from tests.transformers_model import huggingface_model

CACHES = ("latent", "full", "training")
FLOAT32_TOLERANCE = 1e-5  # sums of at most some hundred terms in another order


def random_prompts(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def continued(model: Any, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Generator]:
    """Each prompt's new tokens."""
    options = {"max_length": 256, "batch_size": len(prompts)} | options
    generator = Generator(CachedModel(model.eval()), Options(**options))
    found: list[list[int]] = [[] for _ in prompts]
    for event in generator.generate(prompts):
        found[event.prompt] += event.ids
    return found, generator


# -- logits --------------------------------------------------------------------------------------------


@torch.no_grad()
def full_forward(model: Any, tokens_S: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Main and MTP logits [S, V] of one pass over a sequence, by the model's own forward."""
    tokens_1S = torch.tensor([tokens_S])
    position_ids = torch.arange(len(tokens_S)).unsqueeze(0)
    seen: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits_SV = model(input_ids=tokens_1S, position_ids=position_ids, attention_mask=None)[0]
    hook.remove()
    outputs = model.mtp(input_ids=tokens_1S, position_ids=position_ids, hidden_states=seen[0], attention_mask=None,
                        embedding=model.embedding)
    mtp_S1H = outputs.chunk(1 + model.config.mtp_num_layers)[1]
    return logits_SV, model.output_layer(mtp_S1H)[0][:, 0]


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("name, dtype", [
    ("groups", torch.float64), ("full-rank-query", torch.float64), ("yarn-mscale", torch.float64),
    ("two-shared", torch.float64), ("mtp-2", torch.float64), ("no-shared", torch.float64), ("softmax", torch.float64),
    ("groups", torch.float32)])
def test_prefill_and_decoding_equal_a_full_forward(build: Any, name: str, dtype: torch.dtype, kv_cache: str) -> None:
    """Four sequences, decoded one and two tokens at a time, the MTP module along with them."""
    model, _ = build(variant(name), dtype)
    cached = CachedModel(model.eval())
    # Each a prompt, seven tokens to decode and the one after them, which the MTP module reads.
    sequences = [ids + torch.randint(0, 48, (8,), generator=torch.Generator().manual_seed(row)).tolist()
                 for row, ids in enumerate(random_prompts(4, 48, 15))]
    starts = [len(ids) - 8 for ids in sequences]
    capacity = max(map(len, sequences))
    caches = [cached.new_cache(kv_cache, num_rows=4, capacity=capacity, is_mtp=is_mtp) for is_mtp in (False, True)]
    prompts = Prompts.pack([ids[:start] for ids, start in zip(sequences, starts, strict=True)], cached.device)
    main: list[list[torch.Tensor]] = [[] for _ in sequences]
    mtp: list[list[torch.Tensor]] = [[] for _ in sequences]
    with torch.inference_mode():
        hidden_T1H = cached.prefill(prompts, caches[0])
        next_B = torch.tensor([ids[start] for ids, start in zip(sequences, starts, strict=True)])
        drafting_T1H = cached.mtp_prefill(prompts, next_B, hidden_T1H, caches[1])
        for row, length in enumerate(prompts.lengths):
            part = slice(prompts.bounds[row], prompts.bounds[row] + length)
            main[row].append(cached.logits(hidden_T1H[part, 0]))
            mtp[row].append(cached.logits(drafting_T1H[part, 0]))
        done = 0
        for count in (1, 2, 1, 2, 1):
            positions = [start + done for start in starts]
            tokens_BQ = torch.tensor([ids[at: at + count] for ids, at in zip(sequences, positions, strict=True)])
            hidden_QBH = cached.decode(tokens_BQ, positions, caches[0])
            next_BQ = torch.tensor([ids[at + 1: at + count + 1] for ids, at in zip(sequences, positions, strict=True)])
            drafting_QBH = cached.mtp_decode(next_BQ, hidden_QBH, positions, caches[1])
            for row in range(4):
                main[row].append(cached.logits(hidden_QBH[:, row]))
                mtp[row].append(cached.logits(drafting_QBH[:, row]))
            done += count
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    for row, ids in enumerate(sequences):
        expected_main, expected_mtp = full_forward(model, ids)
        assert_close(torch.cat(main[row]), expected_main[:-1], f"{row}: logits", tolerance)
        assert_close(torch.cat(mtp[row]), expected_mtp[:-1], f"{row}: MTP logits", tolerance)


def test_generation_takes_the_routers_affinities(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score function changed in its one place: decoding still equals the model's own forward, and both are new."""
    model, _ = build(variant("groups"), torch.float64)
    (ids,) = random_prompts(1, 48, 15)
    before, _ = full_forward(model.eval(), ids)
    monkeypatch.setitem(SCORE_FUNCTIONS, "sigmoid", lambda logits_TE: 0.1 + 0.8 * logits_TE.softmax(-1))
    expected, _ = full_forward(model, ids)
    assert (expected - before).abs().max() > 1e-3
    cached = CachedModel(model)
    with torch.inference_mode():
        hidden_T1H = cached.prefill(Prompts.pack([ids], cached.device),
                                    cached.new_cache("latent", num_rows=1, capacity=len(ids), is_mtp=False))
        assert_close(cached.logits(hidden_T1H[:, 0]), expected, "logits", FLOAT64_TOLERANCE)


@pytest.mark.parametrize("name", ["groups", "full-rank-query"])
def test_no_weight_is_copied(build: Any, name: str) -> None:
    """What the layers hold is the model's parameters and views of them, so that memory stays and new values count."""
    model, _ = build(variant(name), torch.float32)
    cached = CachedModel(model.eval())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = list(tensors_in(cached))
    foreign = [tensor for tensor in held if tensor.untyped_storage().data_ptr() not in parameters]
    assert sum(tensor.numel() for tensor in foreign) == len(foreign), "of each norm its constant"
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) - len(foreign) == len(parameters)


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Tensors that an object of the generation package holds, through its attributes and lists; empty ones left out."""
    if isinstance(thing, torch.Tensor):
        if thing.numel():
            yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_in(part)
    elif type(thing).__module__.startswith("dsv3_megatron.generation"):
        yield from tensors_in(list(vars(thing).values()))


# -- Transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, new, caches", [("groups", 200, CACHES), ("yarn", 60, ("latent",))])
def test_greedy_output_is_that_of_transformers(build: Any, name: str, new: int, caches: tuple[str, ...]) -> None:
    """Two hundred tokens of twenty prompts of mixed length in one batch, in fp32."""
    architecture = variant(name, mtp_num_layers=0)
    model, weights = build(architecture, torch.float32)
    prompts = random_prompts(20, 48, 40)
    assert len({len(ids) for ids in prompts}) > 10
    arch = Architecture.of(architecture)
    peer = huggingface_model(arch, {key: value.float() for key, value in weights.items()}).float().eval()
    longest = max(map(len, prompts))
    padded_BS = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        expected = peer.generate(padded_BS, attention_mask=mask_BS, max_new_tokens=new, do_sample=False, use_cache=True,
                                 pad_token_id=0, eos_token_id=None)[:, longest:]
    for kv_cache in caches:
        found, generator = continued(model, prompts, max_new_tokens=new, kv_cache=kv_cache)
        assert found == expected.tolist(), kv_cache
        assert generator.statistics.num_tokens == 20 * new
        # One row and a few rows have products of their own.
        for batch_size, count in ((1, 2), (6, 6)):
            few, _ = continued(model, prompts[:count], max_new_tokens=new, kv_cache=kv_cache, batch_size=batch_size)
            assert few == expected[:count].tolist(), (kv_cache, batch_size)
    assert max(len(set(ids)) for ids in found) > 20, "the outputs are no mere repetition"


# -- speculative decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", CACHES)
def test_speculative_greedy_output_is_that_of_plain_decoding(build: Any, kv_cache: str) -> None:
    """Fifty prompts, in batches whose sequences come to their ends at different times; drafts of both fates."""
    model, _ = build(variant("groups"), torch.float32)
    prompts = random_prompts(50, 48, 30)
    options = {"max_new_tokens": 40, "batch_size": 17, "stop_ids": (7,), "kv_cache": kv_cache}
    plain, without = continued(model, prompts, **options)
    speculated, generator = continued(model, prompts, speculative="mtp", **options)
    assert speculated == plain
    assert 0 < generator.statistics.num_accepted < generator.statistics.num_drafts
    assert generator.statistics.num_tokens == without.statistics.num_tokens
    assert len({len(ids) for ids in plain}) > 5


VOCABULARY, DRAWN, NUM_SAMPLES = 6, 3, 6000


def critical_value(freedom: int) -> float:
    """The 0.9999 quantile of chi-square, by the Wilson-Hilferty approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(model: Any, sampling: Sampling) -> tuple[float, float, Generator]:
    """Of the first tokens after one prompt, all together, against their exact distribution; the critical value."""
    prompt = [3, 1, 4]
    sampled, generator = continued(model, [prompt] * NUM_SAMPLES, max_new_tokens=DRAWN, speculative="mtp",
                                   sampling=sampling, batch_size=3000)
    counts = Counter(map(tuple, sampled))
    statistic, freedom, rare_expected, rare_found = 0.0, -1, 0.0, 0
    probabilities = exact_probabilities(model, prompt, sampling)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert all(probabilities[outcome] > 0 for outcome in counts), "tokens outside the nucleus"
    for outcome, probability in probabilities.items():
        expected = probability * NUM_SAMPLES
        if expected < 5:  # too few for the approximation: counted together
            rare_expected += expected
            rare_found += counts[outcome]
            continue
        statistic += (counts[outcome] - expected) ** 2 / expected
        freedom += 1
    if rare_expected > 5:
        statistic += (rare_found - rare_expected) ** 2 / rare_expected
        freedom += 1
    return statistic, critical_value(freedom), generator


@torch.no_grad()
def exact_probabilities(model: Any, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Of every sequence of DRAWN tokens, by one pass over all of them."""
    outcomes = list(itertools.product(range(VOCABULARY), repeat=DRAWN))
    tokens_BS = torch.tensor([prompt + list(outcome) for outcome in outcomes])
    position_ids = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    logits_BSV = model(input_ids=tokens_BS, position_ids=position_ids, attention_mask=None)[:, len(prompt) - 1:-1]
    steps_BSV = distribution(logits_BSV.flatten(0, 1), sampling).view(logits_BSV.shape)
    each_BS = steps_BSV.gather(-1, torch.tensor(outcomes).unsqueeze(-1)).squeeze(-1)
    return dict(zip(outcomes, each_BS.prod(-1).tolist(), strict=True))


@pytest.fixture
def small_vocabulary(build: Any) -> Any:
    model, _ = build(variant("groups", vocab_size=VOCABULARY), torch.float32)
    return model.eval()


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.6, 0.8, seed=2)], ids=["plain", "nucleus"])
def test_speculative_samples_have_the_models_distribution(small_vocabulary: Any, sampling: Sampling) -> None:
    statistic, critical, generator = chi_square(small_vocabulary, sampling)
    assert statistic < critical
    assert 0.1 < generator.statistics.acceptance_rate < 0.95


@pytest.mark.parametrize("wrong", ["accepts all", "draws from all of p"])
def test_a_wrong_rule_is_seen(small_vocabulary: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = speculative.verify

    def broken(draft_B: Any, drafted_BV: Any, target_BV: Any, after_BV: Any, uniforms_B2: Any) -> Any:
        if wrong == "accepts all":
            uniforms_B2 = uniforms_B2 * torch.tensor([0.0, 1.0])
            return verify(draft_B, drafted_BV, target_BV.clamp(min=1e-9), after_BV, uniforms_B2)
        accepted, _ = verify(draft_B, drafted_BV, target_BV, after_BV, uniforms_B2)
        weights = torch.where(accepted.unsqueeze(-1), after_BV, target_BV)
        return accepted, speculative.draw(weights, uniforms_B2[:, 1])

    monkeypatch.setattr(speculative, "verify", broken)
    statistic, critical, _ = chi_square(small_vocabulary, Sampling(1.0, seed=1))
    assert statistic > critical


@pytest.mark.parametrize("mode", [None, "mtp"])
def test_a_sample_does_not_depend_on_its_batch(build: Any, mode: str | None) -> None:
    model, _ = build(variant("groups"), torch.float64)
    prompts = random_prompts(9, 48, 12)
    prompts += prompts[2:5]  # what is alike goes through the model once, and its draws differ
    options = {"max_new_tokens": 12, "sampling": Sampling(1.0, 0.9, seed=5), "speculative": mode}
    together, alone, pairs = (continued(model, prompts, batch_size=size, **options)[0] for size in (12, 1, 2))
    assert together == alone == pairs and together[9:] != together[2:5]
    assert together != continued(model, prompts, **{**options, "sampling": Sampling(1.0, 0.9, seed=6)})[0]
