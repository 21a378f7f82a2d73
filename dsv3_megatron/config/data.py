"""The data that a run reads, and how documents share a sequence. Plain frozen data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.fields import InPhases, option
from dsv3_megatron.config.values import hold_tuples

# What becomes of a conversation that is longer than a sequence.
LONG_CONVERSATIONS = ("refuse", "cut", "drop")
# Fields of DataConfig that are off where documents are packed and nothing else.
DOCUMENT_SWITCHES = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")


@dataclass(frozen=True)
class DataConfig:
    """The data that a run reads, and how documents share a sequence. A data path is a prefix: PREFIX.bin and
    PREFIX.idx.

    Documents are packed, and by default nothing keeps those of one sequence apart. Source: DeepSeek-V3 report, section
    4.1. The three switches are Megatron-LM's. The routers do not know of them: balance losses stay per sequence and
    expert loads per step, of all tokens. With `sft` conversations take the place of documents: the report, section 5.1.
    """

    data_path: tuple[str, ...] = option(
        (), nargs="*", in_phases=InPhases.CHANGED, help="training data: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
    valid_data_path: tuple[str, ...] = option(
        (), nargs="*", in_phases=InPhases.CHANGED, help="validation data, likewise, or several sets with a name each, "
        "NAME=PREFIX NAME=PREFIX ...; none: a share of data_path")
    split: str = option("99,1,0", help="shares of data_path for training, validation and test without valid_data_path")
    data_cache_path: str | None = option(None, help="folder for what was found by reading data without "
                                         "a sidecar; none: beside the data")
    tokenizer_model: str | None = option(None, help="tokenizer folder; its fingerprint must match the data's")
    reset_attention_mask: bool = option(False, help="no position attends across an end-of-document token (EOD)")
    reset_position_ids: bool = option(False, help="rotary positions restart after an EOD")
    eod_mask_loss: bool = option(False, help="the token that follows an EOD does not count in the loss")
    sft: bool = option(False, help="the data are conversations that dsv3 preprocess --sft made: whole ones share a "
                       "sequence and do not see each other, and what their masks say counts in the loss")
    long_conversations: str = option("refuse", choices=LONG_CONVERSATIONS, help="with --sft: what becomes of "
                                     "conversations of more than seq_length + 1 tokens: refuse (the run does not "
                                     "start), cut (at their end) or drop; those that are cut or dropped are counted")

    def __post_init__(self) -> None:
        hold_tuples(self)

    @property
    def document_flags(self) -> tuple[str, ...]:
        """The switches that are on: those that need to know where documents end."""
        return tuple(name for name in DOCUMENT_SWITCHES if getattr(self, name))

    @property
    def has_document_attention(self) -> bool:
        """Whether the attention modules must know where documents, or conversations, end."""
        return self.isolates_documents or self.restarts_positions

    @property
    def isolates_documents(self) -> bool:
        """Whether no position attends across the end of a document, or of a conversation."""
        return self.sft or self.reset_attention_mask

    @property
    def restarts_positions(self) -> bool:
        """Whether rotary positions restart where a document, or a conversation, begins."""
        return self.sft or self.reset_position_ids
