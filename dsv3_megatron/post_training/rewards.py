"""What an answer is worth: shipped rules, functions of the user's, and the limit of their time. No torch.

A rule is given the text of an answer and the JSON object of its prompt's line, and gives a number:

    exact      1 where the answer is the line's `answer`, but for white space around it
    numeric    1 where the last number of the answer equals the line's `answer`
    boxed      1 where what is in the last \\boxed{...} equals the line's `answer`, as a number or else as a text
    format     1 where the answer is <think>...</think> and then something
    FILE.py:FUNCTION    what the function returns, called with the text and the line's object

A rule that fails, takes too long or gives no finite number is an error that names the answer: a zero in its place
would teach the model something that nobody meant.

Source of the rules: DeepSeek-V3 report, section 5.2.1 (rule-based rewards, answers in a box).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.process.bounds import time_limit

# Text of an answer, object of its prompt's line -> what it is worth.
RewardFunction = Callable[[str, Mapping[str, Any]], float]
ANSWER = "answer"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_BOXED = "\\boxed{"


class RewardError(ConfigError):
    """A reward that is none: a rule failed, took too long or gave no finite number; the message names the answer."""


class _TimeIsUp(BaseException):
    """Ends a rule; no Exception, so that a rule that catches those does not catch it."""


def exact(text: str, record: Mapping[str, Any]) -> float:
    """1 where the answer is the line's, but for white space around it; else 0."""
    return float(text.strip() == str(record[ANSWER]).strip())


def numeric(text: str, record: Mapping[str, Any]) -> float:
    """1 where the last number of the answer equals the line's; else 0."""
    found = _NUMBER.findall(text)
    return float(bool(found) and _same(found[-1], str(record[ANSWER])))


def boxed(text: str, record: Mapping[str, Any]) -> float:
    """1 where the content of the last closed \\boxed{...} equals the line's answer; else 0."""
    content = _last_boxed(text)
    return float(content is not None and _same(content, str(record[ANSWER])))


def has_form(text: str, record: Mapping[str, Any]) -> float:
    """1 where the answer is <think>...</think> with something in it and something behind it; else 0."""
    match = re.fullmatch(r"\s*<think>(.+?)</think>(.+)", text, flags=re.DOTALL)
    return float(match is not None and bool(match[1].strip()) and bool(match[2].strip()) and "<think>" not in match[2])


RULES: dict[str, RewardFunction] = {"exact": exact, "numeric": numeric, "boxed": boxed, "format": has_form}
_COMPARING = ("exact", "numeric", "boxed")


@dataclass(frozen=True)
class RewardRule:
    """One rule of a run.

    Attributes:
        name: Name as it was given; of a function the function's.
        weight: Weight of its reward in the sum.
        function: Function that judges an answer.
        key: Name of the value that it needs in every line; None: it needs none.
    """

    name: str
    weight: float
    function: RewardFunction
    key: str | None


@dataclass(frozen=True)
class Rewards:
    """The rules of a run.

    Attributes:
        rules: Rules, in the order given.
        timeout_s: Seconds that one of them may take for one answer.
    """

    rules: tuple[RewardRule, ...]
    timeout_s: float

    @classmethod
    def read(cls, words: Sequence[str], timeout_s: float) -> Rewards:
        """Find the rules that words name: RULE, or WEIGHT RULE WEIGHT RULE ...

        Raises:
            ConfigError: a rule, a file or a function is not there, or a weight is no number.
        """
        pairs = [("1", words[0])] if len(words) == 1 else list(zip(words[::2], words[1::2], strict=False))
        if len(words) > 1 and len(words) % 2:
            raise ConfigError(f"reward={' '.join(words)} must be one RULE, or pairs: WEIGHT RULE WEIGHT RULE ...")
        rules = tuple(_rule(weight, word) for weight, word in pairs)
        names = [rule.name for rule in rules]
        if len(set(names)) < len(names):
            raise ConfigError(f"reward={' '.join(words)} names a rule twice; leave one out")
        return cls(rules, timeout_s)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the values that every line must have."""
        return tuple(dict.fromkeys(rule.key for rule in self.rules if rule.key is not None))

    def of(self, text: str, record: Mapping[str, Any], where: str) -> tuple[float, ...]:
        """The reward of an answer by each rule, before its weight.

        Args:
            text: Text of the answer.
            record: Object of its prompt's line.
            where: Name of the answer in messages.

        Raises:
            RewardError: a rule failed, took too long or gave no finite number.
        """
        return tuple(self._value(rule, text, record, where) for rule in self.rules)

    def weighted(self, values: Sequence[float]) -> float:
        """The sum of rewards by their weights."""
        return math.fsum(rule.weight * value for rule, value in zip(self.rules, values, strict=True))

    def _value(self, rule: RewardRule, text: str, record: Mapping[str, Any], where: str) -> float:
        told = f"reward {rule.name} of {where} (answer {text[:80]!r})"
        try:
            with time_limit(self.timeout_s, is_of_clock=True, error=_TimeIsUp()):
                found: Any = rule.function(text, record)
        except _TimeIsUp:
            raise RewardError(f"{told} took longer than reward_timeout_s={self.timeout_s:g}; make the function faster, "
                              "or give it more time") from None
        except Exception as error:
            raise RewardError(f"{told} failed: {type(error).__name__}: {error}; mend the function, or the line"
                              ) from error
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise RewardError(f"{told} is {found!r}; a reward must be a finite number: mend the function, or the line")
        return value


def _rule(weight: str, word: str) -> RewardRule:
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"reward: {weight!r} before {word} is no weight; give a number, as in 1 numeric 0.1 format")
    if word in RULES:
        return RewardRule(word, number, RULES[word], ANSWER if word in _COMPARING else None)
    file, colon, name = word.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"reward={word!r} is no rule; give one of {', '.join(RULES)}, or FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise ConfigError(f"reward={word}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"reward={word}: {file} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward={word}: {file} has no function {name}")
    return RewardRule(name, number, function, None)


def _same(found: str, expected: str) -> bool:
    """Whether two texts are one number, or else one text."""
    numbers = _number_of(found), _number_of(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return " ".join(found.split()) == " ".join(expected.split())


def _number_of(text: str) -> Decimal | None:
    text = text.strip().strip("$").replace(",", "").rstrip(".")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that is closed, with the braces inside it."""
    starts = [match.end() for match in re.finditer(re.escape(_BOXED), text)]
    for start in reversed(starts):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place]
    return None
