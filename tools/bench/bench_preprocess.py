"""dsv3 preprocess as a whole process against its peers, on the same input in the same run.

Every contender is the command that a user types, from its start to its exit, with two workers: ours as it is, ours with
Hugging Face's tokenizers as the backend, and, where a checkout of it is given, Megatron-LM's own tool. Contenders take
turns, so that a disturbance of the machine meets all; the numbers are medians. Peak memory is that of the whole process
tree: the largest sum of resident sizes seen, shared pages counted in every process. All outputs must be the same bytes.

The input is made here: text that the machine has (data/corpus.py), about 100 MB, and a tokenizer of 32,768 ids trained
on it; also compressed, 2 GB of it, and one document of 200 MB.

    python -m tools.bench.bench_preprocess --work-dir /tmp/bench --runs 5 --megatron-lm CHECKOUT
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows, load_average  # noqa: E402

OURS, HUGGING_FACE, MEGATRON = "dsv3_megatron", "dsv3_megatron, tokenizers", "Megatron-LM"
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    seconds: float
    peak_bytes: int


@dataclass
class Case:
    """An input, and the contenders that take it: name -> (command, runs)."""

    config: str
    input_path: Path
    text_bytes: int
    commands: dict[str, list[str]]
    num_runs: dict[str, int]
    runs: dict[str, list[Run]] = field(default_factory=dict)


def measure(command: list[str], environment: dict[str, str]) -> Run:
    """Run a command to its end, looking at the memory of its process tree all the while."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident_bytes, process_tree(process.pid))))
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    assert process.stderr is not None
    if process.returncode:
        raise RuntimeError(f"{command} failed: {process.stderr.read().decode()[-2000:]}")
    return Run(seconds, peak)


def process_tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from process_tree(int(child))


def resident_bytes(pid: int) -> int:
    """Memory of one process that lies in RAM; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def build_inputs(folder: Path) -> tuple[Path, Path]:
    """The corpus (JSON lines) and the tokenizer; made once."""
    corpus, tokenizer = folder / "corpus" / "train.jsonl", folder / "tokenizer"
    if not corpus.exists():
        command = ["-m", "dsv3_megatron.data.corpus", "--output", str(corpus.parent), "--target-bytes", "102000000"]
        subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY)
    if not (tokenizer / "tokenizer.json").exists():
        tool = str(REPOSITORY / "tools" / "train_tokenizer.py")
        options = ["--vocab-size", "32768", "--max-train-bytes", "20000000", "--output", str(tokenizer)]
        subprocess.run([sys.executable, tool, "--input", str(corpus), *options], check=True)
    return corpus, tokenizer


def make_once(path: Path, write: Callable[[Path], None]) -> Path:
    """A file, written if it is not there."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        write(partial)
        partial.rename(path)
    return path


def compress_zstd(data: bytes) -> bytes:
    """With the standard library's zstd or its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": compress_zstd,
    "xz": lambda data: lzma.compress(data, preset=1),
}


def compressed(source: Path, compress: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Writes a compressed copy of a file."""

    def write(path: Path) -> None:
        path.write_bytes(compress(source.read_bytes()))

    return write


def text_bytes_of(path: Path) -> int:
    """UTF-8 bytes of the texts in a file of JSON lines."""
    with open(path, "rb") as stream:
        return sum(len(json.loads(line)["text"].encode()) for line in stream)


def one_document(corpus: Path, num_bytes: int) -> Callable[[Path], None]:
    """Writes one document of about num_bytes, with a character beyond the basic plane: four bytes each in Python."""

    def write(path: Path) -> None:
        with open(corpus, "rb") as stream:
            parts = itertools.cycle([json.loads(line)["text"] for line in stream])
        text, size = [], 0
        while size < num_bytes:
            text.append(next(parts))
            size += len(text[-1].encode())
        path.write_text(json.dumps({"text": "".join(text) + "😀"}, ensure_ascii=False) + "\n", encoding="utf-8")

    return write


def make_cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    """All inputs with their contenders."""
    corpus, tokenizer = build_inputs(folder)
    size = text_bytes_of(corpus)
    common = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
    ours = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), *common, "--workers", "2", "--overwrite"]

    def case(config: str, path: Path, text_bytes: int, *, peers: bool = False) -> Case:
        commands = {OURS: ours}
        if peers:
            commands[HUGGING_FACE] = [*ours, "--tokenizer-backend", "huggingface"]
            if options.megatron_lm:
                tool = str(Path(options.megatron_lm) / "tools" / "preprocess_data.py")
                commands[MEGATRON] = [sys.executable, tool, *common, "--workers", "2"]
        num_runs = {name: options.runs if name == OURS else options.peer_runs for name in commands}
        return Case(config, path, text_bytes, commands, num_runs)

    def repeat(path: Path) -> None:
        with open(path, "wb") as out:
            for _ in range(20):
                with open(corpus, "rb") as stream:
                    shutil.copyfileobj(stream, out)

    cases = [case("100 MB JSON lines", corpus, size, peers=True)]
    for suffix, compress in COMPRESSORS.items():
        path = make_once(folder / f"train.jsonl.{suffix}", compressed(corpus, compress))
        cases.append(case(f"100 MB JSON lines, {suffix}", path, size))
    if options.large:
        path = make_once(folder / "2gb.jsonl", repeat)
        cases.append(case("2 GB JSON lines", path, 20 * size))
        path = make_once(folder / "one_document.jsonl", one_document(corpus, 200_000_000))
        cases.append(case("one document of 200 MB", path, text_bytes_of(path)))
    return cases


def run_case(case: Case, folder: Path) -> None:
    """Run the contenders in turn and see that they wrote the same."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    outputs = {}
    for turn in range(max(case.num_runs.values()) + 1):
        for name, command in case.commands.items():
            # The first turn warms the file cache; a slow peer's is enough as it is.
            if turn > case.num_runs[name] or (turn == 0 and name != OURS):
                continue
            prefix = folder / "out" / name.replace(" ", "_").replace(",", "")
            prefix.parent.mkdir(exist_ok=True)
            peer = {**environment, "PYTHONPATH": str(Path(command[1]).parents[1])}
            run = measure([*command, "--input", str(case.input_path), "--output-prefix", str(prefix)], peer)
            outputs[name] = Path(f"{prefix}_text_document.bin")
            if turn or name != OURS:
                case.runs.setdefault(name, []).append(run)
    first = outputs[OURS].read_bytes()
    for name, path in outputs.items():
        if path.read_bytes() != first:
            raise RuntimeError(f"{name} wrote other tokens than {OURS} for {case.config}")


def decompressor_seconds(path: Path, runs: int) -> float | None:
    """Median seconds of the decompressor's own command writing to nowhere; None for what is not compressed."""
    command = {".gz": ["gzip", "-dc"], ".zst": ["zstd", "-dcq"], ".xz": ["xz", "-dc"]}.get(path.suffix)
    if command is None or shutil.which(command[0]) is None:
        return None
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measurements_of(case: Case) -> list[Measurement]:
    """Rows for the results."""
    rows = []
    for name, runs in case.runs.items():
        seconds = [run.seconds for run in runs]
        values = {
            ("time_median", "s"): statistics.median(seconds),
            ("time_min", "s"): min(seconds),
            ("time_max", "s"): max(seconds),
            ("throughput", "MB/s"): case.text_bytes / 1e6 / statistics.median(seconds),
            ("peak_memory", "MB"): max(run.peak_bytes for run in runs) / 1e6,
            ("num_runs", ""): len(runs),
        }
        rows += [Measurement(name, case.config, metric, value, unit) for (metric, unit), value in values.items()]
        spread = f"({min(seconds):.2f} to {max(seconds):.2f}, {len(runs)} runs)"
        memory = values["peak_memory", "MB"]
        print(f"{case.config:28} {name:28} {statistics.median(seconds):7.2f} s {spread} {memory:7.0f} MB", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure everything and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work-dir", required=True, help="folder for inputs (kept) and outputs; 4 GB with --large"
    )
    parser.add_argument("--runs", type=int, default=5, help="counted runs of ours (%(default)s)")
    parser.add_argument("--peer-runs", type=int, default=3, help="counted runs of a peer (%(default)s)")
    parser.add_argument("--megatron-lm", metavar="DIR", help="checkout of Megatron-LM, to run its tool too")
    parser.add_argument("--large", action="store_true", help="also 2 GB, and one document of 200 MB")
    parser.add_argument("--only", metavar="TEXT", default="", help="only inputs whose name holds this")
    parser.add_argument("--device", required=True, help='what this is, such as "AMD EPYC (AVX2, 2 cores)"')
    parser.add_argument("--dry-run", action="store_true", help="print, but do not append to the results")
    options = parser.parse_args(arguments)
    if load_average() > 0.5:
        print(f"warning: load average {load_average():.2f}: other processes share the cores", file=sys.stderr)
    folder = Path(options.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in make_cases(options, folder):
        if options.only not in case.config:
            continue
        run_case(case, folder)
        rows += measurements_of(case)
        seconds = decompressor_seconds(case.input_path, options.runs)
        if seconds is not None:
            print(f"{case.config:28} {'the decompressor alone':28} {seconds:7.2f} s")
            rows.append(Measurement("the decompressor alone", case.config, "time_median", seconds, "s"))
    if not options.dry_run:
        print(append_rows("preprocess.csv", rows, options.device))
    shutil.rmtree(folder / "out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
