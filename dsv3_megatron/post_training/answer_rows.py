"""The answers of a step packed into sequences behind their prompts, as samples of the batch iterator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dsv3_megatron.data.chat.packed_samples import ConversationSamples, PackedRow, pack_row
from dsv3_megatron.data.chat.packing import pack_lengths
from dsv3_megatron.post_training.objective import ADVANTAGES, OLD, REFERENCE
from dsv3_megatron.post_training.rollout import Answer


class AnswerRows:
    """Answers in as few sequences as best fit finds, and empty ones behind them until their number will do.

    Args:
        answers: Answers of the step, each of at most seq_length + 1 tokens with its prompt.
        seq_length: Tokens of a sequence, without the one after it.
        filling: Token id behind the answers.
        will_do: Says of a number of sequences whether the layout can take it.

    Attributes:
        packing: Numbers of the answers of each sequence that has some.
        num_rows: Number of sequences.
    """

    def __init__(self, answers: Sequence[Answer], seq_length: int, *, filling: int, will_do: Callable[[int], bool]
                 ) -> None:
        self.answers, self.seq_length, self.filling = answers, seq_length, filling
        self.packing = pack_lengths(np.array([len(answer) for answer in answers]), seq_length + 1, key=0)
        self.num_rows = len(self.packing)
        while not will_do(self.num_rows):
            self.num_rows += 1

    def read(self, index: int) -> PackedRow:
        """The sequence at an index."""
        numbers = self.packing[index].tolist() if index < len(self.packing) else []
        return pack_row([_document(self.answers[number]) for number in numbers], self.seq_length, filling=self.filling,
                        names=(ADVANTAGES, OLD, REFERENCE))

    def samples(self) -> ConversationSamples:
        """The sequences as samples."""
        return ConversationSamples(self, self.num_rows)

    def by_answer(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Values of the answers' tokens out of values of each row's labels, in the order of the answers.

        Args:
            rows: Values [S] of each row that has answers.
        """
        found: list[np.ndarray] = [np.empty(0)] * len(self.answers)
        for row, values_S in enumerate(rows):
            at = 0
            for number in self.packing[row].tolist():
                answer = self.answers[number]
                # The label of position p is the token at place p + 1.
                first = at + len(answer.prompt_ids) - 1
                found[number] = values_S[first: first + len(answer.ids)]
                at += len(answer)
        return found


def _document(answer: Answer) -> tuple[np.ndarray, ...]:
    """Ids, mask, advantages and both log-probabilities of a prompt and its answer."""
    prompt, ids = len(answer.prompt_ids), len(answer.ids)
    values = np.zeros((4, prompt + ids), dtype=np.float32)
    reference_T = answer.logprobs_T if answer.reference_logprobs_T is None else answer.reference_logprobs_T
    values[0, prompt:], values[1, prompt:] = 1.0, answer.advantage
    values[2, prompt:], values[3, prompt:] = answer.logprobs_T, reference_T
    return (np.array([*answer.prompt_ids, *answer.ids]), *values)
