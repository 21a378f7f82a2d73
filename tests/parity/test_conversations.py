"""Packed conversations give what each conversation gives alone: to Transformers' model, and to ours without packing.

Ours reads what a run reads: a dataset with its mask, packed by `data/chat`. Transformers' reads each conversation by
itself, with labels of -100 where a token does not count, as TRL's SFTTrainer does; tools/experiments/sft_beside_trl.py
compares with that trainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.certification.reference import Weights
from dsv3_megatron.certification.reference_weights import Architecture
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.chat import packed_samples as samples
from dsv3_megatron.data.chat.packing import Packing
from tests.parity.architectures import MTP_LAMBDA, variant
from tests.parity.compare import assert_close, gradients_by_name
from tests.transformers_model import huggingface_gradients, huggingface_model
from tests.unit.data.chat.written import write_conversations

LENGTHS = [3, 17, 9, 2, 5, 5, 12, 16, 8, 25, 4, 21]
SEQ_LENGTH = 24
# fp32 on both sides, sums in another order; largest seen 2e-6.
TOLERANCE = 1e-5


def our_step(build: Callable, groups: object, config: ModelConfig, prefix: str) -> tuple[torch.Tensor, Any, Weights]:
    """Sums of the losses over the whole dataset, with the number of tokens, and their gradient; the weights too."""
    from dsv3_megatron.model.losses import sum_losses
    from dsv3_megatron.model.packed_documents import forward_stage
    from dsv3_megatron.model.router import weigh_balance_losses

    model, weights = build(config, torch.float32, moe_aux_loss_coeff=0.0)
    weigh_balance_losses([model], num_tokens=1, num_sequences=1)
    source = samples.PackedConversations(prefix, (0, len(LENGTHS)), seq_length=SEQ_LENGTH, seed=1)
    rows = source.samples_per_epoch
    batches = BatchIterator(samples.ConversationSamples(source, rows), micro_batch_size=1, global_batch_size=rows)
    sums = torch.zeros(2 + config.mtp_num_layers, dtype=torch.float64)
    for _, batch in zip(range(rows), batches, strict=False):
        output = forward_stage(model, batch, DataConfig(sft=True))
        total, _, report = sum_losses(batch.loss_mask_BS, output, mtp_weight=MTP_LAMBDA)
        total.backward()
        sums += report["sums"]
    return sums, gradients_by_name(model, groups), weights


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, list[list[int]], list[list[int]]]:
    prefix = str(tmp_path / "chat")
    return prefix, *write_conversations(prefix, LENGTHS)


def with_vocabulary(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(variant(name), vocab_size=48, max_position_embeddings=64, **changes)


def test_equals_transformers_on_each_conversation(build, groups, data) -> None:
    prefix, ids, masks = data
    config = with_vocabulary("groups", mtp_num_layers=0)
    sums, gradients, weights = our_step(build, groups, config, prefix)
    model = huggingface_model(Architecture.of(config), {name: value.float() for name, value in weights.items()})
    total, count = torch.zeros(()), 0
    for tokens, mask in zip(ids, masks, strict=True):
        labels = torch.tensor([[token if is_counted else -100 for token, is_counted in zip(tokens, mask, strict=True)]])
        logits = model(torch.tensor([tokens])).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        count += sum(mask[1:])
    total.backward()
    theirs = huggingface_gradients(model, None, Architecture.of(config))
    assert sums[0] == count
    assert_close(sums[1], total, "loss", tolerance=TOLERANCE)
    for name, gradient in gradients.items():
        assert_close(gradient, whole_from_reference(name, theirs, config.num_layers), f"gradient of {name}",
                     tolerance=TOLERANCE)


@pytest.mark.parametrize("depths", [0, 2])
def test_packed_equals_unpacked(build, groups, data, monkeypatch, depths) -> None:
    prefix, *_ = data
    config = with_vocabulary("groups", mtp_num_layers=depths)
    packed = our_step(build, groups, config, prefix)
    monkeypatch.setattr(samples, "pack_lengths", lambda lengths_d, capacity, key: Packing(
        np.arange(len(lengths_d)), np.arange(len(lengths_d) + 1)))
    alone = our_step(build, groups, config, prefix)
    assert packed[0][0] == alone[0][0]
    assert_close(packed[0], alone[0], "losses", tolerance=TOLERANCE)
    for name, gradient in packed[1].items():
        assert_close(gradient, alone[1][name], f"gradient of {name}", tolerance=TOLERANCE)


def _merged(read: Callable) -> Callable:
    """A reader that forgets where conversations end."""
    return lambda self, index: dataclasses.replace(read(self, index), bounds=(0, SEQ_LENGTH))


def test_conversations_that_see_each_other_are_noticed(build, groups, data, monkeypatch) -> None:
    prefix, *_ = data
    config = with_vocabulary("groups", mtp_num_layers=0)
    apart = our_step(build, groups, config, prefix)
    monkeypatch.setattr(samples.PackedConversations, "read", _merged(samples.PackedConversations.read))
    merged = our_step(build, groups, config, prefix)
    with pytest.raises(AssertionError, match="losses: relative error"):
        assert_close(merged[0], apart[0], "losses", tolerance=TOLERANCE)
