"""How the texts of a dataset begin and end, beside the end-of-document token.

A tokenizer may put tokens around every text, as Llama 3's puts a begin token before it. Whether they stand in a dataset
is its sidecar's word; training, evaluation and generation follow it. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.data.indexed import read_sidecar


@dataclass(frozen=True)
class TextForm:
    """The ids around every text.

    Attributes:
        begin_ids: Ids before every text.
        end_ids: Ids behind every text.
    """

    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{verb} with {', '.join(map(str, ids))}"
                 for verb, ids in (("begin", self.begin_ids), ("end", self.end_ids)) if ids]
        return " and ".join(parts) or "have no ids around them"


def form_of_dataset(prefix: str) -> TextForm | None:
    """How the texts of a dataset begin and end; None where it has no sidecar.

    A sidecar that does not say it is of a version that put nothing there.

    Raises:
        ValueError: the sidecar is damaged.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return None
    return TextForm(tuple(sidecar.options.get("begin_ids", ())), tuple(sidecar.options.get("end_ids", ())))


def common_form(prefixes: Sequence[str]) -> TextForm | None:
    """How the texts of all these datasets begin and end; None where none of them says it.

    Raises:
        ValueError: two of them differ in it, or a sidecar is damaged.
    """
    found: dict[TextForm, str] = {}
    for prefix in prefixes:
        form = form_of_dataset(prefix)
        if form is not None:
            found.setdefault(form, prefix)
    if len(found) > 1:
        parts = "; ".join(f"those of {prefix} {form}" for form, prefix in found.items())
        raise ValueError(f"the texts of the datasets begin and end in different ways: {parts}; preprocess all with "
                         "--add-special-tokens or all with --no-add-special-tokens")
    return next(iter(found), None)
