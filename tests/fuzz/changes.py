"""Changes to the bytes of a file: what a disk, a cut copy, or somebody who means it, may have made of it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

ESCAPE = "\x1b[2J\x1b]0;owned\x07\nerror: forged line\n"
_NUMBERS: tuple[Any, ...] = (0, -1, 1, 2**31, 2**63, 10**9, 10**30, -(10**30), 1e308, 0.5, float("nan"), float("inf"))
_VALUES: tuple[Any, ...] = (*_NUMBERS, None, True, "", "x" * 5000, ESCAPE, "../../etc/passwd", [], {}, [[]], "\ud800")
_WORDS = (b"\0", b"\xff", b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"\x80" + b"\0" * 7, b"\xff" * 8, b'"', b"{", b"\n",
          b"\r", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 100_000, b"1e999", b"null", b"\x1b[31m")


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A content with one change that knows nothing of its format, and what was done."""
    kind = rng.choice(("bit", "bit", "byte", "cut", "insert", "drop", "swap", "repeat", "word"))
    data, size = bytearray(content), len(content)
    at = rng.randrange(size) if size else 0
    run = min(size - at, rng.choice((1, 4, 8, 64, 4096)))
    if kind == "bit" and size:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte" and size:
        data[at] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == "drop":
        del data[at: at + run]
    elif kind == "swap" and size:
        other = rng.randrange(size)
        data[at], data[other] = data[other], data[at]
    elif kind == "repeat":
        data[at:at] = data[at: at + run]
    else:
        word = rng.choice(_WORDS)
        data[at: at + len(word) * rng.randrange(2)] = word
    return bytes(data), f"{kind} at {at} of {size}"


def change_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A JSON text in which one value is another, missing, there twice, renamed, or nested beyond measure."""
    try:
        whole = json.loads(content)
    except ValueError:
        return change_bytes(content, rng)
    places = list(_places(whole))
    if not places:
        return change_bytes(content, rng)
    holder, key = rng.choice(places)
    kind = rng.choice(("value", "value", "value", "drop", "rename", "deep", "digits", "twice", "number"))
    what = f"{kind} of {key!r}"
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(("unknown", ESCAPE, "../x", ""))] = holder.pop(key)
    elif kind == "number" and type(holder[key]) in (int, float):
        holder[key] = rng.choice((holder[key] + 1, holder[key] * 2, -holder[key], holder[key] / 3))
    elif kind in ("deep", "digits", "twice"):
        before, holder[key] = holder[key], "\0mark"
        text = {"deep": "[" * 100_000 + "]" * 100_000, "digits": "7" * 5000,
                "twice": json.dumps(before) + f", {json.dumps(str(key))}: 1"}[kind]
        if kind == "twice" and isinstance(holder, list):
            text = json.dumps(before)
        return json.dumps(whole).replace(json.dumps("\0mark"), text).encode(), what
    else:
        holder[key] = rng.choice(_VALUES)
        what += f" to {str(holder[key])[:30]!r}"
    return json.dumps(whole).encode(), what


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)


def change_json_lines(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file of JSON lines of which one is changed as `change_json` does, left out, or there twice."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return change_bytes(content, rng)
    at = rng.randrange(len(lines))
    lines[at], what = change_json(lines[at].rstrip(b"\n"), rng)
    lines[at] += b"\n"
    return b"".join(lines), f"line {at}: {what}"


def change_index(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """An .idx file in which one number is another: of its header, its lengths, its offsets or its documents."""
    header = struct.Struct("<9sQBQQ")
    data = bytearray(content)
    if rng.random() < 0.3:
        fields = list(header.unpack(data[:header.size]))
        place = rng.randrange(1, 5)
        fields[place] = rng.choice((0, 1, 2, 7, 9, 255)) if place == 2 else rng.choice(
            (0, 1, fields[place] + 1, fields[place] - 1, 10**9, 2**63, 2**64 - 1))
        data[:header.size] = header.pack(*fields)
        return bytes(data), f"header field {place} to {fields[place]}"
    sequences = header.unpack(data[:header.size])[3]
    lengths_end = header.size + 4 * sequences
    if rng.random() < 0.5:
        at = header.size + 4 * rng.randrange(sequences)
        struct.pack_into("<i", data, at, rng.choice((0, 1, -1, -2**31, 2**31 - 1)))
    else:
        at = lengths_end + 8 * rng.randrange((len(data) - lengths_end) // 8)
        struct.pack_into("<q", data, at, rng.choice((0, 1, 2, -1, -2**63, 2**63 - 1, 2**40)))
    return bytes(data), f"number at byte {at}"


def change_safetensors(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file whose header is changed as `change_json` does, with a length that fits it."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.1:
        word = rng.choice((0, 1, length + 1, len(content), 2**40, 2**64 - 1))
        return word.to_bytes(8, "little") + content[8:], f"header length {word}"
    header, what = change_json(content[8: 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length:], what


def structured(name: str) -> Callable[[bytes, random.Random], tuple[bytes, str]]:
    """The change that knows the format of a file of this name; that of bytes for one that has none."""
    for endings, change in (((".jsonl",), change_json_lines), ((".json",), change_json), ((".idx",), change_index),
                            ((".safetensors",), change_safetensors)):
        if name.endswith(endings):
            return change
    return change_bytes
