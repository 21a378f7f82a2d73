"""Signs manifests and sidecars anew after a test has changed what they speak of, as somebody would who means it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import MANIFEST
from dsv3_megatron.checkpoint.manifest_file import signed_text
from dsv3_megatron.data.checksums import checksum_file
from dsv3_megatron.data.signed_json import with_signature


def sign(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Make the checksums of all files of a checkpoint anew, and the manifest's own.

    Args:
        folder: One checkpoint.
        change: Called with the manifest's content first.
    """
    content = json.loads((folder / MANIFEST).read_text())
    if change is not None:
        change(content)
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    content["files"] = {name: (folder / name).stat().st_size for name in names}
    content["checksums"] = {name: checksum_file(folder / name).as_dict() for name in names}
    (folder / MANIFEST).write_text(signed_text(content))


def change_sidecar(prefix: str | Path, **changes: Any) -> None:
    """Change fields of a dataset's sidecar, and sign it anew.

    Args:
        prefix: The dataset.
        changes: Values by name of the field.
    """
    file = Path(f"{prefix}.json")
    file.write_text(json.dumps(with_signature(json.loads(file.read_text()) | changes, "signature")))
