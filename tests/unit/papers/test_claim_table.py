"""The claims: each has a source, a reason where it needs one, a command that is taken; the numbers are the library's.

What the papers print is typed here once more for the most important figures, from the digest of both papers, so that a
slip in a claim is found.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from dsv3_megatron.papers import claim_table, cluster_claims, model_claims, schedule_claims, training_claims
from dsv3_megatron.papers.claim import SOURCES, Agreement, judge
from dsv3_megatron.papers.claim_table import SECTIONS, all_claims, count_verdicts, judge_all
from tests.unit.test_documented_commands import check

CLAIMS = list(all_claims())


@pytest.fixture(scope="module")
def judged():
    return judge_all(with_slow=False)


def rows(judged):
    return [row for section in judged for row in section.rows]


def by_subject(judged, subject):
    return next(row for row in rows(judged) if row.claim.subject == subject)


def test_every_claim_has_its_source_its_command_and_its_reason(judged) -> None:
    assert len({(claim.subject, claim.source, claim.place) for claim in CLAIMS}) == len(CLAIMS)
    for row in rows(judged):
        claim = row.claim
        assert claim.source in SOURCES and claim.place
        assert bool(claim.command) == (claim.gives is not None), claim.subject
        if row.verdict in (Agreement.APART, Agreement.NOT_HERE):
            assert len(claim.why) > 5, claim.subject


def test_commands_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in {claim.command for claim in CLAIMS if claim.command}:
        assert check(shlex.split(command), monkeypatch), command


@pytest.mark.parametrize(("subject", "given"), [
    ("all parameters", "671.03B"),  # 671,026,404,352
    ("parameters that a token activates", "36.63B"),
    ("operations of a token of training, 4K sequences", "250.46 GFLOP"),
    ("DeepSeek-V2: all parameters", "235.74B"),
    ("tokens of pre-training", "14.8T"),
    ("1f1b: bubble, (PP-1)(F+B)", "45"),
    ("zb1p: bubble, (PP-1)(F+B-2W)", "15"),
    ("dualpipe: bubble, (PP/2-1)(F&B+B-3W)", "11.9"),
    ("dualpipe: activations, in micro-batches", "17"),
    ("dispatch and combine in decoding, 32 tokens, InfiniBand", "125.1533 µs")])
def test_figures_that_were_derived_by_hand(judged, subject, given) -> None:
    """From the exact table of parameters; PP = 16; (7392 + 14336) bytes x 32 x 9 / 50 GB/s."""
    assert by_subject(judged, subject).given == given


@pytest.mark.parametrize(("subject", "said"), [
    ("steps of the learning rate's warm-up", "2K"), ("tokens of the cosine decay", "4.3T"),
    ("seconds of a step", "19.926 s"), ("MFU, causal", "38.94%"), ("GPU-hours of pre-training", "2664K"),
    ("GPU-hours of the context extension", "119K"), ("128K phase: sequences of a batch", "480"),
    ("cache of a token, BF16", "70.272 KB"), ("overlapped forward and backward (1F1B)", "13.95 s")])
def test_what_the_papers_print(judged, subject, said) -> None:
    assert by_subject(judged, subject).claim.said == said


def test_all_of_the_recipe_and_of_the_schedules_is_equal(judged) -> None:
    for section in judged:
        if section.heading in ("Recipe of pre-training", "Context extension", "Pipeline schedules"):
            assert {row.verdict for row in section.rows} <= {Agreement.EQUAL, Agreement.NOT_HERE}, section.heading


def test_another_model_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers come from the model: with a layer less, what depends on it differs."""
    smaller = dataclasses.replace(model_claims.v3(), num_layers=60)
    monkeypatch.setattr(model_claims, "v3", lambda: smaller)
    apart = {claim.subject for claim in (*model_claims.ARCHITECTURE, *model_claims.PARAMETERS)
             if judge(claim).verdict is Agreement.APART}
    assert {"Transformer layers", "all parameters", "parameters that a token activates"} <= apart
    assert "hidden width" not in apart


def test_another_recipe_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = training_claims.v3_run().override(adam_beta2=0.99)
    monkeypatch.setattr(training_claims, "v3_run", lambda: other)
    apart = [claim.subject for claim in training_claims.RECIPE if judge(claim).verdict is Agreement.APART]
    assert apart == ["AdamW, beta 2"]


def test_slow_rows_of_fp8_and_of_the_cache() -> None:
    slow = [claim for heading in ("FP8", "Operations and cache") for claim in SECTIONS[heading] if claim.is_slow]
    verdicts = {claim.subject: judge(claim) for claim in slow}
    assert verdicts["cache of a token, BF16"].given == "70.272 KB"
    assert verdicts["cache of LLaMA-3.1 405B against it"].verdict is Agreement.APART
    assert verdicts["bits that the tensor core keeps of a sum"].given == "14 bits"
    assert {verdicts[name].verdict for name in ("format of the operands", "group of activations with one scale",
                                                "group of weights with one scale",
                                                "products between two promotions to fp32")} == {Agreement.EQUAL}


def test_parts_of_a_step_add_up_to_its_pipeline() -> None:
    parts, step = cluster_claims.step_parts(), cluster_claims._step()
    assert sum(parts.values()) == pytest.approx(step.pipeline, rel=1e-9)


def test_the_count_is_of_all_rows(judged) -> None:
    counts = count_verdicts(judged)
    assert sum(counts.values()) == len(CLAIMS) == sum(map(len, claim_table.SECTIONS.values()))
    assert counts[Agreement.NOT_RUN] == sum(claim.is_slow for claim in CLAIMS)
    assert len(schedule_claims.ROWS) == 3
