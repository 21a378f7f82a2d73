"""The commands that read each kind of file, and what each made of it: what must be equal if a change did no harm."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_megatron.data.reading.file_content import decompressor
from tests.fuzz.specimens import CHAT, PLAN, PREPROCESS, TO_HUGGING_FACE, TO_MEGATRON, TRAIN, UNFINISHED

# What is left of a file of these is not comparable: times are in them.
_TIMED = ("metrics.jsonl",)


@dataclass(frozen=True)
class Reader:
    """A command, the files that it reads, and what it makes.

    Attributes:
        name: Name of the reader, for the table.
        reads: Patterns of the files that are changed for it.
        needs: Names of what is copied for it.
        words: Words of the command; or a function that is called in the folder instead, and prints.
        makes: Patterns of the files that it makes, whose bytes are its result.
        weight: Share of the cases that it gets, against the others.
        shows: Its standard output is a result too.
        stands: A function that computes the result from the changed file by other means, for files of which nothing is
            known but what stands in them (text, settings): then another valid file gives another result, rightly.
    """

    name: str
    reads: tuple[str, ...]
    needs: tuple[str, ...]
    words: tuple[str, ...] | Callable[[], int]
    makes: tuple[str, ...] = ()
    weight: float = 1.0
    shows: bool = True
    stands: Callable[[Path], Any] | None = None

    def run(self) -> int:
        """Carry out the command in the working directory; returns its exit code."""
        if callable(self.words):
            return self.words()
        from dsv3_megatron.commands.dispatch import main

        return main(list(self.words))

    def result(self, folder: Path, printed: str) -> dict[str, Any]:
        """What the command made, for comparing."""
        found: dict[str, Any] = {"printed": printed} if self.shows else {}
        for pattern in self.makes:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    found[str(file.relative_to(folder))] = _content(file)
        return found


def _content(file: Path) -> Any:
    if file.name in _TIMED:
        last = json.loads(file.read_text().splitlines()[-1])
        # The last step: a run goes back behind a checkpoint that is damaged, and takes its steps again.
        return [last.get(name) for name in ("iteration", "lm_loss", "grad_norm", "consumed_tokens")]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read_settings(file: str) -> int:
    """Print every setting of the run that a file gives."""
    from dsv3_megatron.config.load import parse_command

    try:
        run = parse_command(["--config", file]).run
        run.validate(1)
    except ValueError as error:
        return _refused(error)
    print(json.dumps(dataclasses.asdict(run), default=str))
    return 0


def _read_sweep() -> int:
    """Print every run of a sweep's file, with the settings that its command line gives."""
    from dsv3_megatron.commands.sweep import _line_of, _reader_of
    from dsv3_megatron.config.sweep_file import check_settings, read_sweep

    try:
        plan = read_sweep("sweep.toml", _line_of)
        parse = _reader_of(plan.command)
        steps = check_settings(plan, parse)
        runs = [{"seed": run.seed, "folder": str(run.folder), "steps": steps[run.setting],
                 "run": dataclasses.asdict(parse(run.words).run)} for run in plan.runs]
    except ValueError as error:
        return _refused(error)
    print(json.dumps({"command": plan.command, "at_a_time": plan.at_a_time, "processes": plan.processes, "runs": runs},
                     default=str))
    return 0


def _sweep_stands(folder: Path) -> Callable[[str], bool]:
    """Whether the runs are all combinations that the file gives, each with the values of its own."""
    import tomllib

    given = tomllib.loads((folder / "sweep.toml").read_text(encoding="utf-8-sig"))
    grid = given.get("grid", {})
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    variants = list(given.get("variants", {}).values()) or [{}]
    asked = [given.get("settings", {}) | variant | point | {"seed": seed}
             for seed in given["seeds"] for variant in variants for point in points]

    def are_all(printed: str) -> bool:
        plan = json.loads(printed)
        places = {run["folder"] for run in plan["runs"]}
        return (plan["at_a_time"] == given.get("at_a_time", 1) and plan["processes"] == given.get("processes", 1)
                and len(places) == len(asked) == len(plan["runs"])
                and all(Path(given["output"]) in Path(place).parents for place in places)
                and all(any(_has(run["run"], values) for run in plan["runs"]) for values in asked))

    return are_all


def _has(run: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether a run has the values of these fields; its preset is no field."""
    fields = {name: value for section in run.values() if isinstance(section, dict) for name, value in section.items()}
    return all(float(fields[name]) == float(value)
               for key, value in values.items() if (name := key.replace("-", "_")) != "preset")


def _read_log() -> int:
    from dsv3_megatron.metrics.event_files import read_run

    try:
        log = read_run(Path("logs"))
    except ValueError as error:
        return _refused(error)
    print(log.scalars, log.records, log.config, log.environment)
    return 0


def _refused(error: Exception) -> int:
    from dsv3_megatron.config.streams import message

    print(f"error: {message(error)}", file=sys.stderr)
    return 2


def _settings_stand(folder: Path) -> Callable[[str], bool]:
    """Whether what was printed has every value that the file gives."""
    (file,) = folder.glob("settings.*")
    import tomllib

    import yaml

    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".json": json.loads}
    given = readers[file.suffix](file.read_text(encoding="utf-8-sig"))

    def has_all(printed: str) -> bool:
        run = json.loads(printed)
        for key, value in given.items():
            if key == "preset":
                continue
            # A section may be empty.
            entries = (value or {}) if key in run and isinstance(value, dict | None) else {key: value}
            for name, entry in entries.items():
                taken = next(section[name] for section in run.values()
                             if isinstance(section, dict) and name in section)
                if name != "phases" and taken != entry and float(taken) != float(entry):
                    return False
        return True

    return has_all


def _texts_of(folder: Path) -> list[str]:
    """The documents of a text input by readers of our own."""
    file = next(folder.glob("text.*"))
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(file)["text"].to_pylist()
    content = file.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    elif content.startswith(b"\x28\xb5\x2f\xfd"):
        content = decompressor("zst").decompress(content)
    text = content.decode("utf-8").removeprefix("\ufeff")
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


def _ids_stand(folder: Path) -> Callable[[str], bool]:
    """Whether the .bin file has the ids of the texts, by the tokenizers library."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    ids = [number for text in _texts_of(folder)
           if text for number in [*tokenizer.encode(text, add_special_tokens=False).ids, 1]]

    def are_equal(_printed: str) -> bool:
        return np.fromfile(folder / "made_text_document.bin", np.uint16).tolist() == ids

    return are_equal


def _chat_stands(folder: Path) -> Callable[[str], bool]:
    """Whether the ids are those of the conversations by Jinja2 and the tokenizers library, and as many as the masks."""
    import numpy as np
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    source = (folder / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    source = source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    lines = (folder / "chat.jsonl").read_bytes().decode("utf-8").removeprefix("\ufeff").split("\n")
    texts = [template.render(messages=[
        {**message, "content": message["content"] if isinstance(message["content"], str) else ""}
        for message in json.loads(line)["messages"]]) for line in lines if line.strip()]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    ids = [number for text in texts for number in tokenizer.encode(text, add_special_tokens=False).ids]

    def are_equal(_printed: str) -> bool:
        masks = (folder / "made_conversations_mask.bin").read_bytes()
        return (np.fromfile(folder / "made_conversations.bin", np.uint16).tolist() == ids and len(masks) == len(ids)
                and set(masks) <= {0, 1} and 1 in masks)

    return are_equal


EVALUATE = "evaluate --load saved --data-path data/d_text_document --micro-batch-size 16 --json"
SFT = ("sft --pretrained-checkpoint saved --data-path talk/chat_conversations --tokenizer-model tokenizer "
       "--seq-length 32 --split 100,0,0 --global-batch-size 2 --train-iters 2 --eval-interval 0 --log-interval 1 "
       "--transformer-impl local --long-conversations cut --tensorboard-dir made")
_DATA = ("data/*_document.bin", "data/*_document.idx", "data/*_document.json", "data/*_document.sums")
_SAVED = ("saved/iter_0000002/*", "saved/iter_0000002/.metadata", "saved/latest*", "saved/*.json")
_EXPORTED = ("exported/*",)
_TOKENIZER = ("tokenizer/*",)
# A chat template that was put beside a tokenizer is copied as it is.
_OWN_TOKENIZER = ("tokenizer/*.json",)
_TALK = ("talk/*.bin", "talk/*.idx", "talk/*.json", "talk/*.sums")


def readers() -> tuple[Reader, ...]:
    """Every command with what it reads."""
    texts = tuple(
        Reader(f"preprocess {ending}", (f"text.{ending}",), (f"text.{ending}", "tokenizer"),
               (*PREPROCESS, "--input", f"text.{ending}", "--output-prefix", "made"), ("made*.bin", "made*.idx"),
               weight=3, shows=False, stands=_ids_stand)
        for ending in ("jsonl", "zst.jsonl.zst", "gz.jsonl.gz", "parquet"))
    settings = tuple(
        Reader(f"train --config {ending}", (f"settings.{ending}",), (f"settings.{ending}",),
               partial(_read_settings, f"settings.{ending}"), weight=3, stands=_settings_stand)
        for ending in ("toml", "yaml", "json"))
    return (
        *texts, *settings,
        Reader("sweep", ("sweep.toml",), ("sweep.toml",), _read_sweep, weight=2, stands=_sweep_stands),
        Reader("preprocess, tokenizer", _TOKENIZER, ("text.jsonl", "tokenizer"),
               (*PREPROCESS, "--input", "text.jsonl", "--output-prefix", "made"), ("made*.bin", "made*.idx"),
               weight=3, shows=False),
        Reader("train-tokenizer", ("text.jsonl",), ("text.jsonl",),
               tuple("train-tokenizer --input text.jsonl --vocab-size 300 --min-frequency 1 --output made".split()),
               ("made/*",), shows=False, stands=lambda folder: lambda _: bool(_texts_of(folder))),
        Reader("inspect", _DATA, ("data",), ("inspect", "data/d_text_document", "--verify", "--json"), weight=3),
        Reader("inspect --documents", (*_DATA, *_TOKENIZER), ("data", "tokenizer"),
               tuple("inspect data/d_text_document --documents 0 1 7 --tokenizer-model tokenizer".split()), weight=3,
               stands=_without_sidecar),
        Reader("merge", _DATA, ("data",), tuple("merge --input data --output-prefix made".split()),
               ("made*.bin", "made*.idx"), weight=2, shows=False),
        Reader("train, data", (*_DATA, "data/*.checked.json", *_TOKENIZER), ("data", "tokenizer"),
               ("train", *TRAIN, "1", "--tensorboard-dir", "made"), ("made/metrics.jsonl",), weight=0.4, shows=False),
        Reader("train --load", _SAVED, ("saved", "data", "tokenizer"),
               ("train", *TRAIN, "3", "--load", "saved", "--save", "saved", "--tensorboard-dir", "made"),
               ("made/metrics.jsonl",), weight=0.4, shows=False),
        Reader("verify", _SAVED, ("saved",), ("verify", "saved"), weight=2),
        Reader("convert verify", _EXPORTED, ("saved", "exported"),
               tuple("convert verify --hf exported --megatron saved --workers 1".split())),
        Reader("evaluate", _SAVED, ("saved", "data", "tokenizer"),
               tuple(EVALUATE.split()), weight=0.4),
        Reader("evaluate, data", (*_DATA, "tokens.npy"), ("saved", "data", "tokens.npy", "tokenizer"),
               tuple(EVALUATE.split()), weight=0.4),
        Reader("evaluate --tokens", ("tokens.npy",), ("saved", "tokens.npy", "tokenizer"),
               tuple("evaluate --load saved --tokens tokens.npy --json".split()),
               stands=lambda folder: lambda _: True),
        Reader("evaluate, export", _EXPORTED, ("exported", "data"),
               tuple("evaluate --load exported --data-path data/d_text_document --seq-length 16 --micro-batch-size 16 "
                     "--json".split()),
               weight=0.4),
        Reader("generate", (*_SAVED, *_OWN_TOKENIZER), ("saved", "prompts.jsonl", "tokenizer"),
               tuple("generate --load saved --prompts prompts.jsonl --max-new-tokens 8 --json".split()), weight=2),
        Reader("generate, prompts", ("prompts.jsonl",), ("saved", "prompts.jsonl", "tokenizer"),
               tuple("generate --load saved --prompts prompts.jsonl --max-new-tokens 1 --json".split()),
               stands=_prompts_stand),
        Reader("generate, export", _EXPORTED, ("exported", "prompts.jsonl"),
               tuple("generate --load exported --prompts prompts.jsonl --max-new-tokens 8 --json".split()), weight=2),
        Reader("convert to Megatron", _EXPORTED, ("exported",),
               tuple("convert hf-to-megatron --input exported --output made --workers 1".split()),
               ("made/iter*/*.distcp", "made/model.json"), weight=2, shows=False),
        Reader("convert to Hugging Face", (*_SAVED, *_OWN_TOKENIZER), ("saved", "tokenizer"),
               tuple("convert megatron-to-hf --input saved --output made --dtype fp32 --workers 1".split()),
               ("made/*",), weight=2, shows=False),
        Reader("preprocess --sft", ("chat.jsonl", "tokenizer/chat_template.jinja"), ("chat.jsonl", "tokenizer"),
               (*CHAT, "made"), ("made*.bin", "made*.idx"), weight=3, shows=False, stands=_chat_stands),
        Reader("sft", (*_TALK, *_OWN_TOKENIZER), ("saved", "talk", "tokenizer"), tuple(SFT.split()),
               ("made/metrics.jsonl",), weight=0.8, shows=False),
        Reader("sft, base model", _SAVED, ("saved", "talk", "tokenizer"), tuple(SFT.split()), ("made/metrics.jsonl",),
               weight=0.4, shows=False),
        Reader("inspect, masks", ("talk/*_mask.*",), ("talk",),
               tuple("inspect talk/chat_conversations_mask --verify --documents 0 3 --json".split())),
        Reader("preprocess --resume", ("unfinished/made*/*",), ("text.jsonl", "tokenizer", "unfinished"),
               (*UNFINISHED, "--resume"), ("unfinished/made*.bin", "unfinished/made*.idx"), weight=2, shows=False),
        Reader("convert to Hugging Face, going on", ("unfinished/exported.partial/**/*",),
               ("saved", "tokenizer", "unfinished"), tuple(TO_HUGGING_FACE), ("unfinished/exported/*",), shows=False),
        Reader("convert to Megatron, going on", ("unfinished/converted.partial/**/*",), ("exported", "unfinished"),
               tuple(TO_MEGATRON), ("unfinished/converted/iter*/*.distcp", "unfinished/converted/model.json"),
               shows=False),
        Reader("train, logs", ("logs/*",), ("logs", "saved", "data", "tokenizer"),
               ("train", *TRAIN, "3", "--load", "saved", "--save", "saved", "--tensorboard-dir", "logs"),
               ("logs/metrics.jsonl",), weight=0.4, shows=False),
        Reader("plot", ("logs/*",), ("logs",), _read_log, weight=2, stands=_log_stands),
        Reader("plan --hardware", ("machine.json",), ("machine.json",),
               (*PLAN, "--hardware", "machine.json"), stands=_machine_stands),
        Reader("draw-schedule", ("trace.json",), ("trace.json",), ("draw-schedule", "trace.json"),
               stands=_trace_stands),
    )


def _without_sidecar(folder: Path) -> Callable[[str], bool]:
    """Whether it is said that there is no sidecar, where there is none."""
    is_gone = not (folder / "data" / "d_text_document.json").exists()
    return lambda printed: is_gone and "none: made by another tool" in printed


def _log_stands(folder: Path) -> Callable[[str], bool]:
    """Whether the lines and settings that were read are those of the files; the scalars have checksums of their own."""
    metrics, records = folder / "logs" / "metrics.jsonl", "None"
    if metrics.exists():  # of a folder without it dsv3 plot says so
        rows = [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1]]
        records = (f"RunRecords(steps={[row for row in rows if row['kind'] == 'step']}, "
                   f"validations={[row for row in rows if row['kind'] != 'step']})")
    files = [folder / "logs" / name for name in ("config.json", "environment.json")]
    said = [json.loads(file.read_bytes()) if file.exists() else None for file in files]
    end = f"{records} {said[0]} {said[1]}\n"
    return lambda printed: printed.endswith(end)


def _machine_stands(folder: Path) -> Callable[[str], bool]:
    """Whether every number of the file is in the machine that is read from it."""
    from dsv3_megatron.planning.machine.hardware import load_hardware

    content = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    read = load_hardware(str(folder / "machine.json")).as_dict()
    return lambda _printed: json.loads(json.dumps(read)) == {"fp8_scales": "", **content}


def _trace_stands(folder: Path) -> Callable[[str], bool]:
    """Whether the step's time is that of the last event in the file."""
    content = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    ends = [event["ts"] + event["dur"] for event in content["traceEvents"] if event["ph"] == "X"]
    return lambda printed: len(ends) == 2 * 8 and printed.startswith("1f1b: 2 ranks, 2 stages, 4 micro-batches")


def _prompts_stand(folder: Path) -> Callable[[str], bool]:
    """Whether the texts that were printed begin with the file's prompts."""
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    return lambda printed: [json.loads(line)["prompt"] for line in printed.splitlines()] == prompts
