"""Answers to prompts, generated with the weights of the time, judged, and gathered from all replicas.

Each replica answers its share of the prompts, in one process or in tensor-parallel ranks that all generate all of them,
of which the first judges. What an answer is follows from the run's seed, the
rollout's number and the answer's place in it: not from the replicas, nor from which answers are generated together.

Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.chat.prompts import ChatPrompt
from dsv3_megatron.data.order import derive_keys
from dsv3_megatron.generation.cache import TrainingCache
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.generation.generator import END_OF_TEXT, Generator, Options
from dsv3_megatron.generation.sampling import Sampling
from dsv3_megatron.generation.text import TextCodec
from dsv3_megatron.ops.head_loss_choices import chunk_tokens_on
from dsv3_megatron.post_training.rewards import Rewards
from dsv3_megatron.post_training.rollout import Answer

# Tokens whose distributions are in memory at once.
_TOKENS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Asked:
    """A prompt that is to be answered once.

    Attributes:
        prompt: The prompt.
        group: Number of its group in the run.
        number: Number of the answer in its rollout.
    """

    prompt: ChatPrompt
    group: int
    number: int


class Sampler:
    """Generates and judges answers.

    Args:
        run: The run.
        codec: The tokenizer.
        rewards: Rules that judge.
        beat: Function that hears that the work goes on.
    """

    def __init__(self, run: RunConfig, codec: TextCodec, rewards: Rewards, beat: Callable[[str], None]) -> None:
        self.run, self.codec, self.rewards, self._beat = run, codec, rewards, beat

    def answer(self, stage: torch.nn.Module, asked: Sequence[Asked], *, rollout: int | None, is_judged: bool = True
               ) -> list[Answer]:
        """Answer prompts in this process.

        Args:
            stage: The whole model, in eval mode.
            asked: What is to be answered.
            rollout: Number of the rollout, which the draws follow from; None: the likeliest tokens are taken.
            is_judged: Whether the answers get their rewards here, once all of them are there: a rank that raises an
                error while others wait for its part of a product would leave them waiting.

        Raises:
            RewardError: an answer could not be judged.
        """
        policy = self.run.policy
        sampling = Sampling() if rollout is None else Sampling(
            1.0, seed=derive_keys("rollout", self.run.training.seed, rollout, count=1)[0] >> 32)
        options = Options(policy.max_new_tokens, self.run.model.max_position_embeddings, sampling,
                          kv_cache=policy.rollout_kv_cache, speculative=policy.rollout_speculative,
                          batch_size=policy.rollout_batch_size, stop_ids=self.codec.stop_ids)
        model = CachedModel(stage)
        ids: list[list[int]] = [[] for _ in asked]
        states: list[list[torch.Tensor]] = [[] for _ in asked]
        answers: list[Answer | None] = [None] * len(asked)
        ended: list[tuple[int, bool]] = []

        def finish() -> None:
            made = self._answers(model, [(asked[place], ids[place], states[place], is_finished)
                                         for place, is_finished in ended])
            for (place, _), answer in zip(ended, made, strict=True):
                answers[place], states[place] = answer, []
            ended.clear()

        for event in Generator(model, options).generate([each.prompt.ids for each in asked],
                                                        [each.number for each in asked]):
            place = event.prompt
            ids[place] += event.ids if event.end_id is None else (*event.ids, event.end_id)
            assert event.states_TH is not None
            states[place].append(event.states_TH)
            if event.ended is not None:
                self._beat("rollout")
                ended.append((place, event.ended == END_OF_TEXT))
                if sum(len(ids[each]) for each, _ in ended) >= _TOKENS_AT_A_TIME:
                    finish()
        finish()
        assert None not in answers
        done = [answer for answer in answers if answer is not None]
        return [self._judged(answer, each) for answer, each in zip(done, asked, strict=True)] if is_judged else done

    def _judged(self, answer: Answer, asked: Asked) -> Answer:
        self._beat("rollout")
        values = self.rewards.of(answer.text, asked.prompt.record, f"{self.run.policy.prompts}, line {answer.line}")
        return replace(answer, rewards=values, reward=self.rewards.weighted(values))

    @torch.inference_mode()
    def _answers(self, model: CachedModel, made: Sequence[tuple[Asked, list[int], list[torch.Tensor], bool]]
                 ) -> list[Answer]:
        """Answers, of which there are what was asked for, ids, hidden states, and whether an end token ended them."""
        if not made:
            return []
        states_TH = torch.cat([part for _, _, states, _ in made for part in states])
        tokens_T = torch.tensor([token for _, ids, _, _ in made for token in ids], device=model.device)
        logprobs, entropies = [], []
        for rows_TH, tokens in zip(states_TH.split(_TOKENS_AT_A_TIME), tokens_T.split(_TOKENS_AT_A_TIME), strict=True):
            logprobs.append(model.logprobs(rows_TH, tokens, least_rows=TrainingCache.least_rows))
            entropies.append(_entropies(model, rows_TH))
        logprobs_T, entropies_T = torch.cat(logprobs).float().cpu().numpy(), torch.cat(entropies).cpu().numpy()
        answers, first = [], 0
        for asked, ids, _, is_finished in made:
            part, first = slice(first, first + len(ids)), first + len(ids)
            text = self.codec.decode(ids[:len(ids) - is_finished])
            answers.append(Answer(asked.prompt.line, asked.group, asked.prompt.ids, tuple(ids), is_finished, text,
                                  logprobs_T[part].copy(), float(entropies_T[part].mean()), (), 0.0))
        return answers


def _entropies(model: CachedModel, states_TH: torch.Tensor) -> torch.Tensor:
    """Entropy of the distribution behind each hidden state, in nats, fp32 [T]."""
    parts = []
    for rows in states_TH.split(chunk_tokens_on(states_TH.device.type)):
        # -p log p is 0 where p is, without a logarithm of it.
        parts.append(torch.special.entr(model.logits(rows).float().softmax(dim=-1)).sum(dim=-1))
    return torch.cat(parts)


def gathered(mine: Callable[[], list[Answer]], replicas: torch.distributed.ProcessGroup,
             ranks: torch.distributed.ProcessGroup) -> list[list[Answer]]:
    """The answers of all replicas; called by each rank of each, and the same on each.

    Args:
        mine: Function that makes this replica's.
        replicas: This rank's group of data parallelism.
        ranks: This rank's group of tensor parallelism, the first of which has the replica's answers with their rewards.

    Raises:
        ConfigError: an answer of one of them could not be judged; on all of them, so that none waits for it.
    """
    found: list[Answer] | str
    try:
        found = mine()
    except ConfigError as error:
        found = str(error)
    told = [found]
    if ranks.size() > 1:
        torch.distributed.broadcast_object_list(told, group=ranks, group_src=0)
    everyone: list[list[Answer] | str] = told * replicas.size()
    torch.distributed.all_gather_object(everyone, told[0], group=replicas)
    for each in everyone:
        if isinstance(each, str):
            raise ConfigError(each)
    return [each for each in everyone if not isinstance(each, str)]
