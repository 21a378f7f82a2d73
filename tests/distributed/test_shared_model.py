"""A model on several processes against Transformers' on one: scores and new tokens, in every layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.data.tokenizer import load_tokenizer
from dsv3_megatron.generation.continuations import ContinuationRequest, ContinuationScore
from dsv3_megatron.generation.generator import Options
from dsv3_megatron.generation.sampling import Sampling
from dsv3_megatron.runs.answering_run import check_answering_run
from tests.distributed.evaluations import LAYOUTS
from tests.distributed.launch import run_ranks
from tests.distributed.trained_text import CONTEXT, WORDS, train_on_words

pytestmark = pytest.mark.distributed

NEW_TOKENS, STOP = 10, " lazy"
# fp32 on both sides, sums of up to 64 log-probabilities in another order.
TOLERANCE = 2e-5
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "pp2-ep2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2-pp2": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
    "tp2-ep4": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4},
    "tp2-etp2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "ep2-cp2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "pp2-dualpipev-dp2": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"},
}
# Copies of the model that answer side by side.
TEAMS = {"dp2": 2, "cp2": 2, "tp2-ep2": 1, "tp2-etp2": 2, "ep2-cp2": 2, "pp2-dualpipev-dp2": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_words(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def transformers_model(trained: Path) -> Any:
    from transformers import DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def requests(trained: Path, transformers_model: Any) -> list[ContinuationRequest]:
    """Contexts with continuations of one token and of more, the likeliest too; some do not fit into the context."""
    tokenizer, chosen = load_tokenizer(trained / "tokenizer"), random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(tokenizer.encode(" ".join(chosen.choices(WORDS, k=count))).ids)

    found = []
    for _ in range(4):
        context = ids(chosen.randint(1, 12))
        found += [ContinuationRequest(context, ids(1)[:1]) for _ in range(3)]
        (likeliest,) = expected_tokens(transformers_model, [context])
        found += [ContinuationRequest(context, part) for part in (ids(5), tuple(likeliest[:3]))]
    return [*found, ContinuationRequest(ids(90), ids(4)), ContinuationRequest((0,), ids(60)[:CONTEXT])]


@torch.no_grad()
def expected_scores(model: Any, requests: list[ContinuationRequest]) -> list[ContinuationScore]:
    """One sequence at a time, with the logits of every position."""
    found = []
    for request in requests:
        whole = torch.tensor([(request.context + request.continuation)[-CONTEXT - 1:]])
        logprobs_SV = model(whole[:, :-1]).logits[0].log_softmax(-1)[-len(request.continuation):]
        targets = torch.tensor(request.continuation)
        found.append(ContinuationScore(float(logprobs_SV.gather(1, targets[:, None]).sum()),
                                       bool((logprobs_SV.argmax(-1) == targets).all())))
    return found


@torch.no_grad()
def expected_tokens(model: Any, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        new = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                             max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=2)
        found.append([token for token in new[0, len(prompt):].tolist() if token not in (1, 2)])
    return found


def answers(load: str, layouts: list[dict[str, Any]], requests: list[ContinuationRequest]) -> list[Any]:
    """Of each layout: the number of teams, the scores, and new tokens by the likeliest, up to a word, and drawn."""
    from megatron.core import parallel_state

    found: list[Any] = []
    prompts = [request.context[:20] for request in requests[::5]]
    for number, layout in enumerate(layouts):
        model = check_answering_run(load, parallel=layout, world_size=torch.distributed.get_world_size(),
                                    precision="fp32").build()
        if model.is_asking:
            counted: list[int] = []
            options = Options(NEW_TOKENS, CONTEXT, batch_size=2, stop_ids=model.codec.stop_ids)
            drawn = Options(NEW_TOKENS, CONTEXT, Sampling(0.8, seed=3), batch_size=2, stop_ids=model.codec.stop_ids)
            found.append((model.num_teams, model.score(requests, batch_size=(1, 3, None)[number % 3],
                                                       report=counted.append),
                          model.generate(prompts, options), model.generate(prompts, options, [STOP]),
                          model.generate(prompts, drawn)))
            assert sum(counted) <= len(requests), "this team's share"
            model.end()
        else:
            model.follow()
        parallel_state.destroy_model_parallel()
    return found


def test_every_layout_answers_as_transformers(trained: Path, transformers_model: Any,
                                              requests: list[ContinuationRequest]) -> None:
    scores = expected_scores(transformers_model, requests)
    tokens = expected_tokens(transformers_model, [request.context[:20] for request in requests[::5]])
    assert any(score.is_greedy for score in scores) and not all(score.is_greedy for score in scores)
    tokenizer = load_tokenizer(trained / "tokenizer")
    drawn: list[list[int]] = []
    for num_ranks, layouts in ((1, {"single": {}}), (2, LAYOUTS), (4, FOUR_RANKS)):
        found = run_ranks(num_ranks, answers, str(trained / "run"), list(layouts.values()), requests)[0]
        for name, (num_teams, scored, generated, stopped, sampled) in zip(layouts, found, strict=True):
            assert num_teams == TEAMS.get(name, 1), name
            assert [score.logprob for score in scored] == pytest.approx(
                [score.logprob for score in scores], rel=TOLERANCE), name
            assert [score.is_greedy for score in scored] == [score.is_greedy for score in scores], name
            assert generated == tokens, name
            for until, whole in zip(stopped, tokens, strict=True):
                assert until == whole[:len(until)], name
                text = tokenizer.decode(until)
                assert text.endswith(STOP) if STOP in text else until == whole, name
            drawn = drawn or sampled
            assert sampled == drawn, name


def test_continuations_that_cannot_be_scored(trained: Path) -> None:
    with pytest.raises(Exception, match="both need at least one"):
        run_ranks(1, answers, str(trained / "run"), [{}], [ContinuationRequest((1,), ())] * 5)
