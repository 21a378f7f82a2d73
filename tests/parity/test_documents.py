"""Isolated documents: a packed sequence gives what its documents give alone, to the reference in float64.

Losses, gradients and choices of experts, of the main model and the MTP modules; sequences of a micro-batch have
documents of different lengths, of one token and of two among them.

Legend: B sequences, S positions, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv3_megatron.certification.document_step import Bounds, document_step
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.model import ModelConfig
from tests.parity.architectures import BALANCE_LOSS_ALPHA, MTP_LAMBDA, variant
from tests.parity.compare import assert_close, gradients_by_name, relative_error

LENGTH = 24
BOUNDS: dict[int, Bounds] = {1: ((0, 5, 6, 20, 24),), 2: ((0, 5, 6, 20, 24), (0, 11, 13, 24))}
EOD = 3
FLOAT32_TOLERANCE = 3e-5  # as in test_model.py


def batch(vocab_size: int, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and the ids of positions that restart; documents end with EOD, which is nowhere else."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(EOD + 1, vocab_size, (len(bounds), LENGTH + 1), generator=generator)
    positions = torch.empty(len(bounds), LENGTH, dtype=torch.int64)
    for row, starts in enumerate(bounds):
        for start, end in zip(starts, starts[1:], strict=False):
            ids[row, end - 1] = EOD if end < LENGTH else ids[row, end - 1]
            positions[row, start:end] = torch.arange(end - start)
    return ids[:, :-1], ids[:, 1:], positions


def check(build: Callable, groups: object, model_config: ModelConfig, bounds: Bounds, *, told: Bounds | None = None,
          restart: bool = True, is_eod_counted: bool = True, dtype: torch.dtype = torch.float64,
          **tolerance: float) -> None:
    """Our model on packed sequences against the reference on each document; `told` are bounds that are wrong."""
    from dsv3_megatron.model.losses import sum_losses
    from dsv3_megatron.model.packed_documents import PackedDocuments
    from dsv3_megatron.model.router import weigh_balance_losses
    from dsv3_megatron.optim.router_bias import routers

    model, weights = build(model_config, dtype)
    weights = {name: weight.clone().requires_grad_("bias" not in name) for name, weight in weights.items()}
    tokens_BS, labels_BS, positions_BS = batch(model_config.vocab_size, bounds)
    mask_BS = torch.ones(tokens_BS.shape) if is_eod_counted else (tokens_BS != EOD).float()
    expected = document_step(weights, model_config, tokens_BS, labels_BS, mask_BS, bounds, mtp_weight=MTP_LAMBDA,
                             balance_loss_alpha=BALANCE_LOSS_ALPHA)
    expected.total.backward()

    weigh_balance_losses([model], num_tokens=int(mask_BS.sum()), num_sequences=len(bounds))
    chosen = {}
    for layer, router in routers([model], model_config.num_layers):
        router.register_forward_hook(lambda _m, _i, out, layer=layer: chosen.update({layer: out[1]}))
    documents = PackedDocuments(told or bounds, positions_BS if restart else None)
    output = model(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, labels=labels_BS,
                   packed_seq_params=documents)
    total, count, report = sum_losses(mask_BS, output, mtp_weight=MTP_LAMBDA)
    total.backward()

    assert count == mask_BS.sum()
    assert_close(report["sums"][1], expected.main, "main loss", **tolerance)
    for depth, theirs in enumerate(expected.mtp, start=1):
        assert_close(report["sums"][1 + depth], theirs, f"MTP loss of depth {depth}", **tolerance)
    assert chosen.keys() == expected.experts.keys()
    for layer, map_TE in chosen.items():
        ids_SBK = map_TE.nonzero()[:, 1].view(LENGTH, len(bounds), model_config.moe_router_topk)
        assert torch.equal(ids_SBK.transpose(0, 1), expected.experts[layer]), f"experts of layer {layer}"
    for layer, router in routers([model], model_config.num_layers):
        # Reported in fp32 in every precision.
        assert_close(router.balance_loss_sum, expected.balance[layer], f"balance loss of layer {layer}", tolerance=1e-5)
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for name, gradient in gradients_by_name(model, groups).items():
        assert_close(gradient, whole_from_reference(name, gradients, model_config.num_layers), f"gradient of {name}",
                     **tolerance)


@pytest.mark.parametrize("batch_size", BOUNDS)
@pytest.mark.parametrize("name", ["plain", "mtp-2-groups", "yarn", "no-mtp"])
def test_packed_documents_equal_documents_alone(build, groups, name, batch_size):
    check(build, groups, variant(name), BOUNDS[batch_size])


@pytest.mark.parametrize("name", ["plain", "yarn"])
def test_positions_that_do_not_restart_change_nothing_but_rounding(build, groups, name):
    """Scores depend on the distance of two tokens, and both are in one document."""
    check(build, groups, variant(name), BOUNDS[2], restart=False)


def test_a_masked_eod_is_a_target_of_no_depth(build, groups):
    check(build, groups, variant("mtp-2-groups"), BOUNDS[2], is_eod_counted=False)


def test_in_fp32(build, groups):
    check(build, groups, variant("mtp-2-groups"), BOUNDS[2], dtype=torch.float32, tolerance=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("told", [
    ((0, 24), (0, 24)),
    ((0, 5, 6, 20, 24), (0, 11, 24)),
    ((0, 5, 6, 21, 24), (0, 11, 13, 24)),
    ((0, 11, 13, 24), (0, 5, 6, 20, 24)),
], ids=["no bounds", "one lost", "one late", "rows swapped"])
def test_a_leak_between_documents_is_found(build, groups, told):
    with pytest.raises(AssertionError, match="main loss: relative error"):
        check(build, groups, variant("plain"), BOUNDS[2], told=told)


def test_a_leak_into_the_mtp_module_is_found(build, groups, monkeypatch):
    """The next document's tokens in the last positions: no loss shows it, the routers do."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    from dsv3_megatron.model.mtp import DocumentMTPLayer

    def across(self, *args, packed_seq_params=None, **kwargs):
        return MultiTokenPredictionLayer._get_embeddings(self, *args, **kwargs)

    monkeypatch.setattr(DocumentMTPLayer, "_get_embeddings", across)
    with pytest.raises(AssertionError, match="experts of layer 3"):
        check(build, groups, variant("plain"), BOUNDS[2])


def test_an_mtp_target_beyond_the_document_is_found(build, groups, monkeypatch):
    from dsv3_megatron.model.packed_documents import PackedDocuments

    monkeypatch.setattr(PackedDocuments, "remaining_BS", lambda self, device: torch.arange(LENGTH - 1, -1, -1))
    with pytest.raises(AssertionError, match="MTP loss of depth 1: relative error"):
        check(build, groups, variant("plain"), BOUNDS[2])


@pytest.mark.parametrize(("is_there", "has_documents", "chosen", "reason"), [
    (True, False, "transformer_engine", ""),
    (True, True, "local", " (it isolates documents)"),
    (False, True, "local", " (no transformer_engine package and no CUDA device)"),
])
def test_auto_builds_modules_that_know_documents(groups, monkeypatch, caplog, is_there, has_documents, chosen, reason):
    from dsv3_megatron.model import specs

    monkeypatch.setattr(specs, "is_installed", lambda package: is_there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    with caplog.at_level("INFO", "dsv3_megatron"):
        assert specs.resolve_transformer_impl("auto", has_documents=has_documents) == chosen
    assert caplog.messages == [f"transformer_impl auto: {chosen}{reason}"]


def test_restarting_positions_alone(build):
    """Without isolation they matter: queries and keys are those of the documents alone, and attention is not."""
    from dsv3_megatron.model.packed_documents import PackedDocuments

    model_config, bounds = variant("plain"), BOUNDS[2]
    attention = build(model_config)[0].decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(1)
    x_SBH = torch.randn(LENGTH, 2, model_config.hidden_size, generator=generator, dtype=torch.float64)
    *_, positions_BS = batch(model_config.vocab_size, bounds)
    packed = attention.query_key_value(x_SBH, positions_BS)
    for row, starts in enumerate(bounds):
        for start, end in zip(starts, starts[1:], strict=False):
            alone = attention.query_key_value(x_SBH[start:end, row : row + 1])
            for ours, theirs in zip(packed, alone, strict=True):
                assert_close(ours[start:end, row : row + 1], theirs, f"row {row}, {start}..{end - 1}")
    default = attention(x_SBH)[0]
    restarted = attention(x_SBH, packed_seq_params=PackedDocuments(None, positions_BS))[0]
    counted = attention(x_SBH, packed_seq_params=PackedDocuments(None, torch.arange(LENGTH).expand(2, -1)))[0]
    assert torch.equal(counted, default)
    assert torch.equal(restarted[:5, 0], default[:5, 0])
    assert relative_error(restarted, default) > 1e-3
