"""One pipeline stage of the model, and the losses of the last stage.

Megatron-Core's GPTModel, with a head that returns the main and the MTP losses per token and apart,
instead of attaching the MTP loss to the main one behind the caller's back.

Token ids and labels are of whole sequences. Where ranks share a sequence, hidden states and losses are of this rank's
part of it, its length S then: the embedding takes the part of the ids, and the losses take that of the labels.

Shapes: S sequence, B micro-batch, H hidden, V vocabulary (v its part on this tensor-parallel rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from dsv3_megatron.model.linear import column_parallel_input
from dsv3_megatron.model.observation import HeadAgreement
from dsv3_megatron.model.packed_documents import PackedDocuments
from dsv3_megatron.model.stage.buckets import StageBuckets
from dsv3_megatron.model.stage.weight_gradients import weight_grad_deferral
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy
from dsv3_megatron.parallel.groups import as_pipeline_rank
from dsv3_megatron.parallel.sequence_parts import SequenceParts


class TokenLosses(NamedTuple):
    """Losses of each position of this rank's part of the sequences, in nats, fp32.

    Attributes:
        main_BS: -log p of the next token.
        mtp_BS: one tensor a depth; depth k's -log p of the token k + 1 positions on, 0 in the last k positions of the
            sequence or of an isolated document, where the module has not read the token before that one.
    """

    main_BS: torch.Tensor
    mtp_BS: tuple[torch.Tensor, ...]


class MTPTargets(NamedTuple):
    """What an MTP module of one depth predicts, in whole sequences.

    Attributes:
        labels_BS: The token at each position.
        is_there: bool [S] or [B, S]; False where the sequence, or an isolated document, ends before that token.
    """

    labels_BS: torch.Tensor
    is_there: torch.Tensor


class DeepSeekV3Model(GPTModel):
    """A stage: embedding, layers, MTP modules, head and losses, as its layout says.

    Attributes:
        agreement: Compares the heads in training forwards while it is set; no part of the model.
        buckets: Messages of its gradients and weights, where it is trained.
    """

    agreement: HeadAgreement | None = None
    buckets: StageBuckets | None = None
    _embedding_owner: DeepSeekV3Model | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = SequenceParts.of(self.pg_collection)
        if "embedding" in self._modules:
            self.embedding.register_forward_pre_hook(partial(_embed_part, self.parts), with_kwargs=True)

    @property
    def num_hidden_inputs(self) -> int:
        """Number of hidden states that the stage before gives: the main model's, and those of each of its MTP modules.

        They lie one after the other along the sequence. None come to the first stage, which begins with token ids.
        """
        if self.pre_process:
            return 0
        return 1 + (self.config.mtp_num_layers or 0) if self.post_process and not self.mtp_process else 1

    def use_embedding_of(self, first: DeepSeekV3Model) -> None:
        """Let this stage have the embedding of the first stage, which is on the same rank, instead of a copy.

        It is then no submodule of this stage: its parameter is trained, saved and loaded with the first stage alone.
        """
        assert not self.pre_process
        if self.mtp_process:
            del self.embedding
        object.__setattr__(self, "embedding", first.embedding)
        object.__setattr__(self, "_embedding_owner", first)

    @property
    def embedding_buckets(self) -> StageBuckets | None:
        """Buckets with the embedding that this stage uses, its own or the first stage's."""
        return (self._embedding_owner or self).buckets

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The embedding's weight of this stage or of the first one on the same rank; None where there is neither.

        Megatron-Core sums its gradient over the pipeline ranks that have copies, and asks a rank's first or last stage
        for it. It would be given the output head's weight by a last stage without MTP modules.
        """
        embedding = getattr(self, "embedding", None)
        return None if embedding is None else embedding.word_embeddings.weight

    def _postprocess(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor,
                     labels: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Hidden states to losses; to logits [B, S, V] of the main head without labels.

        A stage with MTP modules in front of the one with the losses gives the hidden states of all depths to it, one
        after the other along the sequence.

        Source of the MTP losses: DeepSeek-V3 report, eq. 21-25. `hidden_states` are after the final norm,
        as in the published code. With isolated documents (`packed_seq_params`) each is a sequence of its own: the
        target of depth k at position i is there where positions i and i + k are in one document, and then it is
        the main model's target at i + k, which counts or not for both.
        """
        has_depths = self.num_hidden_inputs > 1
        documents: PackedDocuments | None = kwargs.get("packed_seq_params")
        if self.mtp_process and not (self.post_process and labels is None):
            with as_pipeline_rank(self.pg_collection.pp.rank()):  # the block looks for MTP modules on ranks before it
                hidden_states = self.mtp(
                    input_ids=input_ids, position_ids=position_ids, hidden_states=hidden_states,
                    attention_mask=kwargs.get("attention_mask"), packed_seq_params=documents, embedding=self.embedding)
            has_depths = True
        if not self.post_process:
            return hidden_states
        main_SBH, *by_depth = self.depths(hidden_states) if has_depths else (hidden_states,)
        if labels is None:
            logits_SBV, _ = self.output_layer(main_SBH, runtime_gather_output=True)
            return logits_SBV.transpose(0, 1).contiguous()
        mtp_losses: list[torch.Tensor] = []
        for depth, pair in enumerate(zip(by_depth, self.mtp_targets(labels, documents), strict=True), start=1):
            self.observe_heads(depth, main_SBH, *pair)
            mtp_losses.append(self.mtp_losses(*pair))
        return TokenLosses(self.token_losses(main_SBH, labels), tuple(mtp_losses))

    def depths(self, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states of the main model and of each MTP module, of a tensor with all of them along the sequence."""
        return hidden_SBH.chunk(1 + (self.config.mtp_num_layers or 0), dim=0)

    def mtp_targets(self, labels_BS: torch.Tensor, documents: PackedDocuments | None) -> list[MTPTargets]:
        """What each MTP module predicts, by depth."""
        if documents is not None and documents.bounds is not None:
            remaining_BS = documents.remaining_BS(labels_BS.device)
        else:
            remaining_BS = torch.arange(labels_BS.shape[1] - 1, -1, -1, device=labels_BS.device)
        targets, depths = [], range(1, 1 + (self.config.mtp_num_layers or 0))
        for depth in depths:
            labels_BS = torch.nn.functional.pad(labels_BS[:, 1:], (0, 1))
            targets.append(MTPTargets(labels_BS, remaining_BS >= depth))
        return targets

    def observe_heads(self, depth: int, main_SBH: torch.Tensor, hidden_SBH: torch.Tensor, targets: MTPTargets) -> None:
        """Show what the main head and an MTP module of this depth predict from to `agreement`, if it is set."""
        if self.agreement is not None and self.training:
            self.agreement.observe(depth, self.output_layer.weight, main_SBH, hidden_SBH, targets.is_there)

    def mtp_losses(self, hidden_SBH: torch.Tensor, targets: MTPTargets) -> torch.Tensor:
        """Losses of an MTP module's output, [B, S], 0 where there is no target."""
        return self.token_losses(hidden_SBH, targets.labels_BS) * self.parts.take(targets.is_there, -1)

    def token_losses(self, hidden_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """-log softmax(head(h))[label] of each position, fp32 [B, S], in nats; the labels are of whole sequences."""
        labels_SB, tp_group = self.parts.take(labels_BS, 1).transpose(0, 1).contiguous(), self.pg_collection.tp
        whole_SBH = column_parallel_input(hidden_SBH, sequence_parallel=self.config.sequence_parallel,
                                          allreduce_dgrad=tp_group.size() > 1, tp_group=tp_group)
        losses_SB = linear_cross_entropy(whole_SBH, self.output_layer.weight, labels_SB, vocabulary_group=tp_group,
                                         accumulate_into_main_grad=True, defer_weight_grad=weight_grad_deferral())
        return losses_SB.transpose(0, 1).contiguous()

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds, without the modules' `_extra_state`.

        That is state of FP8 from one step to the next, which neither bf16 nor block-wise FP8 has. Local and Transformer
        Engine modules do not have it in the same places, and a checkpoint of one shall load into the other.
        """
        has_shared_embedding = self.mtp_process and "embedding" not in self._modules
        if has_shared_embedding:  # Megatron-Core wants to mark the entry as a copy
            self._modules["embedding"] = self.embedding
        with as_pipeline_rank(self.pg_collection.pp.rank()):
            state = super().sharded_state_dict(prefix, *args, **kwargs)
        if has_shared_embedding:  # the first stage saves it
            del self._modules["embedding"], state[f"{prefix}embedding.word_embeddings.weight"]
        return {key: entry for key, entry in state.items() if "_extra_state" not in key}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state as every module does, with empty `_extra_state` where a module expects one that `state_dict` has
        not.
        """
        empty = {f"{path}._extra_state": None for path, module in self.named_modules()
                 if type(module).set_extra_state is not torch.nn.Module.set_extra_state}
        return super().load_state_dict({**empty, **state_dict}, *args, **kwargs)


def _embed_part(parts: SequenceParts, embedding: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
                ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the embedding is given of a call with ids and positions of whole sequences."""
    return args, {name: value if value is None else parts.take(value, 1) for name, value in kwargs.items()}
