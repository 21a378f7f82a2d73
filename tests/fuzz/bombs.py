"""Small files that would take all memory or all time: each must be refused with a message, within bounds.

    python -m tests.fuzz.bombs

Each is read by a command in a forked process with 1.5 GB of memory beyond what it begins with (tests/fuzz/trials.py).
Exit status: 0 if every one is refused, within 5 seconds of the process's own time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.fuzz.files import preload, write
from tests.fuzz.specimens import CHAT, PREPROCESS, write_specimens
from tests.fuzz.trials import Trial, try_command

MOST_S = 5.0
_MODEL = ("num_layers", "num_experts", "vocab_size", "num_attention_heads", "mtp_num_layers", "num_dense_layers")


@dataclass(frozen=True)
class Bomb:
    """A file that means harm.

    Attributes:
        name: Name of the bomb, for the table.
        words: The command that reads it.
        make: Writes it, in the working directory, among the specimens.
        skips: The command may end well: it goes on without it, and says so (`--on-error skip`), or needs little for it.
    """

    name: str
    words: tuple[str, ...]
    make: Callable[[], object]
    skips: bool = False


def _zst_line() -> None:
    from dsv3_megatron.data.reading.file_content import decompressor

    zst = decompressor("zst")
    with zst.open("bomb.jsonl.zst", "wb") as stream:
        stream.write(b'{"text": "')
        block = b"a" * (1 << 20)
        for _ in range(8000):
            stream.write(block)
        stream.write(b'"}\n{"text": "a sound one"}\n')


def _gz_text() -> None:
    import gzip

    Path("texts").mkdir()
    with gzip.open("texts/a.txt.gz", "wb", compresslevel=1) as stream:
        for _ in range(3000):
            stream.write(b"a" * (1 << 20))


def _parquet(num_rows: int, num_bytes: int) -> Callable[[], None]:
    def make() -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # One long text that a dictionary has once, in very many rows.
        text = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array(["a" * num_bytes]))
        pq.write_table(pa.table({"text": text}), "bomb.parquet", compression="zstd")

    return make


def _settings(text: str, ending: str = "yaml") -> Callable[[], object]:
    return lambda: Path(f"bomb.{ending}").write_text(text)


def _config(**changes: object) -> Callable[[], None]:
    def make() -> None:
        file = Path("exported/config.json")
        Path("exported/checksums.json").unlink()
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def _safetensors(header: str) -> Callable[[], None]:
    def make() -> None:
        Path("exported/checksums.json").unlink()
        content = header.encode()
        Path("exported/model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)

    return make


def _tokenizer(change: Callable[[dict], object]) -> Callable[[], None]:
    def make() -> None:
        file = Path("tokenizer/tokenizer.json")
        Path("tokenizer/checksums.json").unlink()
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return make


def _regex(pattern: str) -> Callable[[], None]:
    def change(content: dict) -> None:
        content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                                    "invert": False}

    def make() -> None:
        _tokenizer(change)()
        Path("text.jsonl").write_text(json.dumps({"text": "a" * 5000 + "!"}) + "\n")

    return make


def _sparse(name: str, num_bytes: int) -> Callable[[], None]:
    def make() -> None:
        Path(Path(name).parent / "checksums.json").unlink(missing_ok=True)
        os.truncate(name, num_bytes)

    return make


def bombs() -> Iterator[Bomb]:
    """Every kind."""
    read = tuple(PREPROCESS)
    of_text = (*read, "--input", "text.jsonl", "--output-prefix", "made")
    yield Bomb("a line of 8 GB in zstd", (*read, "--input", "bomb.jsonl.zst", "--output-prefix", "made"), _zst_line)
    yield Bomb("a line of 8 GB in zstd, skipped", (*read, "--input", "bomb.jsonl.zst", "--output-prefix", "made",
                                                   "--on-error", "skip"), _zst_line, skips=True)
    yield Bomb("a text of 3 GB in gzip", (*read, "--input", "texts", "--output-prefix", "made"), _gz_text)
    for num_rows, num_bytes in ((2700, 1_000_000), (65_000, 1_000_000)):
        yield Bomb(f"Parquet of {num_rows / 1000:g} GB", (*read, "--input", "bomb.parquet", "--output-prefix", "made"),
                   _parquet(num_rows, num_bytes))
    yield Bomb("a list 100,000 deep in a line", of_text,
               lambda: Path("text.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"))
    yield Bomb("a number of 5,000 digits in a line", of_text,
               lambda: Path("text.jsonl").write_text('{"text": ' + "7" * 5000 + "}\n"))
    for name in _MODEL:
        yield Bomb(f"10^9 {name} in settings", ("train", "--config", "bomb.yaml", "--print-model"),
                   _settings(f"model:\n  {name}: 1000000000\n"), skips=name == "vocab_size")
    for name in ("num_hidden_layers", "n_routed_experts", "vocab_size", "num_attention_heads",
                 "num_nextn_predict_layers", "max_position_embeddings", "hidden_size"):
        yield Bomb(f"10^9 {name} in an export", tuple("evaluate --load exported --tokens tokens.npy".split()),
                   _config(**{name: 10**9}), skips=name == "max_position_embeddings")
    yield Bomb("YAML's laughs", ("train", "--config", "bomb.yaml", "--print-model"), _settings(
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12))))
    yield Bomb("YAML that holds itself", ("train", "--config", "bomb.yaml", "--print-model"),
               _settings("a: &a [*a, *a]\nb: *a\n"))
    yield Bomb("YAML 100,000 deep", ("train", "--config", "bomb.yaml", "--print-model"), _settings("[" * 100_000))
    yield Bomb("TOML 100,000 deep", ("train", "--config", "bomb.toml", "--print-model"),
               _settings("a = " + "[" * 100_000, "toml"))
    yield Bomb("TOML of 400,000 dots", ("train", "--config", "bomb.toml", "--print-model"),
               _settings("a." * 400_000 + "a = 1", "toml"))
    yield Bomb("JSON of 60,000 names", ("train", "--config", "bomb.json", "--print-model"), _settings(
        json.dumps({f"n{n}": 1 for n in range(60_000)}), "json"))
    yield Bomb("settings of 8 GB", ("train", "--config", "settings.json", "--print-model"),
               _sparse("settings.json", 8_000_000_000))
    export = tuple("convert hf-to-megatron --input exported --output made --workers 1".split())
    yield Bomb("a header 100,000 deep", export, _safetensors('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"))
    yield Bomb("a shape that is 5", export, _safetensors('{"lm_head.weight": {"dtype": "F32", "shape": 5, '
                                                         '"data_offsets": [0, 4]}}'))
    yield Bomb("a shape of 5,000 digits", export, _safetensors(
        '{"lm_head.weight": {"dtype": "F32", "shape": [' + "7" * 4000 + '], "data_offsets": [0, 4]}}'))
    yield Bomb("a shape of 10^6 axes", export, _safetensors(
        '{"lm_head.weight": {"dtype": "F32", "shape": [' + "9," * 1_000_000 + '9], "data_offsets": [0, 4]}}'))
    yield Bomb("a header of 90 MB of brackets", export, _safetensors('{"a": [' + "[]," * 30_000_000 + "[]]}"))
    yield Bomb("a header of 2^63 bytes", export, lambda: (
        Path("exported/checksums.json").unlink(),
        Path("exported/model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")))
    yield Bomb("an export's config of 8 GB", export, _sparse("exported/config.json", 8_000_000_000))
    yield Bomb("a tokenizer of 8 GB", of_text, _sparse("tokenizer/tokenizer.json", 8_000_000_000))
    yield Bomb("a regular expression without end", of_text, _regex(r"(a+)+(a+)+$"))
    yield Bomb("a regular expression of 10^6 groups", of_text, _regex("(" * 100_000 + ")" * 100_000))
    chat = (*CHAT, "made")
    for name, source in (
            ("never ends", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
            ("writes 10 GB", "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}"),
            ("repeats a text", "{{ 'a' * 10 ** 12 }}"),
            ("repeats a text that is known", "{{ 'a' * 1000000000000 }}"),
            ("doubles a text", "{% set ns = namespace(a='a') %}{% for a in range(99) %}{% set ns.a = ns.a ~ ns.a %}"
             "{% endfor %}"),
            ("takes powers", "{{ 9 ** (9 ** 9) ** 9 }}"),
            ("pads a text", "{{ '%1000000000000d' % 1 }}"),
            ("calls itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")):
        yield Bomb(f"a chat template that {name}", chat,
                   partial(Path("tokenizer/chat_template.jinja").write_text, source))
    yield Bomb("a chat template 10,000 deep", chat, partial(
        Path("tokenizer/chat_template.jinja").write_text, "{% if a %}" * 10_000 + "{% endif %}" * 10_000))
    yield Bomb("an array of 10^18 ids", tuple("evaluate --load exported --tokens tokens.npy".split()), _npy)


def _npy() -> None:
    import numpy as np

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (10**9, 10**9)})
    Path("tokens.npy").write_bytes(stream.getvalue())


def explode(bomb: Bomb, specimens: Path, folder: Path) -> Trial:
    """Make a bomb among copies of the specimens and have its command read it."""
    copied = folder / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(specimens, copied)
    before = Path.cwd()
    os.chdir(copied)
    try:
        bomb.make()
    finally:
        os.chdir(before)

    def work() -> int:
        from dsv3_megatron.commands.dispatch import main

        return main(list(bomb.words))

    return try_command(work, copied, timeout_s=60)


def main(arguments: list[str] | None = None) -> int:
    """Read every bomb and print what became of it; returns 0 if all are refused in time."""
    parser = argparse.ArgumentParser(description="Have commands read files that would take all memory or time.")
    parser.add_argument("--only", default="", metavar="NAME", help="bombs whose name has this in it")
    options = parser.parse_args(arguments)
    preload()
    failed = 0

    with tempfile.TemporaryDirectory(prefix="bombs-") as name:
        specimens = Path(name) / "specimens"
        specimens.mkdir()
        write_specimens(specimens, partial(write, specimens), partial(write, specimens, is_stopped=True))
        for bomb in bombs():
            if options.only not in bomb.name:
                continue
            trial = explode(bomb, specimens, Path(name))
            is_well = trial.ending in (("done", "refused") if bomb.skips else ("refused",)) and trial.cpu_s <= MOST_S
            failed += not is_well
            lines = [line for line in trial.said[1].splitlines() if "error" in line] or trial.said[1].splitlines()[-1:]
            print(f"{'' if is_well else 'FAILED '}{bomb.name}: {trial.ending}, {trial.cpu_s:.1f} s of its own, "
                  f"{trial.seconds:.1f} s, {trial.peak_mb} MB more: {' '.join(lines)[:160]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    from tests.fuzz import bombs as module  # by its name, so that the forks find it

    sys.exit(module.main())
