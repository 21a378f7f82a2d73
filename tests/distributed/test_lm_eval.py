"""lm-evaluation-harness on a run, in several layouts, and on its export by the harness's own `hf` model.

Three tasks of the three kinds, whose few lines are in tests/lm_eval_tasks/. Nothing is fetched.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, RankError, run_ranks
from tests.distributed.trained_text import train_on_words

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install -e '.[lm-eval]')")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TASKS = ("local_choice", "local_continue", "local_rolling")
LAYOUTS: dict[str, tuple[int, str]] = {
    "single": (1, ""), "pp2": (2, "--pipeline-model-parallel-size 2"), "ep2": (2, "--expert-model-parallel-size 2"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"), "dp2": (2, "")}
# fp32 on both sides, sums of up to some hundred log-probabilities in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks are read as from a machine without a network, in the root of this repository, where their paths begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_words(tmp_path_factory.mktemp("lm-eval"))


def evaluated(folder: Path, num_ranks: int, *words: str) -> tuple[str, dict[str, Any], dict[str, list[Any]]]:
    """What the command prints, its results, and the model's answers of each task."""
    environment = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    printed = run_ranks(num_ranks, "dsv3_megatron", "lm-eval", "--include_path", "tests/lm_eval_tasks", "--tasks",
                        *TASKS, "--output_path", str(folder), "--log_samples", *words, environment=environment)
    assert all(not text for text in printed[1:]), "the first process reports"
    (results,) = folder.glob("*/results_*.json")
    samples = {task: [json.loads(line) for line in next(folder.glob(f"*/samples_{task}_*.jsonl")).read_text()
                      .splitlines()] for task in TASKS}
    return printed[0], json.loads(results.read_text())["results"], samples


@pytest.fixture(scope="module")
def by_transformers(trained: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(trained / "hf"), "dtype": "float32"}, tasks=list(TASKS),
        batch_size=4, device="cpu", task_manager=TaskManager(include_path="tests/lm_eval_tasks"))
    return found["results"], found["samples"]


def flat(values: Any) -> list[Any]:
    """Numbers, truths and texts in lists of lists; the harness writes numbers as texts in its files of samples."""
    if isinstance(values, list | tuple):
        return [part for value in values for part in flat(value)]
    if isinstance(values, bool):  # in a file "True"
        return [str(values)]
    try:
        return [float(values)]
    except (TypeError, ValueError):
        return [str(values)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_the_harness_on_the_export(trained: Path, by_transformers: Any, layout: str,
                                                        tmp_path: Path) -> None:
    num_ranks, flags = LAYOUTS[layout]
    size = {"single": "5", "dp2": "auto"}.get(layout, "3")
    printed, results, samples = evaluated(tmp_path, num_ranks, "--load", str(trained / "run"), "--batch_size", size,
                                          *flags.split())
    expected_results, expected_samples = by_transformers
    for task in TASKS:
        assert f"|{task}" in printed
        numbers = {name: value for name, value in expected_results[task].items() if isinstance(value, float)}
        assert numbers and not any(map(math.isnan, numbers.values()))
        for name, value in numbers.items():
            # Standard errors are of resampled sums.
            assert results[task][name] == pytest.approx(value, rel=1e-4 if "stderr" in name else TOLERANCE), name
        theirs = {sample["doc_id"]: flat(sample["resps"]) for sample in expected_samples[task]}
        ours = {sample["doc_id"]: flat(sample["resps"]) for sample in samples[task]}
        assert ours.keys() == theirs.keys()
        for number, answer in theirs.items():
            assert [part for part in ours[number] if isinstance(part, str)] == [
                part for part in answer if isinstance(part, str)], (task, number)
            assert [part for part in ours[number] if isinstance(part, float)] == pytest.approx(
                [part for part in answer if isinstance(part, float)], rel=TOLERANCE), (task, number)
    assert len({str(flat(sample["resps"])) for sample in samples["local_continue"]}) > 3


def test_the_export_is_loaded_alike(trained: Path, by_transformers: Any, tmp_path: Path) -> None:
    """With a cache of answers, the second time of which nothing is asked."""
    words = ("--load", str(trained / "hf"), "--precision", "fp32", "--use_cache", str(tmp_path / "cache"))
    for attempt in ("first", "second"):
        _, results, _ = evaluated(tmp_path / attempt, 1, *words)
        assert results["local_choice"]["acc_norm,none"] == by_transformers[0]["local_choice"]["acc_norm,none"]
        assert results["local_rolling"]["word_perplexity,none"] == pytest.approx(
            by_transformers[0]["local_rolling"]["word_perplexity,none"], rel=TOLERANCE)


@pytest.mark.parametrize(("words", "message"), [
    (["--tasks", "no_such_task"], "lm-eval: Tasks not found: no_such_task"),
    (["--tasks", "local_choice", "--no-such-flag"], "the harness does not take these flags"),
    (["--tasks", "local_choice", "--model", "hf"], "--model is not for this command"),
    (["--tasks", "local_choice", "--batch_size", "0"], "batch_size=0 must be a number from 1 on, or auto"),
    (["--tasks", "local_choice", "--max-length", "65"], "max_length=65 must lie in 2..64"),
    (["--tasks", "local_continue", "--gen_kwargs", "num_beams=4"], "a task asks for num_beams=4"),
    (["--tasks", "local_continue", "--gen_kwargs", "max_gen_toks=64"], "max_gen_toks=64 of a task must be less"),
    (["--tasks", "local_choice", "--apply_chat_template"], "has no chat template"),
])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_wrong_is_said_once(trained: Path, words: list[str], message: str, num_ranks: int) -> None:
    """By one process; the others end with it."""
    layout = ["--pipeline-model-parallel-size", "2"] * (num_ranks - 1)
    with pytest.raises(RankError) as error:
        run_ranks(num_ranks, "dsv3_megatron", "lm-eval", "--load", str(trained / "run"), "--include_path",
                  "tests/lm_eval_tasks", *words, *layout, environment={"HF_DATASETS_OFFLINE": "1"})
    assert str(error.value).count(message) == 1 and "Traceback" not in str(error.value)


def test_a_chat_and_a_python_call(trained: Path) -> None:
    """The class by its name in the harness, with a template of the tokenizer's."""
    from dsv3_megatron.runs.harness_model import HarnessModel

    assert lm_eval.api.registry.get_model("dsv3") is HarnessModel
