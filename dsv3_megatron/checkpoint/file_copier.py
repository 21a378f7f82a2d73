"""A process that copies files out of shared memory to disk, with checksums, while its parent trains. No torch.

`background.py` starts it as `python -m dsv3_megatron.checkpoint.file_copier DESCRIPTOR PARENT`. It reads one JSON line
for each file from its input and answers each with one line:

    {"path": "ck/iter_0000100.saving/__3_0.distcp", "num_bytes": 1000}
    {"checksums": {...}}        or        {"errno": 28, "reason": "No space left on device", "path": "..."}

It ends with its input. When its parent is gone, however that ended, the kernel kills it: it never goes on writing into
the folder of a run that has been started again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import BLOCK_BYTES, ChecksumStream, FileChecksums
from dsv3_megatron.process.parent import end_with_parent

__all__ = ["copy_durably", "main"]

# Training goes first where both want a core.
_NICE = 10


def copy_durably(memory: int, num_bytes: int, path: Path) -> FileChecksums:
    """Copy the first bytes of one open file to a new file, and have that on disk.

    Args:
        memory: Descriptor to copy from; its position does not matter and stays.
        num_bytes: Bytes to copy.
        path: File to make.

    Returns:
        The checksums of the copied bytes.

    Raises:
        OSError: the file is there already, or cannot be written.
    """
    buffer = memoryview(bytearray(min(BLOCK_BYTES, num_bytes)))
    # Never a file that somebody else has begun.
    with open(path, "xb") as raw:
        stream = ChecksumStream(raw)
        while stream.tell() < num_bytes:
            part = buffer[:num_bytes - stream.tell()]
            count = os.preadv(memory, [part], stream.tell())
            if not count:
                raise OSError(f"the memory ends at byte {stream.tell()} of {num_bytes}")
            stream.write(part[:count])
        raw.flush()
        os.fsync(raw.fileno())
        return stream.checksums()


def main() -> None:
    """Copy what each line of the input names."""
    memory, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    os.nice(_NICE)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer: dict[str, Any] = {"checksums": copy_durably(memory, job["num_bytes"], Path(job["path"])).as_dict()}
        except OSError as error:
            answer = {"errno": error.errno, "reason": error.strerror or str(error), "path": error.filename}
        print(json_text(answer), flush=True)


if __name__ == "__main__":
    main()
