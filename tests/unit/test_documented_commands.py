"""Commands and paths in the README and in docs/: each script exists, its parser takes the flags, each path is there.

A command is read by the parser of its script and no further. The fields of a run are checked among themselves too, as
before every run, in the smallest number of processes that its layout takes or the number that the command names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dsv3_megatron.commands.dispatch import COMMANDS
from dsv3_megatron.config.load import parse_command, parse_line
from dsv3_megatron.config.packages import is_installed
from tests.family import FAMILY
from tools.run_documented_commands import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*(path for path in ROOT.glob("*.md")), *(ROOT / "docs").rglob("*.md")])
SOURCES = ("tools/", "examples/", "tests/", "dsv3_megatron/", "kernels/", ".ci/")
# A path as text names one: folders and a file with an ending, or a folder; not a pattern, a flag or an address.
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|sbatch|md|toml|jsonl|csv|png)|(?:[\w.-]+/)+")
# Scripts that import a package which the tests' environment may lack: then their flags are looked up in their text.
OF_A_PACKAGE = {"examples/data/prepare_corpus.py": "datatrove"}


class Parsed(BaseException):
    """Raised in the place of what a script does with its options."""


@contextlib.contextmanager
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts end where their parser has read the command; an elided one (`...`) has to name known flags only."""
    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        if "..." in args:
            require_flags(self, args)
        else:
            parsed, unknown = self.parse_known_args(args, namespace)
            assert not unknown, f"{self.prog} does not know {unknown}"
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        yield


def require_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Fail on a flag that a parser, or the one of the subcommand, does not know."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words[0] in action.choices:
            return require_flags(action.choices[words[0]], words[1:])
    flags = [word for word in words if word.startswith("--")]
    unknown = [flag for flag in flags if flag.partition("=")[0] not in parser._option_string_actions]
    assert not unknown, f"{parser.prog} does not know {unknown}"
    return None


def with_model_folders(words: Sequence[str]) -> list[str]:
    """The words, and the folder that --from-hf names made: it is a user's."""
    words = list(words)
    for index, word in enumerate(words[:-1]):
        if word == "--from-hf":
            folder = Path(Path(words[index + 1]).name)
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(FAMILY["deepseek-v3.1"]))
            words[index + 1] = str(folder)
    return words


def check_run(words: list[str]) -> None:
    """Read the flags of a run, and check its fields. A file that it names stands for one that changes nothing."""
    if words in ([], ["--fresh"]) or "--help" in words:
        return
    is_whole = "..." not in words
    words = with_model_folders([word for word in words if word != "..."])
    for index, word in enumerate(words[:-1]):
        if word == "--config":
            stand_in = Path(words[index + 1]).name
            Path(stand_in).write_text("{}" if stand_in.endswith(".json") else "")
            words[index + 1] = stand_in
    command = parse_command(words)
    if is_whole:
        command.run.validate(command.world_size or command.run.parallel.minimum_world_size)


def check_command(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the words after `dsv3 NAME` by the command's parser."""
    assert name in {command.name for command in COMMANDS}, f"dsv3 has no command {name}"
    module = importlib.import_module(f"dsv3_megatron.commands.{name.replace('-', '_')}")
    words = with_model_folders(words)
    if name == "train":
        check_run(words)
    elif name in ("sft", "grpo"):  # the base model need not be there
        parse_line([word for index, word in enumerate(words) if word != "..." and "--pretrained-checkpoint" not in
                    (word, words[index - 1])], module.command_line())
    elif name == "plan":  # its flags are a run's too
        options, _ = module._parse_arguments([word for word in words if word != "..."])
        assert options.calibrate or options.num_gpus
    elif name == "rehearse":
        options, flags = module._parse_arguments([word for word in words if word != "..."])
        assert options.world_size
        check_run(flags)
    elif name == "certify":
        options, flags = module._parse_arguments([word for word in words if word != "..."])
        assert options.random or flags
        check_run(flags)
    elif name == "lm-eval":  # what it does not know is for the harness, whose flags have underscores
        request = module._parse_arguments([word for word in words if word != "..."])
        assert not [word for word in request.words if word.startswith("--") and "-" in word[2:]], request.words
        assert "--tasks" in request.words
    elif "--help" not in words:
        with parsing_only(monkeypatch):
            module.main(words)


def check_script(path: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the words after a script by its parser, or by that of the command whose script it is."""
    assert (ROOT / path).is_file(), f"{path} does not exist"
    if named := re.search(r'run_named\("(.+)"\)', (ROOT / path).read_text(encoding="utf-8")):
        check_command(named[1], words, monkeypatch)
    elif (package := OF_A_PACKAGE.get(path)) and not is_installed(package):
        flags = {word for word in words if word.startswith("--")}
        assert flags <= set(re.findall(r'"(--[a-z-]+)"', (ROOT / path).read_text(encoding="utf-8")))
    elif "--help" not in words:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        with parsing_only(monkeypatch):
            module.main(words)


def check_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the words after `python -m`: of ours by its parser, of others only that there is such a module."""
    assert importlib.util.find_spec(name), f"python -m {name}: no such module"
    if name == "dsv3_megatron":
        check_command(words[0], words[1:], monkeypatch)
    elif name.startswith("dsv3_megatron.") and "--help" not in words:
        with parsing_only(monkeypatch):
            importlib.import_module(name).main(words)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Check one command; whether it is of a kind that is checked.

    Raises:
        AssertionError, ValueError, SystemExit: something in it is not there.
    """
    program = os.path.basename(words[0])
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        words = ["python", *(["-m"] if options.module else []), options.training_script, *options.training_script_args]
        program = "python"
    if program == "bash" and len(words) > 1 and words[1] == "examples/pretrain_dsv3.sh":
        check_run(words[2:])
    elif program == "bash" and words[1:] == ["examples/post_train_dsv3.sh"]:
        assert (ROOT / words[1]).is_file()  # its own commands are in test_post_training_example.py
    elif program == "dsv3":
        if words[1:] not in (["--help"], ["--version"]):
            check_command(words[1], words[2:], monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= set(targets)
    elif program in ("python", "python3") and len(words) > 2 and words[1] == "-m":
        check_module(words[2], words[3:], monkeypatch)
    elif program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
        check_script(words[1], words[2:], monkeypatch)
    else:
        return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command shown names a script that is there and flags that its parser takes."""
    monkeypatch.chdir(tmp_path)
    for command in commands(document.read_text(encoding="utf-8")):
        try:
            check(list(command.words), monkeypatch)
        except (AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{document.relative_to(ROOT)}: {command}: {error}", pytrace=False)


def test_most_commands_are_of_a_kind_that_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's pages have commands, and none of them goes unread because of how it is written."""
    monkeypatch.chdir(tmp_path)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
    others: set[str] = set()
    num_checked = 0
    for page in pages:
        for command in commands(page.read_text(encoding="utf-8")):
            if check(list(command.words), monkeypatch):
                num_checked += 1
            else:
                others.add(command.words[0])
    assert num_checked > 40
    assert others <= {"tensorboard", "source", "sbatch"}, others


def named_paths(text: str) -> Iterator[str]:
    """Paths in a page's code spans, and those of this repository's sources in its commands."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        for word in span.split():
            if PATH.fullmatch(word):
                yield word
    for command in commands(text):
        yield from (word for word in command.words if word.startswith(SOURCES) and PATH.fullmatch(word))


# Files that a command of the pages makes, or that a user has: not of this repository.
OF_A_USER = re.compile(
    r"(runs|checkpoints|logs|data|corpus|tokenizer|tensorboard|exported|converted|pages|DeepSeek-V3|build|llama\.cpp|iter_\w+|\.venv)/.*"
    r"|(run|study|curves|both|model|config|checkpoint|generation_config|environment|logprobs|lengths|report|schedule|plan|trace|corpus|ids)"
    r"\.\w+|(guards|metrics|train|valid|more|chat|prompts|held-out|PREFIX\.rejects)\.jsonl|(FILE|PREFIX)\.\w+")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    """Every file and folder named is in the repository, in the package or beside the page."""
    missing = []
    for path in named_paths(document.read_text(encoding="utf-8")):
        beside = (ROOT, ROOT / "dsv3_megatron", ROOT / "tests", document.parent)
        if any((folder / path).exists() for folder in beside):
            continue
        if "/" not in path and any(next(ROOT.glob(f"{top}**/{path}"), None) for top in (*SOURCES, "docs/")):
            continue
        if not OF_A_USER.fullmatch(path):
            missing.append(path)
    assert not missing


@pytest.mark.parametrize(("line", "why"), [
    ("python tools/no_such_tool.py --input a", "does not exist"),
    ("python tools/merge_datasets.py --inputs a --output-prefix b", "--input"),
    ("python tools/merge_datasets.py --inputz ...", "--inputz"),
    ("python tools/convert_checkpoint.py megatron-to-hf --input a --output b --no-mpt", "--no-mpt"),
    ("python tools/plan_run.py --hardware h100 --num-gpus 8 --fp9 blockwise", "--fp9"),
    ("dsv3 planning --hardware h100", "no command planning"),
    ("dsv3 merge --inputz ...", "--inputz"),
    ("dsv3 lm-eval --load a --tasks b --batch-size 2", "--batch-size"),
    ("torchrun --nproc-per-node 2 -m dsv3_megatron evaluate --load a --data b", "--data"),
    ("torchrun --nproc-per-node 4 tools/evaluate.py --load a --data b", "--data"),
    ("torchrun --nproc-per-nodes 4 tools/evaluate.py --load a", "--nproc-per-nodes"),
    ("bash examples/pretrain_dsv3.sh --preset tiny --train-iter 3", "--train-iter"),
    ("bash examples/pretrain_dsv3.sh --preset laptop --expert-model-parallel-size 3", "must divide"),
    ("python -m dsv3_megatron.metrics.sumary runs", "no such module"),
    ("make tests", "tests"),
])
def test_a_wrong_command_is_found(line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    """The check fails on what it is there to find."""
    monkeypatch.chdir(tmp_path)
    (command,) = commands(f"```\n{line}\n```\n")
    with pytest.raises((AssertionError, ValueError, SystemExit)) as error:
        check(command.words, monkeypatch)
    assert why in str(error.value) + capsys.readouterr().err


def test_wrong_paths_are_found() -> None:
    """A path in prose and in a command is read as one."""
    page = "See `tools/none.py` and `docs/nowhere/`.\n\n```\npython tools/a.py \\\n  --prompts examples/b.jsonl\n```\n"
    assert list(named_paths(page)) == ["tools/none.py", "docs/nowhere/", "tools/a.py", "examples/b.jsonl"]


def test_results_are_those_measured() -> None:
    """The tables of the documents are made from the newest measurements."""
    tool = importlib.import_module("tools.bench.update_readme")
    assert tool.main(["--check"]) == 0
    marked = [path for path in DOCUMENTS if "<!-- bench:" in path.read_text(encoding="utf-8")]
    assert set(marked) == set(tool.DOCUMENTS)


def test_the_readmes_table_says_what_the_page_of_results_says() -> None:
    """Each row's ratio, by the row of the page that has the same measurement."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    summary = re.findall(r"([\d.]+)x as fast", readme)
    cpus = re.findall(
        r"^\| (.+\(.+ cores\))[^|]* \| (fp32|bf16) \| (\d+) of (\d+) threads? \|", readme, re.MULTILINE)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    schedules = (ROOT / "docs" / "schedules" / "README.md").read_text(encoding="utf-8")

    def number(pattern: str, page: str) -> float:
        found = re.search(rf"^\| {pattern}", page, re.MULTILINE)
        assert found, pattern
        return float(found[1].replace(",", ""))

    def ratio(row: str, values: str = ".*") -> float:
        return number(rf"{re.escape(row)} \|{values} ([\d.]+)x", results)

    def step(name: str) -> float:
        return number(rf"{name} \| ([\d,]+) ms", schedules)

    expected = [ratio("100 MB JSON lines | Megatron-LM"),
                ratio("laptop fp32 decode batch=1 prompt=64 new=33 threads=2 | transformers", r" \S+ \|"),
                step("megatron-core combined") / step("dualpipe"),
                step("megatron-core 1f1b") / step("1f1b"),
                ratio("V3 widths bf16 layers=2 experts=8 6.04GB workers=2 | hf-to-megatron"),
                ratio("V3 widths fp8 layers=2 experts=8 4.87GB workers=2 | megatron-to-hf")]
    for cpu, precision, processes, threads in cpus:
        of_four = f" processes={processes}" if processes != "1" else ""
        config = f"laptop {precision} seq=512 batch=4 threads={threads}{of_four}"
        expected.append(number(rf"{config} \| transformers \| \S+ \| ([\d.]+)x.*{re.escape(cpu)}", results))
    assert len(cpus) >= 2
    assert [float(shown) for shown in summary] == pytest.approx(expected, rel=0.02, abs=0.005)


def test_pages_are_in_the_site() -> None:
    """A page of docs/ that the site's navigation leaves out would be found by nobody."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/.-]+\.md", text.partition("\nnav:")[2]))
