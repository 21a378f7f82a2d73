"""A small corpus made from text that every machine already has, for the quickstart.

It is made of the Python standard library's and the installed packages' sources and documentation. It needs no network,
and two machines with the same packages produce the same bytes: the order is that of a hash of the path inside the
library, never that of the file system.

    python -m dsv3_megatron.data.corpus --output DIR --target-bytes 30000000
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv3_megatron.config.new_files import open_new, replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import print_error, run_command
from dsv3_megatron.process.stop import end_with_a_line

_TEXT_SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})
_TEXT_NAMES = frozenset({"METADATA"})  # a wheel's README lives there
_SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
# What installs packages is not pinned by a project's constraints, so it differs between machines.
_SKIPPED_PACKAGES = ("pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack", "distutils-precedence")
_MACHINE_DEPENDENT_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
_MIN_FILE_BYTES = 512
_MAX_FILE_BYTES = 200_000
_MAX_LINE_BYTES = 1_000  # longer lines are tables and encoded data rather than text
_MAX_SOURCE_SHARE = 1 / 6  # of the target, for one package: keeps the corpus varied
_VALID_SHARE = 0.02
DEFAULT_TARGET_BYTES = 30_000_000


@dataclass(frozen=True)
class CorpusSummary:
    """What `build_quickstart_corpus` wrote; also in DIR/corpus.json. Bytes are UTF-8 bytes of text."""

    num_train_documents: int
    num_valid_documents: int
    train_bytes: int
    valid_bytes: int
    target_bytes: int
    seed: int
    skipped: dict[str, int]
    sha256: dict[str, str]


def _library_roots() -> list[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    roots = [("stdlib", Path(paths["stdlib"]))]
    for key in ("purelib", "platlib"):
        path = Path(paths[key])
        if path.is_dir() and all(path.resolve() != known.resolve() for _, known in roots):
            roots.append(("packages", path))
    return roots


def _list_candidates(roots: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Every text file under the roots as (label/relative path with forward slashes, path); unordered, unread."""
    found: dict[str, Path] = {}
    for label, root in roots:
        for directory, subdirectories, names in os.walk(root):
            at_top = Path(directory) == root
            subdirectories[:] = [
                name
                for name in subdirectories
                if name not in _SKIPPED_DIRECTORIES
                and not (at_top and label == "packages" and name.split("-")[0] in _SKIPPED_PACKAGES)
            ]
            for name in names:
                if name.startswith(_MACHINE_DEPENDENT_PREFIXES):
                    continue
                if name in _TEXT_NAMES or os.path.splitext(name)[1] in _TEXT_SUFFIXES:
                    path = Path(directory, name)
                    found.setdefault(f"{label}/{path.relative_to(root).as_posix()}", path)
    return list(found.items())


def _hash_fraction(purpose: str, seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _source_of(name: str) -> str:
    label, first, *_ = name.split("/")
    return label if label == "stdlib" else first.split("-")[0].removesuffix(".py").lower()


def _select_documents(
    candidates: list[tuple[str, Path]], *, target_bytes: int, seed: int, skipped: Counter[str]
) -> Iterator[tuple[str, str, int]]:
    """Yield (name, text, UTF-8 bytes) in hash order until target_bytes are reached; count what is passed over."""
    source_limit = int(target_bytes * _MAX_SOURCE_SHARE)
    bytes_by_source: Counter[str] = Counter()
    seen: set[bytes] = set()
    total = 0
    for name, path in sorted(candidates, key=lambda item: (_hash_fraction("order", seed, item[0]), item[0])):
        if total >= target_bytes:
            return
        try:
            size = path.stat().st_size
            if not _MIN_FILE_BYTES <= size <= _MAX_FILE_BYTES:
                skipped["too small" if size < _MIN_FILE_BYTES else "too large"] += 1
                continue
            if bytes_by_source[_source_of(name)] + size > source_limit:
                skipped["package above its share"] += 1
                continue
            raw = path.read_bytes()
        except OSError:
            skipped["unreadable"] += 1
            continue
        try:
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        if max(map(len, raw.splitlines()), default=0) > _MAX_LINE_BYTES:
            skipped["lines too long"] += 1
            continue
        num_bytes = len(text.encode("utf-8"))
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        bytes_by_source[_source_of(name)] += num_bytes
        total += num_bytes
        yield name, text, num_bytes


def build_quickstart_corpus(
    output_jsonl_dir: str | os.PathLike[str],
    *,
    target_bytes: int = DEFAULT_TARGET_BYTES,
    seed: int = 1234,
    roots: list[tuple[str, Path]] | None = None,
) -> CorpusSummary:
    """Write train.jsonl, valid.jsonl (about 2% of the documents) and corpus.json from installed text.

    Every line is {"text": ..., "source": path inside the library}. The files appear under their names only when
    complete, corpus.json last. Where the machine holds less text than asked for, all of it is taken.

    Args:
        output_jsonl_dir: Folder, created if missing.
        target_bytes: UTF-8 bytes of text, both files together; the last document may go past it.
        seed: Chooses the order, and with it the selection and the split.
        roots: (label, folder) pairs instead of the running Python's libraries.

    Raises:
        ValueError: target_bytes is not positive, or no text was found.
    """
    if target_bytes <= 0:
        raise ValueError(f"target_bytes={target_bytes} must be positive; try {DEFAULT_TARGET_BYTES}")
    folder = Path(output_jsonl_dir)
    folder.mkdir(parents=True, exist_ok=True)
    candidates = _list_candidates(roots if roots is not None else _library_roots())
    skipped: Counter[str] = Counter()
    temporary = {split: folder / f"{split}.jsonl.tmp-{os.getpid()}" for split in ("train", "valid")}
    num_documents: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    digests = {split: hashlib.sha256() for split in temporary}
    try:
        streams = {split: open_new(path) for split, path in temporary.items()}
        try:
            selected = _select_documents(candidates, target_bytes=target_bytes, seed=seed, skipped=skipped)
            for name, text, size in selected:
                split = "valid" if _hash_fraction("split", seed, name) < _VALID_SHARE else "train"
                line = json_text({"text": text, "source": name}, ensure_ascii=False).encode("utf-8") + b"\n"
                streams[split].write(line)
                digests[split].update(line)
                num_documents[split] += 1
                num_bytes[split] += size
        finally:
            for stream in streams.values():
                stream.close()
        if not num_documents["train"]:
            raise ValueError(
                f"no text found for the corpus (looked at {len(candidates)} files, skipped {dict(skipped)}): "
                "point --input of dsv3 preprocess at JSON Lines files of your own"
            )
        summary = CorpusSummary(
            num_train_documents=num_documents["train"],
            num_valid_documents=num_documents["valid"],
            train_bytes=num_bytes["train"],
            valid_bytes=num_bytes["valid"],
            target_bytes=target_bytes,
            seed=seed,
            skipped=dict(sorted(skipped.items())),
            sha256={f"{split}.jsonl": digest.hexdigest() for split, digest in digests.items()},
        )
        (folder / "corpus.json").unlink(missing_ok=True)  # it vouches for the two files, so it goes first
        for split, path in temporary.items():
            os.replace(path, folder / f"{split}.jsonl")
        replace_text(folder / "corpus.json", json_text(asdict(summary), indent=2) + "\n", is_shared=True)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_megatron.data.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--target-bytes", type=int, default=DEFAULT_TARGET_BYTES, help="text to gather (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="chooses order and split (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        summary = build_quickstart_corpus(options.output, target_bytes=options.target_bytes, seed=options.seed)
    except ValueError as error:
        print_error(error)
        return 2
    print(
        f"corpus: {summary.num_train_documents} + {summary.num_valid_documents} documents, "
        f"{summary.train_bytes / 1e6:.1f} + {summary.valid_bytes / 1e6:.1f} MB (train + validation) "
        f"in {time.perf_counter() - start:.1f} s -> {options.output}"
    )
    print(f"skipped: {', '.join(f'{count} {why}' for why, count in summary.skipped.items()) or 'nothing'}")
    return 0


if __name__ == "__main__":
    run_command(lambda: end_with_a_line(main, "the same command begins again"))
