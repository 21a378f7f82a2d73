"""JSON files that carry a checksum of their own content: manifests, sidecars, verdicts. No torch.

The checksum is of what the text says, not of its bytes: another spelling of the same values is no damage. It finds
accidents and edits. It does not keep out somebody who signs anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import ALGORITHM, checksum_of


def with_signature(content: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Plain values as they will be read, with the checksum of the others under a field at their end.

    Args:
        content: Plain values; a signature that is among them is made anew.
        field: Name of the field: "ALGORITHM:DIGITS" is put there.
    """
    # As it will be read: JSON has no tuples and no NaN.
    plain = json.loads(json_text({name: value for name, value in content.items() if name != field}))
    plain[field] = f"{ALGORITHM}:{_checksum(plain, ALGORITHM)}"
    return plain


def without_signature(content: dict[str, Any], field: str) -> dict[str, Any]:
    """The values without their signature, which must be theirs.

    Args:
        content: What was read; left as it is.
        field: Name of the field.

    Raises:
        ValueError: there is no signature, it is by an algorithm that is not installed, or the content is another.
    """
    rest = {name: value for name, value in content.items() if name != field}
    signature = content.get(field)
    algorithm, _, digits = signature.partition(":") if isinstance(signature, str) else ("", "", "")
    if not digits:
        raise ValueError(f"it has no {field}; it is damaged, or was edited")
    if _checksum(rest, algorithm) != digits:
        raise ValueError(f"its content does not have its checksum ({algorithm}); it is damaged, or was edited")
    return rest


def _checksum(content: Mapping[str, Any], algorithm: str) -> str:
    try:
        return checksum_of(json_text(content, sort_keys=True, separators=(",", ":")).encode(errors="surrogatepass"),
                           algorithm)
    except KeyError:
        raise ValueError(f"its checksum is by {algorithm!r}, which is unknown here (xxh3_64 needs the package xxhash: "
                         "pip install xxhash)") from None
