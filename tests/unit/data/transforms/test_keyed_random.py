"""Numbers drawn for a document depend on its text, the seed and the purpose, and on nothing else."""

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.transforms.keyed_random import NUMBER_RANGE, DocumentRandom, check_probability, threshold_of


@given(st.text(), st.integers(0, 20), st.integers(0, 20))
def test_a_document_has_one_sequence_of_numbers(text, first, second):
    random = DocumentRandom(7, "purpose")
    shorter, longer = sorted((random.draw(text, first), random.draw(text.encode(), second)), key=len)
    assert longer[: len(shorter)] == shorter
    assert all(0 <= number < NUMBER_RANGE for number in longer)


def test_seed_purpose_and_text_each_make_a_difference():
    drawn = [DocumentRandom(seed, purpose).draw(text, 4)
             for seed in (0, 1) for purpose in ("a", "b") for text in ("", "x", "y")]
    assert len({number for numbers in drawn for number in numbers}) == 4 * len(drawn)
    assert DocumentRandom(1, "a").draw("x", 4) == pickle.loads(pickle.dumps(DocumentRandom(1, "a"))).draw("x", 4)


def test_the_numbers_are_these_on_every_machine():
    assert DocumentRandom(1234, "fim").draw("a text", 2) == [15123866897275760173, 2959458385963025482]


def test_numbers_are_uniform():
    numbers = [DocumentRandom(3, "p").draw(str(i), 1)[0] for i in range(4096)]
    counts = [0] * 16
    for number in numbers:
        counts[number * 16 // NUMBER_RANGE] += 1
    assert sum((count - 256) ** 2 / 256 for count in counts) < 37.7  # chi-square, 15 degrees: p = 0.001


def test_thresholds():
    assert (threshold_of(0), threshold_of(0.5), threshold_of(1)) == (0, NUMBER_RANGE // 2, NUMBER_RANGE)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), True, "0.1"])
def test_what_is_no_probability(value):
    with pytest.raises(ValueError, match=r"^fim_rate=.* must be a probability, between 0 and 1; try 0\.1$"):
        check_probability("fim_rate", value)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match=r"^seed=.* must be an integer between 0 and 2\*\*64 - 1; try 1234$"):
        DocumentRandom(seed, "p")


def test_workers_import_the_transforms_without_heavy_packages():
    code = (
        "import sys\n"
        "from dsv3_megatron.data.transforms import combined_tokens, fim, sentences\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'nltk', 'tokenizers', 'regex'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
