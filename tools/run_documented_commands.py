"""Run the commands that the README and the pages of docs/ show, as they are read from the pages.

    python -m tools.run_documented_commands                       every page
    python -m tools.run_documented_commands docs/guides/data.md   one page

Each page has a folder of its own: a copy of the repository with the inputs that pages presuppose (`corpus.jsonl`, a
tokenizer, token files, the quickstart's folder). These stand-ins are small, and are made once, by the commands
themselves. The commands of a page run in its order. SMALLER says what is changed so that they end soon on a CPU, and
NOT_RUN what cannot run and why. Nothing is written into the repository. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "docs/guides", "docs/contributing", "docs/schedules", "docs/planning", "docs/export")
# What a page in a fence of another language holds is output, a drawing or a file.
COMMAND_FENCES = ("", "bash", "sh", "shell", "console")
RUN = "bash examples/pretrain_dsv3.sh"

# What begins a command, or stands in it, and why it is not run here.
NOT_RUN = [
    (rf"{RUN}( --fresh)?$", "long: the quickstart trains for minutes; --quickstart runs it"),
    (r"make setup", "download: it installs an environment"),
    (r"pip install", "download: a program of another environment; make clients follows these pages"),
    (r"git clone|mlx_lm|vllm serve|sglang serve",
     "needs a program of another environment; make clients follows these pages"),
    (r"make clients", "download: it installs programs"),
    (r"source \.venv", "download: it needs the environment that make setup installs"),
    (r"make (test|lint)", "long: these are the tests themselves"),
    (r"sbatch |--executor slurm", "needs Slurm"),
    (r"dsv3(_megatron)? lm-eval ", "needs the package lm-eval, and for tasks of the Hub a network"),
    (r"python examples/data/prepare_corpus", "needs the package datatrove"),
    (rf"{RUN} .*--preset dsv3-16b", "needs GPUs: it is the launch of several nodes"),
]

SHORT = "--train-iters 2 --lr-warmup-iters 1 --eval-iters 1"
SMALL = "--num-layers 2 --vocab-size 2048 --seq-length 64 --micro-batch-size 1 --global-batch-size 2"
# What a command has in it, what it lacks, and the flags that it gets: in the place of its own, or behind it.
NO_TRAINING = r"--(print-model|check-only|print-schedule|plot-schedule|help)"
SMALLER = [
    (rf"^{RUN} .*--preset laptop", NO_TRAINING, f"{SHORT} {SMALL}"),
    (rf"^{RUN} .*--preset tiny", NO_TRAINING, SHORT),
    (rf"^{RUN} .*--config converted/", NO_TRAINING, f"{SHORT} --global-batch-size 2"),
    # The stand-in for a corpus has too little text for 32,000 ids. With 2,048 the tokenizer is that of the datasets.
    (r"^dsv3 train-tokenizer ", "--help", "--vocab-size 2048"),
    (r"^tensorboard ", "--inspect", "--inspect"),  # reads the same files, and ends
    (r"^dsv3 generate ", "--help", "--max-new-tokens 8"),
]


@dataclass(frozen=True)
class Fence:
    """A fenced block: the language after its backticks, and its lines."""

    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, and the variables that are set before it. What follows `>`, `|`, `&&` or `;` is
    left out."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Outcome:
    """What became of a command: "ran", "failed" or "not run", with the seconds it took, and a reason or last lines."""

    kind: str
    seconds: float = 0.0
    said: str = ""


def fences(text: str) -> list[Fence]:
    """Read the fenced blocks of a page, in order."""
    return [Fence(match[2].strip(), match[3]) for match in
            re.finditer(r"^( *)```([^`\n]*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)]


def commands(text: str) -> Iterator[Command]:
    """Read every command in a page's blocks; the variables that a block itself sets are put in."""
    assigned = re.compile(r"(\w+)=(.*)", re.DOTALL)
    for fence in fences(text):
        if fence.language not in COMMAND_FENCES:
            continue
        own: dict[str, str] = {}
        for line in re.sub(r"\\\n", " ", fence.text).splitlines():
            with contextlib.suppress(ValueError):  # output with an apostrophe in it: no command
                for name, value in own.items():
                    line = line.replace(f"${name}", value)
                words = shlex.split(line, comments=True)
                if len(words) == 1 and (match := assigned.fullmatch(words[0])):
                    own[match[1]] = match[2]
                variables = {}
                while words and (match := assigned.fullmatch(words[0])):
                    variables[match[1]] = match[2]
                    words.pop(0)
                end = next((index for index, word in enumerate(words) if word in (">", "|", "&&", ";")), None)
                if words[:end]:
                    yield Command(words[:end], variables)


def smaller(words: list[str]) -> list[list[str]]:
    """Return what is run for a command: nearly always one command. A part of a dataset cannot be joined without the
    others, so `--shard` stands for two parts of two."""
    if "--shard" in words:
        place = words.index("--shard") + 1
        return [[*words[:place], part, *words[place + 1:]] for part in ("1/2", "2/2")]
    text = shlex.join(words)
    more = [flags for has, lacks, flags in SMALLER if re.search(has, text) and not re.search(lacks, text)]
    flags = shlex.split(" ".join(more))
    words = list(words)
    while flags:
        flag, *values = flags[:next((index for index, word in enumerate(flags[1:], 1) if word.startswith("--")), None)]
        flags = flags[1 + len(values):]
        if flag in words:  # a flag may be given once
            words[words.index(flag) + 1:words.index(flag) + 1 + len(values)] = values
        else:
            words += [flag, *values]
    return [words]


def make_room(words: list[str], folder: Path) -> None:
    """Remove what stands where a command writes: commands of a page that write to one place are alternatives."""
    values = dict(zip(words, words[1:], strict=False))
    named = [values[flag] for flag in ("--output", "--save") if flag in values]
    for name in named:
        if name == values.get("--load"):  # the run is resumed
            continue
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    if prefix := values.get("--output-prefix"):
        for ending in ("bin", "idx", "json"):
            for place in [folder / f"{prefix}.{ending}", *folder.glob(f"{prefix}_*_document.{ending}"),
                          *folder.glob(f"{prefix}_conversations*.{ending}")]:
                place.unlink(missing_ok=True)


class Workplace:
    """A folder below which pages are run, each in a copy of the repository with the stand-ins."""

    def __init__(self, folder: Path, timeout_s: float, skip: list[tuple[str, str]]) -> None:
        self.folder, self.timeout_s, self.skip = folder, timeout_s, skip
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, command in (("dsv3", "-m dsv3_megatron"), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command} "$@"\n')
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        self.inputs: Path | None = None

    def run(self, command: Command, folder: Path) -> Outcome:
        """Run one command, made smaller, in a folder, or say why it is not run."""
        text = str(command)
        reason = next((reason for pattern, reason in self.skip if re.match(pattern, text)), None)
        if reason:
            return Outcome("not run", said=reason)
        start = time.monotonic()
        make_room(command.words, folder)
        for words in smaller(command.words):
            failure = self.call(words, folder, command.variables)
            if failure:
                return Outcome("failed", time.monotonic() - start, f"{shlex.join(words)}\n{failure}")
        return Outcome("ran", time.monotonic() - start)

    def call(self, words: list[str], folder: Path, variables: dict[str, str] | None = None) -> str:
        """Run words as they are; return "" or, of a failure, the exit code and the last lines."""
        environment = {**self.environment, "PYTHONPATH": str(folder), **(variables or {})}
        output = folder / "output.log"
        with output.open("w") as file:
            try:
                process = subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                           stderr=subprocess.STDOUT)
            except OSError as error:
                return f"cannot be started: {error}"
            try:
                code: int | str = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()  # the launcher ends what it started
                process.wait()
                code = f"none within {self.timeout_s:.0f} s"
        last = output.read_text(errors="replace").splitlines()[-12:]
        return "" if code == 0 else "\n".join([f"exit code {code}", *last])

    def page(self, page: Path, text: str, tell: Callable[[Command, Outcome], None]) -> None:
        """Run the commands of a page in order, in a folder of its own."""
        shown = list(commands(text))
        if not shown:
            return
        folder = self.folder / re.sub(r"\W", "_", str(page))
        if all(any(re.match(pattern, str(command)) for pattern, _ in self.skip) for command in shown):
            folder.mkdir()
        else:
            self.inputs = self.inputs or self.make_inputs()
            shutil.copytree(self.inputs, folder)
        for fence in fences(text):
            if fence.language == "toml":  # the page says under which name to save it
                (folder / "run.toml").write_text(fence.text)
        for command in shown:
            tell(command, self.run(command, folder))
        shutil.rmtree(folder)

    def make_inputs(self) -> Path:
        """Make the folder that each page's is a copy of: the repository, and the inputs that pages presuppose.

        Raises:
            RuntimeError: one of the commands that make them failed.
        """
        import numpy as np
        import pyarrow
        import pyarrow.parquet

        folder = self.folder / "inputs"
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, text=True,
                                stdout=subprocess.PIPE).stdout.splitlines()
        names = [name for name in listed if (ROOT / name).is_file()]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in names if name.endswith((".md", ".py"))]
        documents = [{"text": text, "summary": text[:80]} for text in texts if text][:300]
        lines = "".join(json_text(document) + "\n" for document in documents)
        (folder / "corpus.jsonl").write_text(lines)
        (folder / "pages").mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents[:50]), folder / "pages" / "1.parquet")
        with pyarrow.output_stream(str(folder / "more.jsonl.zst"), compression="zstd") as stream:
            stream.write(lines[:lines.index("\n") + 1].encode())
        chat = [{"prompt": document["summary"], "completion": document["text"][:300]} for document in documents]
        pairs = (json_text(pair) + "\n" for pair in chat if pair["completion"].strip())
        (folder / "chat.jsonl").write_text("".join(pairs))
        np.save(folder / "ids.npy", np.arange(100).reshape(4, 25))
        quickstart = "runs/quickstart"
        preprocess = f"dsv3 preprocess --input corpus.jsonl --tokenizer-model {quickstart}/tokenizer --append-eod"
        for line in [
            f"dsv3 train-tokenizer --input corpus.jsonl --vocab-size 2048 --output {quickstart}/tokenizer",
            *(f"{preprocess} --output-prefix {prefix}" for prefix in
              (f"{quickstart}/data/train", "data/corpus", "data/web", "data/code")),
            *(f"{preprocess.replace('corpus.jsonl', 'more.jsonl.zst')} --output-prefix {prefix}" for prefix in
              (f"{quickstart}/data/valid", "data/valid")),
            f"{RUN} --preset tiny {SHORT} --data-path {quickstart}/data/train_text_document --tokenizer-model "
            f"{quickstart}/tokenizer --save {quickstart}/checkpoints --tensorboard-dir {quickstart}/tensorboard",
            f"dsv3 convert megatron-to-hf --input {quickstart}/checkpoints --output DeepSeek-V3",
        ]:
            if failure := self.call(shlex.split(line), folder):
                raise RuntimeError(f"a stand-in could not be made: {line}\n{failure}")
        shutil.copytree(folder / quickstart / "tokenizer", folder / "tokenizer")
        shutil.copy(folder / "examples/chat_template.jinja", folder / "tokenizer")
        return folder


def all_pages() -> list[Path]:
    """List the pages whose commands are run, from the repository's folder."""
    return [Path("README.md"), *(path.relative_to(ROOT) for folder in FOLDERS
                                 for path in sorted((ROOT / folder).glob("*.md")))]


def main(arguments: list[str] | None = None) -> int:
    """Run the commands of the pages that are named, or of all; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages, from the repository's folder (default: all)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a command is ended (300)")
    parser.add_argument("--quickstart", action="store_true", help="run the quickstart too, whole")
    options = parser.parse_args(arguments)
    skip = [(pattern, reason) for pattern, reason in NOT_RUN if not (options.quickstart and "quickstart" in reason)]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="documented-commands-") as folder:
        workplace = Workplace(Path(folder) / "work", options.timeout, skip)
        for page in options.pages or all_pages():
            def tell(command: Command, outcome: Outcome, page: Path = page) -> None:
                counts[outcome.kind] += 1
                seconds = f" {outcome.seconds:.1f} s" if outcome.seconds else ""
                print(f"{page}: {outcome.kind}{seconds}: {command}", flush=True)
                if outcome.said:
                    print("    " + outcome.said.replace("\n", "\n    "), flush=True)

            workplace.page(page, (ROOT / page).read_text(encoding="utf-8"), tell)
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("ran", "failed", "not run")))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    run_command(main)
