"""The page about Megatron-LM's flags."""

from __future__ import annotations

from pathlib import Path

from dsv3_megatron.config import megatron_docs


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "megatron_lm_flags.md"
    assert page.read_text(encoding="utf-8") == megatron_docs.text(), (
        "python -m dsv3_megatron.config.megatron_docs > docs/megatron_lm_flags.md")
