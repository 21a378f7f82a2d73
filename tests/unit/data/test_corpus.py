"""The quickstart's corpus."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsv3_megatron.data.corpus import build_quickstart_corpus, main


def make_library(root: Path) -> Path:
    """A library with ordinary files and one of each kind that the corpus leaves out."""

    def put(name: str, content: bytes) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for package in range(20):
        for module in range(10):
            line = f"value_{package}_{module} = {package * module}  # a line of source\n"
            put(f"package{package}/module{module}.py", line.encode() * (16 + module))
    put("package0/windows.py", b"\xef\xbb\xbf" + b"carriage = 1\r\n" * 60)
    put("package1/copy.py", (root / "package2/module3.py").read_bytes())
    put("package0/latin.py", b"# caf\xe9\n" * 100)
    put("package0/tiny.py", b"x = 1\n")
    put("package0/huge.py", b"x = 1\n" * 50_000)
    put("package0/table.py", b"x = [" + b"1, " * 1000 + b"]\n")
    put("package0/data.bin", b"0" * 2000)
    put("package0/tests/test_it.py", b"assert True  # not here\n" * 50)
    put("pip/internal.py", b"not_here = True\n" * 50)
    put("_sysconfigdata_x.py", b"not_here = True\n" * 50)
    return root


def read_corpus(folder: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "valid")
    }


def test_corpus_selects_splits_and_reports(tmp_path):
    library = make_library(tmp_path / "library")
    summary = build_quickstart_corpus(tmp_path / "out", target_bytes=10**6, seed=1, roots=[("packages", library)])
    corpus = read_corpus(tmp_path / "out")
    sources = [record["source"] for split in corpus.values() for record in split]
    assert len(sources) == len(set(sources)) == 201  # 200 modules and windows.py; of the two copies one
    assert not any("not_here" in record["text"] for record in corpus["train"] + corpus["valid"])
    assert summary.skipped == {"duplicate": 1, "lines too long": 1, "not UTF-8": 1, "too large": 1, "too small": 1}
    assert (len(corpus["train"]), len(corpus["valid"])) == (summary.num_train_documents, summary.num_valid_documents)
    assert 0 < len(corpus["valid"]) < 20
    windows = next(r for split in corpus.values() for r in split if r["source"] == "packages/package0/windows.py")
    assert windows["text"] == "carriage = 1\n" * 60
    assert sum(len(r["text"].encode()) for r in corpus["train"]) == summary.train_bytes
    assert sources != sorted(sources)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus.json", "train.jsonl", "valid.jsonl"]
    assert json.loads((tmp_path / "out/corpus.json").read_text()) == dataclasses.asdict(summary)


def test_corpus_depends_on_names_and_texts_alone(tmp_path):
    first, second = make_library(tmp_path / "a"), make_library(tmp_path / "b" / "elsewhere")
    summaries = [
        build_quickstart_corpus(tmp_path / f"out{i}", target_bytes=60_000, seed=seed, roots=[("packages", library)])
        for i, (library, seed) in enumerate([(first, 1), (second, 1), (first, 2)])
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0].sha256 != summaries[2].sha256
    total = summaries[0].train_bytes + summaries[0].valid_bytes
    assert 60_000 <= total < 60_000 + 2_000


def test_corpus_caps_one_package(tmp_path):
    for package, count in (("big", 60), ("small", 30)):
        for i in range(count):
            path = tmp_path / "library" / package / f"m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package}_{i} = 1\n" * 60)
    summary = build_quickstart_corpus(tmp_path / "o", target_bytes=90_000, roots=[("packages", tmp_path / "library")])
    assert summary.skipped["package above its share"] > 0
    records = [record for split in read_corpus(tmp_path / "o").values() for record in split]
    assert sum(len(r["text"]) for r in records if "/big/" in r["source"]) <= 15_000


def test_corpus_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"target_bytes=0 must be positive; try 30000000"):
        build_quickstart_corpus(tmp_path / "out", target_bytes=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text found for the corpus \(looked at 0 files, skipped \{\}\): point"):
        build_quickstart_corpus(tmp_path / "out", roots=[("packages", tmp_path / "empty")])
    assert list((tmp_path / "out").iterdir()) == []
    assert main(["--output", str(tmp_path / "out"), "--target-bytes", "-3"]) == 2
    assert capsys.readouterr().err == "error: target_bytes=-3 must be positive; try 30000000\n"


def test_corpus_of_this_python(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--target-bytes", "300000"]) == 0
    assert "documents, 0.3 + 0.0 MB (train + validation)" in capsys.readouterr().out
