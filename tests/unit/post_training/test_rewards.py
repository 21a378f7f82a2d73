"""Rules judge answers as their text says, and a reward that is none is an error that names the answer."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.post_training.rewards import RewardError, Rewards


def value(rule: str, text: str, answer: object = "12") -> float:
    return Rewards.read([rule], 5.0).of(text, {"answer": answer}, "a.jsonl, line 3")[0]


@pytest.mark.parametrize(("rule", "text", "answer", "expected"), [
    ("exact", " 12\n", "12", 1), ("exact", "12.", "12", 0), ("exact", "Paris", "Paris", 1),
    ("numeric", "It is 12", "12", 1), ("numeric", "12, or 13", "12", 0), ("numeric", "1,200.0", 1200, 1),
    ("numeric", "-3", "3", 0), ("numeric", "nothing", "12", 0), ("numeric", "1.2e1.", "12", 1),
    ("boxed", r"so \boxed{12}", "12", 1), ("boxed", r"\boxed{1} \boxed{12.0}", "12", 1), ("boxed", "12", "12", 0),
    ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1), ("boxed", r"\boxed{12", "12", 0),
    ("boxed", r"\boxed{12} and \boxed{1", "12", 1),
    ("format", "<think>a</think>b", "", 1), ("format", "<think> </think>b", "", 0), ("format", "a", "", 0),
    ("format", "<think>a</think>", "", 0), ("format", "<think>a</think>b<think>", "", 0),
])
def test_rules(rule: str, text: str, answer: object, expected: float) -> None:
    assert value(rule, text, answer) == expected


def functions(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


def test_rules_and_functions_are_added_by_their_weights(tmp_path: Path) -> None:
    file = functions(tmp_path, "def short(text, record):\n    return record['most'] - len(text)\n")
    rewards = Rewards.read(["1", "numeric", "0.5", f"{file}:short"], 5.0)
    assert [rule.name for rule in rewards.rules] == ["numeric", "short"] and rewards.keys == ("answer",)
    found = rewards.of("12", {"answer": "12", "most": 5}, "here")
    assert found == (1.0, 3.0) and rewards.weighted(found) == 2.5


@pytest.mark.parametrize(("body", "told"), [
    ("return float('nan')", r"reward judge of a.jsonl, line 3 \(answer '7'\) is nan; a reward must be a finite number"),
    ("return None", "is None; a reward must be a finite number"),
    ("return float('inf')", "is inf; a reward must be"),
    ("raise KeyError('x')", r"failed: KeyError: 'x'; mend the function"),
])
def test_a_reward_that_is_none_names_its_answer(tmp_path: Path, body: str, told: str) -> None:
    file = functions(tmp_path, f"def judge(text, record):\n    {body}\n")
    with pytest.raises(RewardError, match=told):
        Rewards.read([f"{file}:judge"], 5.0).of("7", {}, "a.jsonl, line 3")


def test_a_reward_that_takes_too_long_ends_though_it_catches_all(tmp_path: Path) -> None:
    file = functions(tmp_path, "def judge(text, record):\n    while True:\n        try:\n            sum(range(1000))\n"
                               "        except Exception:\n            pass\n")
    rewards, before = Rewards.read([f"{file}:judge"], 0.2), signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"line 3 .* took longer than reward_timeout_s=0.2"):
        rewards.of("7", {}, "a.jsonl, line 3")
    assert time.monotonic() - started < 5 and signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("words", "told"), [
    (["nothing"], "reward='nothing' is no rule; give one of exact, numeric, boxed, format, or FILE.py:FUNCTION"),
    (["1", "numeric", "2"], "must be one RULE, or pairs"),
    (["much", "numeric"], "'much' before numeric is no weight"),
    (["nan", "numeric"], "'nan' before numeric is no weight"),
    (["1", "numeric", "1", "numeric"], "names a rule twice"),
    (["missing.py:f"], "there is no file missing.py"),
])
def test_rules_that_are_not_there(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Rewards.read(words, 1.0)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no function g"):
        Rewards.read([functions(tmp_path, "def f(a, b): return 1\n") + ":g"], 1.0)
    with pytest.raises(ConfigError, match="cannot be run: ZeroDivisionError"):
        Rewards.read([functions(tmp_path, "1 / 0\n") + ":g"], 1.0)
