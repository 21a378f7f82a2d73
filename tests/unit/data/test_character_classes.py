"""Patterns as atoms over classes of characters, and classes against Unicode's."""

import unicodedata

import pytest

from dsv3_megatron.data.character_classes import classify, find_atoms
from dsv3_megatron.data.tokenizer import PRE_TOKENIZER_PATTERNS


def test_atoms():
    assert find_atoms(r"(?i:'s|[a-z\]]+)|\p{N}{1,3}|(?!\S)\x{20}?") == [
        "'", "(?i:')", "s", "(?i:s)", r"[a-z\]]", r"(?i:[a-z\]])", r"\p{N}", r"\S", r"\x{20}",
    ]  # fmt: skip
    assert find_atoms(r"[\p{L}&&[^\p{Han}]]+[^x]") == [r"[\p{L}&&[^\p{Han}]]", "[^x]"]


@pytest.mark.parametrize("pattern", [r"\bword", "^a", "a$", r"(a)\1", "(?<name>a)", "[a", r"\Z"])
def test_what_looks_at_more_than_a_character_is_refused(pattern):
    with pytest.raises(ValueError, match="its split pattern has "):
        find_atoms(pattern)


@pytest.fixture(scope="module")
def classes():
    return classify(PRE_TOKENIZER_PATTERNS)


def test_classes_are_those_of_unicode(classes):
    """Against Python's own tables, for what its release of Unicode knows."""
    kinds = {}
    for code_point in range(0x110000):
        character = chr(code_point)
        category = unicodedata.category(character)
        if category in ("Cn", "Cs"):
            continue
        is_cjk = 0x4E00 <= code_point <= 0x9FA5 or 0x3040 <= code_point <= 0x30FF
        is_space = category[0] == "Z" or character in "\t\n\v\f\r\x85"
        punctuation = character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
        latin = character.isascii() and character.isalpha()
        kind = "C" if category[0] in "CZ" else category[0].replace("S", "P")
        key = (kind, is_cjk, is_space, punctuation, latin, character in "\r\n", character == " ")
        kinds.setdefault(key, set()).add(int(classes[code_point]))
    assert all(len(found) == 1 for found in kinds.values())
    assert len(set.union(*kinds.values())) == len(kinds)
