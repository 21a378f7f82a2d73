"""Ends sequences whose text has come to a given word: what programs that read answers call `until` or `stop`."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_megatron.generation.text import TextCodec

# A tokenizer may put what comes before a text, or a space, into its first token.
_MORE_TOKENS = 2


class StopTexts:
    """Tells of growing sequences whether a stop text has come; for `Options.has_ended`.

    Args:
        codec: The tokenizer.
        stops: Texts, none of them empty.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        assert all(stops)
        self._codec, self._stops = codec, tuple(stops)
        # A token has a byte of text at least.
        self._width = max((len(stop.encode()) for stop in stops), default=0) + _MORE_TOKENS
        self._tails: dict[int, tuple[int, ...]] = {}

    def __call__(self, number: int, ids: Sequence[int]) -> bool:
        """Whether a stop text ends in the newest ids of a sequence.

        Args:
            number: Number of the sequence.
            ids: Ids that it has got since the last call.
        """
        tail = (*self._tails.get(number, ()), *ids)
        self._tails[number] = tail[-self._width:]
        text = self._codec.decode(tail)
        return any(stop in text for stop in self._stops)
