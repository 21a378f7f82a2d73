r"""gigatoken's tokenizer, loaded; imported when it is first asked for.

gigatoken knows split patterns by their text, and DeepSeek-V3's published one spells line breaks as the characters
themselves: where a file has \r and \n instead, they are written out.
"""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

from dsv3_megatron.config.output import json_text


def load_fast_tokenizer(content: dict[str, Any]) -> Any:
    """A gigatoken tokenizer from the content of a tokenizer.json.

    Raises:
        ValueError: gigatoken is not installed or cannot load this tokenizer; says why.
    """
    try:
        return _load(content)
    except ValueError as error:
        spelled = copy.deepcopy({"pre_tokenizer": content.get("pre_tokenizer")})
        if _spell_line_breaks_out(spelled):
            with contextlib.suppress(ValueError):
                return _load(content | spelled)
        raise error


def bound_cache(max_bytes: int) -> None:
    """Bound gigatoken's own caches, in the releases after 0.10.0 that can; a no-op otherwise."""
    from gigatoken import gigatoken_rs

    if hasattr(gigatoken_rs, "set_max_cache_bytes"):
        gigatoken_rs.set_max_cache_bytes(max_bytes)


def _load(content: dict[str, Any]) -> Any:
    try:
        from gigatoken import gigatoken_rs
    except ImportError as error:
        raise ValueError(f"gigatoken is not installed ({error}): pip install gigatoken") from None
    try:
        return gigatoken_rs.load_hf_json(json_text(content, ensure_ascii=False).encode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises what its parts raise
        raise ValueError(f"gigatoken cannot load it: {' '.join(str(error).split())[:200]}") from None


def _spell_line_breaks_out(node: Any) -> bool:
    r"""Write \r and \n in split patterns as the characters they stand for; whether there were any."""
    is_changed = False
    if isinstance(node, dict):
        pattern = node.get("pattern")
        if node.get("type") == "Split" and isinstance(pattern, dict) and "Regex" in pattern:
            spelled = re.sub(
                r"\\(.)", lambda m: {"r": "\r", "n": "\n"}.get(m[1], m[0]), pattern["Regex"], flags=re.DOTALL
            )
            is_changed = spelled != pattern["Regex"]
            pattern["Regex"] = spelled
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            is_changed |= _spell_line_breaks_out(value)
    return is_changed
