"""The answers of a step packed into sequences behind their prompts, as samples of the batch iterator.

Answers to one prompt in one sequence share it: the prompt's tokens are a document there, and each answer is one that
goes on from it (model/shared_beginnings.py). The last of the prompt's tokens is at each answer's own beginning, for
what follows it is different in each, and so is, with MTP modules, what follows the tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv3_megatron.data.chat.packed_samples import ConversationSamples, PackedRow, pack_row
from dsv3_megatron.post_training.objective import ADVANTAGES, OLD, REFERENCE
from dsv3_megatron.post_training.rollout import Answer


@dataclass
class _Row:
    """A sequence that is being filled: the tokens that it still holds, and its answers, by their prompts."""

    room: int
    by_prompt: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


class AnswerRows:
    """Answers in few sequences, each where it leaves the least room, and empty ones behind them until their number will
    do.

    Args:
        answers: Answers of the step, each of at most seq_length + 1 tokens with its prompt.
        seq_length: Tokens of a sequence, without the one after it.
        filling: Token id behind the answers.
        will_do: Says of a number of sequences whether the layout can take it.
        num_repeated: Last tokens of a shared prompt that each of its answers has for itself: one, and one for each MTP
            module. None: no prompt is shared, each answer has its whole prompt.

    Attributes:
        packing: Numbers of the answers of each sequence that has some, those to one prompt behind each other.
        num_rows: Number of sequences.
    """

    def __init__(self, answers: Sequence[Answer], seq_length: int, *, filling: int, will_do: Callable[[int], bool],
                 num_repeated: int | None = 1) -> None:
        self.answers, self.seq_length, self.filling, self.num_repeated = answers, seq_length, filling, num_repeated
        self._rows = self._filled()
        self.packing = [[number for numbers in row.by_prompt.values() for number in numbers] for row in self._rows]
        self.num_rows = len(self.packing)
        while not will_do(self.num_rows):
            self.num_rows += 1

    def _filled(self) -> list[_Row]:
        """Best fit, the longest first; the answers to a prompt are taken together."""
        rows: list[_Row] = []
        longest: dict[tuple[int, ...], int] = {}
        for answer in self.answers:
            longest[answer.prompt_ids] = max(longest.get(answer.prompt_ids, 0), len(answer))
        order = sorted(range(len(self.answers)), key=lambda number: (
            -longest[self.answers[number].prompt_ids], self.answers[number].prompt_ids, -len(self.answers[number])))
        least = min(map(self._own_tokens, self.answers), default=0)
        open_rows: list[_Row] = []
        for number in order:
            answer = self.answers[number]
            places = []
            for place, row in enumerate(open_rows):
                is_there = answer.prompt_ids in row.by_prompt
                left = row.room - (self._own_tokens(answer) if is_there else len(answer))
                if left >= 0:
                    places.append((not is_there, left, place))
            if places:
                _, left, place = min(places)
            else:
                left, place = self.seq_length + 1 - len(answer), len(open_rows)
                open_rows.append(_Row(left))
                rows.append(open_rows[place])
            row = open_rows[place]
            row.by_prompt.setdefault(answer.prompt_ids, []).append(number)
            row.room = left
            if left < least:
                del open_rows[place]
        return rows

    def _own_tokens(self, answer: Answer) -> int:
        """Tokens of an answer whose prompt is there."""
        return len(answer) - self._shared_tokens(answer)

    def _shared_tokens(self, answer: Answer) -> int:
        """Tokens of its prompt that an answer need not have for itself."""
        return 0 if self.num_repeated is None else max(0, len(answer.prompt_ids) - self.num_repeated)

    def read(self, index: int) -> PackedRow:
        """The sequence at an index."""
        documents: list[tuple[np.ndarray, ...]] = []
        continued: list[int] = []
        for numbers in self._rows[index].by_prompt.values() if index < len(self._rows) else ():
            first = self.answers[numbers[0]]
            shared = self._shared_tokens(first) if len(numbers) > 1 else 0
            beginning = len(documents)
            if shared:
                documents.append((np.array(first.prompt_ids[:shared]), *np.zeros((4, shared), dtype=np.float32)))
                continued.append(beginning)
            for number in numbers:
                continued.append(beginning if shared else len(documents))
                documents.append(_document(self.answers[number], shared))
        return pack_row(documents, self.seq_length, filling=self.filling, names=(ADVANTAGES, OLD, REFERENCE),
                        continued=continued if continued != list(range(len(documents))) else ())

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
            for numbers in self._rows[row].by_prompt.values():
                shared = self._shared_tokens(self.answers[numbers[0]]) if len(numbers) > 1 else 0
                at += shared
                for number in numbers:
                    answer = self.answers[number]
                    # The label of position p is the token at place p + 1.
                    first = at + len(answer.prompt_ids) - shared - 1
                    found[number] = values_S[first: first + len(answer.ids)]
                    at += len(answer) - shared
        return found


def _document(answer: Answer, num_left_out: int) -> tuple[np.ndarray, ...]:
    """Ids, mask, advantages and both log-probabilities of a prompt, but for its first tokens, and its answer."""
    prompt, ids = len(answer.prompt_ids) - num_left_out, len(answer.ids)
    values = np.zeros((4, prompt + ids), dtype=np.float32)
    reference_T = answer.logprobs_T if answer.reference_logprobs_T is None else answer.reference_logprobs_T
    values[0, prompt:], values[1, prompt:] = 1.0, answer.advantage
    values[2, prompt:], values[3, prompt:] = answer.logprobs_T, reference_T
    return (np.array([*answer.prompt_ids[num_left_out:], *answer.ids]), *values)
