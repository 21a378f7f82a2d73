"""GRPO on a whole model: gradients of packed answers are Transformers' on each answer alone; generation has the bits of
the training forward.

tools/experiments/grpo_beside_trl.py compares with TRL's trainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.certification.reference_weights import Architecture
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.chat.prompts import ChatPrompt
from dsv3_megatron.ops.backend import choose_product_backend
from dsv3_megatron.post_training.answer_rows import AnswerRows
from dsv3_megatron.post_training.objective import ObjectiveSettings, packed_loss
from dsv3_megatron.post_training.rewards import Rewards
from dsv3_megatron.post_training.rollout import Answer
from tests.digit_tokenizer import write_digit_tokenizer
from tests.parity.architectures import run_of, variant
from tests.parity.compare import assert_close, gradients_by_name
from tests.transformers_model import huggingface_gradients, huggingface_model
from tests.unit.post_training.test_objective import defined

# Tokens of prompts and answers.
LENGTHS = [(3, 4), (2, 9), (6, 1), (4, 5), (1, 7)]
# Whose prompt each of them has: its own, or another's too.
OWN, SHARED = (0, 1, 2, 3, 4), (0, 0, 3, 0, 3)
SEQ_LENGTH = 15
# fp32 on both sides, sums in another order; largest seen 2e-6.
TOLERANCE = 1e-5


def batches_of(answers: list[Answer], seq_length: int, micro_batch_size: int = 1, num_repeated: int | None = 1
               ) -> tuple[BatchIterator, AnswerRows]:
    rows = AnswerRows(answers, seq_length, filling=1, will_do=lambda number: number % micro_batch_size == 0,
                      num_repeated=num_repeated)
    return BatchIterator(rows.samples(), micro_batch_size=micro_batch_size, global_batch_size=rows.num_rows), rows


def made_up(seed: int = 0, whose: tuple[int, ...] = OWN) -> list[Answer]:
    draws = np.random.default_rng(seed)
    made = [Answer(number + 1, number, tuple(draws.integers(0, 48, prompt)), tuple(draws.integers(0, 48, length)), True,
                   "", (-4 + 0.2 * draws.standard_normal(length)).astype(np.float32), 0.0, (), 0.0,
                   float(draws.standard_normal()), (-4 + 0.2 * draws.standard_normal(length)).astype(np.float32))
            for number, (prompt, length) in enumerate(LENGTHS)]
    return [dataclasses.replace(answer, prompt_ids=made[other].prompt_ids)
            for answer, other in zip(made, whose, strict=True)]


def shares_prompts(rows: AnswerRows) -> bool:
    return any(rows.read(row).continued for row in range(rows.num_rows))


@pytest.mark.parametrize(("level", "whose"), [
    ("sequence", OWN), ("answer", OWN), ("token", OWN), ("sequence", SHARED), ("token", SHARED)])
def test_equals_transformers_on_each_answer(build: Callable, groups: Any, level: str, whose: tuple[int, ...]) -> None:
    from dsv3_megatron.model.packed_documents import forward_stage

    config = dataclasses.replace(variant("groups", mtp_num_layers=0), max_position_embeddings=64)
    # Wide enough for what an untrained model gives to these tokens, narrow enough for some to be clipped.
    settings, answers = ObjectiveSettings(level, 0.3, 0.1), made_up(whose=whose)
    model, weights = build(config, torch.float32, moe_aux_loss_coeff=0.0)
    from dsv3_megatron.model.router import weigh_balance_losses

    weigh_balance_losses([model], num_tokens=1, num_sequences=1)
    sums, (batches, rows) = torch.zeros(5, dtype=torch.float64), batches_of(answers, SEQ_LENGTH)
    assert shares_prompts(rows) == (whose == SHARED)
    for _, batch in zip(range(rows.num_rows), batches, strict=False):
        losses = forward_stage(model, batch, DataConfig(sft=True))
        loss, _, report = packed_loss(batch, losses, settings, mtp_weight=0.0)
        loss.backward()
        sums += report["sums"]
    peer = huggingface_model(Architecture.of(config), {name: value.float() for name, value in weights.items()})
    found = []
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
        logprobs = peer(ids).logits[0, len(answer.prompt_ids) - 1:-1].log_softmax(-1)
        assert answer.reference_logprobs_T is not None
        found.append((logprobs.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0], torch.from_numpy(answer.logprobs_T),
                      torch.from_numpy(answer.reference_logprobs_T)))
    expected, told = defined(found, [answer.advantage for answer in answers], settings)
    (expected * sums[0].item()).backward()
    assert_close(sums[1] / sums[0], expected.detach().double(), "loss", tolerance=TOLERANCE)
    assert (sums[2:] / sums[0]).tolist() == pytest.approx(told, rel=1e-4) and told[1] > 0
    theirs = huggingface_gradients(peer, None, Architecture.of(config))
    for name, gradient in gradients_by_name(model, groups).items():
        assert_close(gradient, whole_from_reference(name, theirs, config.num_layers), f"gradient of {name}",
                     tolerance=TOLERANCE)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_shared_prompt_gives_what_its_copies_do(build: Callable, groups: Any, micro_batch_size: int) -> None:
    """Losses of the main model and of two MTP modules, and gradients; what is independent is the prompt's copies."""
    from dsv3_megatron.model.packed_documents import forward_stage
    from dsv3_megatron.model.router import weigh_balance_losses

    config, draws = variant("mtp-2-groups", max_position_embeddings=64), np.random.default_rng(3)
    prompts = [tuple(draws.integers(0, 48, length)) for length in (6, 9, 3, 4)]
    answers = [dataclasses.replace(answer, prompt_ids=prompts[number % 4])
               for number, answer in enumerate([*made_up(1), *made_up(2), *made_up(3)])]
    found = []
    for num_repeated in (None, 1 + config.mtp_num_layers):
        model, _ = build(config, torch.float64, moe_aux_loss_coeff=0.0)
        weigh_balance_losses([model], num_tokens=1, num_sequences=1)
        batches, rows = batches_of(answers, 40, micro_batch_size, num_repeated)
        assert shares_prompts(rows) == (num_repeated is not None)
        sums = torch.zeros(5 + config.mtp_num_layers, dtype=torch.float64)
        for _, batch in zip(range(rows.num_rows // micro_batch_size), batches, strict=False):
            losses = forward_stage(model, batch, DataConfig(sft=True))
            loss, _, report = packed_loss(batch, losses, ObjectiveSettings("token", 0.3, 0.1), mtp_weight=0.3)
            loss.backward()
            sums += report["sums"]
        found.append((rows.num_rows, sums, gradients_by_name(model, groups)))
    (many, expected, theirs), (few, told, gradients) = found
    assert few < many
    assert_close(told, expected, "sums", tolerance=1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name], f"gradient of {name}", tolerance=1e-6)


def test_shared_prompts_have_their_gradients_when_attention_is_computed_again(build: Callable, groups: Any) -> None:
    from dsv3_megatron.model.packed_documents import forward_stage
    from dsv3_megatron.model.recomputed_modules import set_recomputed
    from dsv3_megatron.model.router import weigh_balance_losses

    config, found = dataclasses.replace(variant("groups", mtp_num_layers=0), max_position_embeddings=64), []
    for names in ((), ("mla_up_proj",)):
        model, _ = build(config, torch.float32, moe_aux_loss_coeff=0.0)
        set_recomputed([model], names)
        weigh_balance_losses([model], num_tokens=1, num_sequences=1)
        batches, rows = batches_of(made_up(whose=SHARED), 40)
        assert shares_prompts(rows)
        for _, batch in zip(range(rows.num_rows), batches, strict=False):
            losses = forward_stage(model, batch, DataConfig(sft=True))
            packed_loss(batch, losses, ObjectiveSettings("token", 0.3, 0.1), mtp_weight=0.0)[0].backward()
        found.append(gradients_by_name(model, groups))
    kept, again = found
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("speculative", "together"), [(None, 1), (None, 5), ("mtp", 5)])
def test_answers_have_the_bits_of_the_training_forward(groups: Any, tmp_path: Path, speculative: str | None,
                                                       together: int, precision: str) -> None:
    if precision == "bf16" and choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) != "native":
        pytest.skip("this processor has no units for bf16: it multiplies in fp32, which is tested as such")
    from dsv3_megatron.generation.text import TextCodec
    from dsv3_megatron.model.build import build_stages
    from dsv3_megatron.model.packed_documents import forward_stage
    from dsv3_megatron.post_training.sampler import Asked, Sampler

    architecture = variant("groups", vocab_size=24, max_position_embeddings=64)
    run = policy_tuned(run_of(architecture, precision=precision)).override(
        prompts="p.jsonl", max_new_tokens=17, seq_length=60, rollout_speculative=speculative,
        rollout_batch_size=together, tokenizer_model=write_digit_tokenizer(tmp_path))
    model = build_stages(run, groups, precision=precision)[0][0].eval()
    sampler = Sampler(run, TextCodec(str(tmp_path)), Rewards((), 1.0), lambda doing: None)
    draws = np.random.default_rng(0)
    prompts = [ChatPrompt(1, tuple(draws.integers(0, 24, length)), {}) for length in (3, 9, 4, 4, 12)]
    asked = [Asked(prompt, number % 5, number) for number, prompt in enumerate([*prompts, *prompts[1:]])]
    answers = sampler.answer(model, asked, rollout=0)
    batches, rows = batches_of(answers, 60, micro_batch_size=2, num_repeated=1 + run.model.mtp_num_layers)
    assert shares_prompts(rows)
    values = []
    with torch.no_grad():
        for _, batch in zip(range(rows.num_rows // 2), batches, strict=False):
            values += list((-forward_stage(model, batch, DataConfig(sft=True)).main_BS).numpy())
    for answer, logprobs_T in zip(answers, rows.by_answer(values[:len(rows.packing)]), strict=True):
        assert answer.logprobs_T.tobytes() == logprobs_T.tobytes()
    assert sum(len(answer.ids) for answer in answers) > 30
    # And by a model that did not draw them, here the same one: prompts once, answers of other lengths side by side.
    from dsv3_megatron.generation.forward import CachedModel
    from dsv3_megatron.generation.scoring import answer_logprobs

    twice = [*answers, *answers]
    found = answer_logprobs(CachedModel(model), [answer.prompt_ids for answer in twice],
                            [answer.ids for answer in twice], batch_size=4)
    for answer, logprobs in zip(twice, found, strict=True):
        assert answer.logprobs_T.tobytes() == logprobs.numpy().tobytes()
