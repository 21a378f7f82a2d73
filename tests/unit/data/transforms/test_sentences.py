"""Sentences by Punkt: as Megatron-LM has them, whole documents with keep_newlines, and where the model comes from."""

import os
import pickle
import shutil
import time
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.transforms import sentences
from dsv3_megatron.data.transforms.sentences import (
    PunktModel,
    SentenceSplitter,
    load_installed_model,
    make_splitter,
    train_model,
)

PROSE = (
    "Dr. Smith went to Washington. He met Mr. Jones there! Was it e.g. for work? Nobody knows.\n\n"
    'She said "Stop." Then she left. The prices rose by 3.5 percent in Jan. 2020.  They fell later. '
    "Dr. Brown agreed with Dr. Smith. Mr. Jones did not. "
)
MODEL = PunktModel(frozenset({"dr", "mr", "e.g", "jan"}), frozenset(), frozenset(), {}, "test")


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """A folder that is all NLTK looks at; starts empty."""
    import nltk.data

    os.chmod(tmp_path, 0o755)
    monkeypatch.setattr(nltk.data, "path", [os.fspath(tmp_path)])
    return tmp_path


def parameters(model):
    from nltk.tokenize.punkt import PunktParameters

    made = PunktParameters()
    made.abbrev_types, made.sent_starters = set(model.abbreviations), set(model.sentence_starters)
    made.collocations = set(model.collocations)
    made.ortho_context.update(model.orthographic_contexts)
    return made


def install_tab(folder, language="english"):
    target = folder / "tokenizers" / "punkt_tab" / language
    target.mkdir(parents=True)
    (target / "abbrev_types.txt").write_text("dr\nmr\ne.g\njan")
    (target / "sent_starters.txt").write_text("nobody")
    (target / "collocations.tab").write_text("")
    (target / "ortho_context.tab").write_text("smith\t8\n")
    return target


def install_pickle(folder, content, name="english"):
    target = folder / "tokenizers" / "punkt" / "PY3"
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.pickle").write_bytes(content)


def test_sentences_are_nltks():
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    split = SentenceSplitter(MODEL).split(PROSE)
    assert split == PunktSentenceTokenizer(parameters(MODEL)).tokenize(PROSE)
    assert split[:3] == ["Dr. Smith went to Washington.", "He met Mr. Jones there!", "Was it e.g. for work?"]
    assert SentenceSplitter(MODEL).split("") == SentenceSplitter(MODEL).split(" \n") == []


def test_white_space_stays_with_the_sentence_before_it():
    text = 'He said "Go." \n  Then left.\n\nWell (so it was.)  It ended. \n'
    split = SentenceSplitter(MODEL, keep_newlines=True).split(text)
    assert split == ['He said "Go." \n  ', "Then left.\n\n", "Well (so it was.)  ", "It ended. \n"]
    assert [sentence.rstrip() for sentence in split] == SentenceSplitter(MODEL).split(text)
    assert SentenceSplitter(MODEL, keep_newlines=True).split(" \n") == [" \n"]


endings = [". ", '." ', "?)\n", "!! ", "Dr. ", " A", "\r\n", "…"]
pieces = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(endings)))


@given(pieces.map("".join))
def test_sentences_joined_are_the_document(text):
    split = SentenceSplitter(MODEL, keep_newlines=True).split(text)
    assert "".join(split) == text
    assert "" not in split


def test_long_documents_are_split_in_runs(monkeypatch):
    monkeypatch.setattr(sentences, "MAX_RUN_CHARACTERS", 50)
    plain, keeping = SentenceSplitter(MODEL), SentenceSplitter(MODEL, keep_newlines=True)
    expected = [s for start in range(0, len(PROSE), 50) for s in plain.split(PROSE[start : start + 50])]
    assert plain.split(PROSE) == expected
    assert "".join(keeping.split(PROSE)) == PROSE


def test_a_splitter_travels_and_does_not_grow():
    splitter = SentenceSplitter(MODEL)
    before = splitter.split(PROSE)
    sent = pickle.loads(pickle.dumps(splitter))
    assert sent.split(PROSE) == before and sent.description == splitter.description
    assert len(splitter._tokenizer._params.ortho_context) == 0


def test_a_model_is_learned_where_none_is_installed(nltk_data):
    def endless():
        for number in range(1000):
            yield PROSE * 3 + f"Sentence {number} ends. "
        raise AssertionError("read past the bound")

    splitter = make_splitter(endless(), max_sample_characters=20_000)
    assert "learned from the corpus" in splitter.description and "20000 characters" in splitter.description
    assert {"dr", "mr"} <= splitter.model.abbreviations
    assert {"He met Mr. Jones there!", "Mr. Jones did not."} <= set(splitter.split(PROSE))
    assert train_model(endless(), max_characters=20_000).description == splitter.description
    assert train_model(islice(endless(), 2)).description != splitter.description


def test_installed_tab_data_is_used(nltk_data):
    install_tab(nltk_data)
    splitter = make_splitter(iter(lambda: pytest.fail("the sample was read"), None))
    assert splitter.description.startswith("installed Punkt model english (punkt_tab), model ")
    assert splitter.model.abbreviations == MODEL.abbreviations
    assert splitter.model.orthographic_contexts == {"smith": 8}
    assert load_installed_model("german") is None


def test_installed_tab_data_in_its_archive_is_used(nltk_data, tmp_path_factory):
    source = tmp_path_factory.mktemp("unpacked")
    install_tab(source)
    (nltk_data / "tokenizers").mkdir()
    shutil.make_archive(os.fspath(nltk_data / "tokenizers" / "punkt_tab"), "zip", source / "tokenizers", "punkt_tab")
    assert load_installed_model().abbreviations == MODEL.abbreviations


@pytest.mark.parametrize("is_parameters", [False, True])
def test_installed_pickles_are_used(nltk_data, is_parameters):
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    made = parameters(MODEL)
    install_pickle(nltk_data, pickle.dumps(made if is_parameters else PunktSentenceTokenizer(made)))
    model = load_installed_model()
    assert model.description.startswith("installed Punkt model english (punkt), model ")
    assert (model.abbreviations, model.orthographic_contexts) == (MODEL.abbreviations, {})


def test_damaged_data_is_said(nltk_data):
    (install_tab(nltk_data) / "abbrev_types.txt").unlink()
    with pytest.raises(ValueError, match=r"the installed Punkt data for lang=english cannot be used \(LookupError.*"
                                         r"repair it, or remove it"):
        load_installed_model()
    install_pickle(nltk_data, pickle.dumps(os.system), "german")
    with pytest.raises(ValueError, match=r"it names .*system, which no Punkt model has"):
        load_installed_model("german")


def test_errors():
    for language in ("../english", "", "a/b"):
        with pytest.raises(ValueError, match=r"lang=.* must be the name of a Punkt model: letters, digits, - and _"):
            load_installed_model(language)
    with pytest.raises(ValueError, match=r"no text to learn a Punkt model from: the sample is empty"):
        train_model(["", " \n"])
    with pytest.raises(ValueError, match=r"max_characters=0 must be at least 1; try 2000000"):
        train_model(["a"], max_characters=0)


@pytest.mark.parametrize("unit", ["a", ".", "a.", '."', "?'", "'", ". ", "-.", "\u3000.", "!"])
def test_time_grows_with_the_length_and_not_its_square(unit):
    splitter = SentenceSplitter(MODEL, keep_newlines=True)
    splitter.split(PROSE)
    seconds = []
    for length in (4_000, 32_000):
        start = time.process_time()
        assert "".join(splitter.split(unit * (length // len(unit)))) == unit * (length // len(unit))
        seconds.append(time.process_time() - start)
    assert seconds[1] < 24 * seconds[0] + 0.1  # 8 times the text: linear is 8, the square 64


def test_no_bound_on_seconds_makes_a_result_depend_on_load(monkeypatch):
    import nltk

    redos = pytest.importorskip("nltk.redos", reason="this NLTK has no time limit")
    text = "A sentence of words. " * 10_000
    expected = SentenceSplitter(MODEL).split(text)
    monkeypatch.setattr(redos, "DEFAULT_TIMEOUT", 0.1)
    assert SentenceSplitter(MODEL).split(text) == expected
    with pytest.raises(TimeoutError):  # NLTK's own, on the same text
        nltk.tokenize.punkt.PunktSentenceTokenizer(parameters(MODEL)).tokenize(text)
