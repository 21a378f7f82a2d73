"""One pipeline stage as a sequence of segments between exchanges of tokens with other ranks.

    embedding | dense layer | ... | MoE layer: attention, router -> dispatch -> experts -> combine -> residual | ...
    | final norm | MTP module: embedding, projection, MoE layer, norm, its losses | ... | head, losses, loss

Where the losses are in a stage behind that of the MTP modules, the one ends with the hidden states of all depths in one
tensor, and the other begins with taking them apart.

`->` is an all-to-all among the expert-parallel ranks, posted early and waited for when the pass is resumed. The shared
experts are computed with the routed ones, where they are between two transfers. A dense layer is one segment; so is
every layer without expert parallelism, since nothing is to be waited for in it. The collectives of tensor and sequence
parallelism, and the exchange of token counts before a dispatch, stay inside the segments and block. Where whole layers
are recomputed in backward (`recompute_granularity=full`) a layer is one segment too, and its transfers block, forward
and both times backward.

The pieces are Megatron-Core's layer, MoE layer and token dispatcher. What they note on themselves in a forward pass is
noted on a copy for each micro-batch, so that micro-batches do not meet there.

Not here: dropout's random states and FP8's contexts, of which this model's layers need none.

Shapes: S sequence, B micro-batch, H hidden, R routed rows, T tokens, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.language_model import DeepSeekV3Model, TokenLosses
from dsv3_megatron.model.node_dispatcher import NodeDispatcher
from dsv3_megatron.model.packed_documents import PackedDocuments
from dsv3_megatron.model.stage.buckets import EMBEDDING, HEAD, StageBuckets, layer_place
from dsv3_megatron.model.stage.tape import Tape, Value
from dsv3_megatron.model.stage.weight_gradients import delaying_modules
from dsv3_megatron.model.token_dispatcher import GatedDispatcher

ValueSteps = Generator[None, None, Value]
# Of a micro-batch's token losses: the sum to differentiate, which alone is a `Value` afterwards.
LossOf = Callable[[TokenLosses], torch.Tensor]


class SegmentedStage:
    """A stage's module, run on a tape.

    Args:
        module: The stage, not wrapped.
    """

    def __init__(self, module: DeepSeekV3Model) -> None:
        self.module = module
        self.layers = [SegmentedLayer(layer) for layer in module.decoder.layers]
        self.mtp_layers = list(module.mtp.layers) if module.mtp_process else []
        self.mtp_inner = [SegmentedLayer(layer.mtp_model_layer) for layer in self.mtp_layers]
        self.delaying_mtp = [delaying_modules(layer.eh_proj) for layer in self.mtp_layers]

    def forward(self, tape: Tape, hidden_SBH: Value | None, batch: Batch, documents: PackedDocuments | None,
                loss_of: LossOf) -> ValueSteps:
        """Run the stage; yields with each exchange under way.

        Args:
            tape: Tape of this micro-batch.
            hidden_SBH: What the previous stage gave; None on the first.
            batch: The micro-batch, on the stage's device.
            documents: Document bounds and positions, as `forward_stage` passes them to the module.
            loss_of: Called on the last stage.

        Returns:
            The stage's output; the loss on the last stage.
        """
        module = self.module
        if module.pre_process or module.mtp_process:
            _come_by(tape, module.embedding_buckets, EMBEDDING)
        if hidden_SBH is None:
            assert module.pre_process, "only the first stage has no input"
            (hidden_SBH,) = tape.run(lambda: module.embedding(input_ids=batch.tokens_BS,
                                                              position_ids=batch.position_ids_BS))
        for index, layer in enumerate(self.layers):
            _come_by(tape, module.buckets, layer_place(index))
            hidden_SBH = yield from layer.forward(tape, hidden_SBH, documents)
        _come_by(tape, module.buckets, HEAD)
        if module.decoder.final_layernorm is not None:
            (hidden_SBH,) = tape.run(module.decoder.final_layernorm, hidden_SBH)
        if module.post_process:
            losses = yield from self._token_losses(tape, hidden_SBH, batch, documents)
            (loss,) = tape.run(lambda main_BS, *mtp_BS: loss_of(TokenLosses(main_BS, mtp_BS)), *losses)
            return loss
        if self.mtp_layers:
            modules = _MTPPass(self, tape, batch, documents)
            depths = [hidden_SBH]
            for depth in range(len(self.mtp_layers)):
                depths.append((yield from modules.forward(depth, depths[-1])))
            (hidden_SBH,) = tape.run(lambda *depths_SBH: torch.cat(depths_SBH), *depths)
        return hidden_SBH

    def _token_losses(self, tape: Tape, hidden_SBH: Value, batch: Batch, documents: PackedDocuments | None
                      ) -> Generator[None, None, tuple[Value, ...]]:
        """Main losses, then those of each MTP module; in the order of the module's own forward pass."""
        module = self.module
        losses: list[Value] = []
        modules = _MTPPass(self, tape, batch, documents)
        given: list[Value] = []
        if module.num_hidden_inputs > 1:  # the modules are in the stage before
            hidden_SBH, *given = tape.run(module.depths, hidden_SBH)
        hidden_k = hidden_SBH
        for depth, targets_k in enumerate(module.mtp_targets(batch.labels_BS, documents)):
            hidden_k = given[depth] if given else (yield from modules.forward(depth, hidden_k))
            module.observe_heads(1 + depth, hidden_SBH.tensor, hidden_k.tensor, targets_k)
            losses += tape.run(lambda h_SBH, targets_k=targets_k: module.mtp_losses(h_SBH, targets_k), hidden_k)
        main = tape.run(lambda h_SBH: module.token_losses(h_SBH, batch.labels_BS), hidden_SBH)
        return (*main, *losses)


def _come_by(tape: Tape, buckets: StageBuckets | None, place: str) -> None:
    if buckets is not None:
        buckets.pass_forward(place)
        tape.note_place(partial(buckets.pass_back, place))


class _MTPPass:
    """One micro-batch's pass through a stage's MTP modules, one after the other."""

    def __init__(self, stage: SegmentedStage, tape: Tape, batch: Batch, documents: PackedDocuments | None) -> None:
        self.stage, self.tape, self.documents = stage, tape, documents
        self.tokens, self.positions = Value(batch.tokens_BS), Value(batch.position_ids_BS)

    def forward(self, depth: int, hidden_SBH: Value) -> ValueSteps:
        """Run the module of a depth, counted from 0, on the hidden states of the one before; yields as a layer does."""
        stage, tape = self.stage, self.tape
        layer = stage.mtp_layers[depth]
        self.tokens, self.positions, embedded = self._next_tokens(layer)
        (hidden_SBH,) = tape.run(layer._concat_embeddings, hidden_SBH, embedded, delaying=stage.delaying_mtp[depth])
        hidden_SBH = yield from stage.mtp_inner[depth].forward(tape, hidden_SBH, self.documents)
        (hidden_SBH,) = tape.run(layer._postprocess, hidden_SBH)
        return hidden_SBH

    def _next_tokens(self, layer: Any) -> tuple[Value, ...]:
        """Tokens and positions one further on, and the embeddings of those tokens."""

        def shift_and_embed(tokens_BS: torch.Tensor, positions_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
            # The layer passes hidden states through here and looks at nothing in them.
            unused = torch.empty(0, device=tokens_BS.device)
            tokens_BS, positions_BS, _padding, embedded_SBH, _ = layer._get_embeddings(
                input_ids=tokens_BS, position_ids=positions_BS, embedding=self.stage.module.embedding,
                hidden_states=unused, packed_seq_params=self.documents)
            return tokens_BS, positions_BS, embedded_SBH

        return self.tape.run(shift_and_embed, self.tokens, self.positions)


class SegmentedLayer:
    """A transformer layer, run on a tape.

    Args:
        layer: Megatron-Core's transformer layer.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        # A dispatcher of another library is not taken apart: its layers are a segment each, and block.
        self.has_remote_experts = (isinstance(layer.mlp, MoELayer) and layer.mlp.ep_group.size() > 1
                                   and not isinstance(layer.mlp.token_dispatcher, MoEFlexTokenDispatcher))
        self.delaying = delaying_modules(layer)
        if self.has_remote_experts:
            self.delaying_attention = delaying_modules(layer.self_attention)
            self.delaying_experts = delaying_modules(layer.mlp.experts, layer.mlp.shared_experts)

    def forward(self, tape: Tape, hidden_SBH: Value, documents: PackedDocuments | None) -> ValueSteps:
        """Run the layer; yields with each exchange under way."""
        layer = self.layer
        is_recomputed = layer.config.recompute_granularity == "full" and layer.training
        if self.has_remote_experts and not is_recomputed:
            return (yield from _MoEPass(self).forward(tape, hidden_SBH, documents))

        def whole_layer(h_SBH: torch.Tensor) -> torch.Tensor:
            return layer(hidden_states=h_SBH, attention_mask=None, packed_seq_params=documents)[0]

        (hidden_SBH,) = tape.run(partial(checkpoint, whole_layer, False) if is_recomputed else whole_layer,
                                 hidden_SBH, delaying=self.delaying)
        return hidden_SBH


class _MoEPass:
    """One micro-batch's pass through an MoE layer whose experts are on several ranks."""

    def __init__(self, segmented: SegmentedLayer) -> None:
        self.segmented = segmented
        self.layer = copy.copy(segmented.layer)
        self.moe = self.layer.mlp
        self.dispatcher: GatedDispatcher | NodeDispatcher = copy.copy(self.moe.token_dispatcher)

    def forward(self, tape: Tape, hidden_SBH: Value, documents: PackedDocuments | None) -> ValueSteps:
        residual_SBH, normed_SBH, routed = tape.run(
            lambda h_SBH: self.attend_and_route(h_SBH, documents), hidden_SBH,
            delaying=self.segmented.delaying_attention)
        dispatcher = self.dispatcher
        if isinstance(dispatcher, NodeDispatcher):
            arrived = yield from tape.carry(dispatcher.outward(), normed_SBH, routed)
        else:
            splits = dispatcher.read_splits()
            assert splits is not None, "its experts are on several ranks"
            outward, homeward, back = dispatcher.outward(), dispatcher.homeward(), splits.reversed()
            arrived = yield from tape.exchange(routed, splits=splits, narrow=outward)
            del outward  # and its records
        rows_RH, *shared_SBH = tape.run(self.apply_experts, normed_SBH, *arrived,
                                        delaying=self.segmented.delaying_experts)
        del arrived, normed_SBH, routed
        if isinstance(dispatcher, NodeDispatcher):
            (rows_RH,) = yield from tape.carry(dispatcher.homeward(), rows_RH)
        else:
            (rows_RH,) = yield from tape.exchange(rows_RH, splits=back, narrow=homeward)
        (output_SBH,) = tape.run(self.add, rows_RH, residual_SBH, *shared_SBH)
        return output_SBH

    def attend_and_route(self, hidden_SBH: torch.Tensor, documents: PackedDocuments | None
                         ) -> tuple[torch.Tensor, ...]:
        """Attention with its residual; that, its norm, and a gated row for each token and expert, or tokens' gates."""
        hidden_SBH, _context = self.layer._forward_attention(
            hidden_states=hidden_SBH, attention_mask=None, packed_seq_params=documents)
        normed_SBH = self.layer._forward_pre_mlp_layernorm(hidden_SBH)
        probs_TE, routing_map_TE = self.moe.route(normed_SBH)
        gated, gates = self.dispatcher.dispatch_preprocess(normed_SBH, routing_map_TE, probs_TE)
        return hidden_SBH, normed_SBH, gates if isinstance(self.dispatcher, NodeDispatcher) else gated

    def apply_experts(self, normed_SBH: torch.Tensor, *arrived: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Routed experts on the rows that came, in the order in which they go back; shared experts, if any, on ours."""
        rows_RH, counts_e, gates_R = self.dispatcher.dispatch_postprocess(arrived[0], arrived[-1])
        outputs_RH, bias = self.moe.experts(rows_RH, counts_e, gates_R)
        assert bias is None
        outputs_RH = self.dispatcher.combine_preprocess(outputs_RH)
        shared_SBH = self.moe.shared_experts_compute(normed_SBH)
        return (outputs_RH,) if shared_SBH is None else (outputs_RH, shared_SBH)

    def add(self, rows_RH: torch.Tensor, residual_SBH: torch.Tensor, *shared_SBH: torch.Tensor) -> torch.Tensor:
        """Sum of each token's experts, shared ones and the residual."""
        output_SBH = sum(shared_SBH, self.dispatcher.combine_postprocess(rows_RH))
        return self.layer._forward_post_mlp((output_SBH, None), residual_SBH)
