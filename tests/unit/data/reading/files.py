"""Files of the same documents in every format, and their texts."""

import bz2
import gzip
import lzma
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from dsv3_megatron.data.reading.blocks import InputPosition, iterate_blocks
from dsv3_megatron.data.reading.documents import Reading, RecordReader
from dsv3_megatron.data.reading.inputs import JobShard, expand_inputs, take_shard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}


def jsonl(texts, end="\n"):
    import json

    return end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode() + end.encode()


def texts_of(files, *, shard=JobShard(), position=InputPosition(), block_bytes=50, keys=("text",)):  # noqa: B008 - frozen
    """Texts of a shard from a position on, and the position behind each block."""
    reader = RecordReader(files, keys)
    found, positions = [], []
    portions = take_shard(files, shard)
    for block in iterate_blocks(
        files, portions, keys=keys, position=position, max_line_bytes=reader.max_line_bytes, block_bytes=block_bytes
    ):
        reading = Reading()
        for record in reader.read(block, reading):
            (text,) = record.texts
            assert text.error is None, text.error
            found.append(text.text)
        assert not reading.rejects
        positions.append((len(found), block.next))
    return found, positions


def write_parquet(path, texts, **options):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)


def formats_in(path, format="auto"):
    return [(os.path.relpath(file.path, path), file.format) for file in expand_inputs([str(path)], format=format)]
