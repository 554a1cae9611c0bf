"""The story grammar: the same everywhere, consistent within a story, short, varied."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from onelaunch.checkpoints.tokenizers import load_tokenizer
from onelaunch.training import stories
from onelaunch.training.stories import story
from onelaunch.training.story_data import STORIES_TOKENIZER_SHA256, stories_tokenizer

N = 3000
GIRLS = {name for name, kind, *_ in stories._CHILDREN if kind == "girl"}
BOYS = {name for name, kind, *_ in stories._CHILDREN if kind == "boy"}
ANIMALS = {animal for plot in stories._PLOTS for animal, _ in plot.pairs}
THINGS = {thing for plot in stories._PLOTS for thing in plot.things}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [story(7, index) for index in range(N)]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def test_a_story_is_the_same_everywhere():
    # Written down once: a change here needs a new GRAMMAR_VERSION and a new tokenizer.
    assert stories.GRAMMAR_VERSION == 1
    assert story(0, 0) == FIRST
    assert story(2**63, 123_456_789) == FAR
    assert story(-1, 5) == story(2**64 - 1, 5)


FIRST = ""
FAR = ""


@pytest.mark.parametrize("group", [GIRLS | BOYS, ANIMALS, THINGS, set(stories._COLOURS)])
def test_a_story_has_one_of_each_and_repeats_it(texts, group):
    for text in texts:
        found = [word for word in words(text) if word in group]
        assert len(set(found)) == 1, text
        assert len(found) > 1, text


def test_pronouns_match_the_child(texts):
    for text in texts:
        said = {word.lower() for word in words(text)}
        girl = bool(said & {name.lower() for name in GIRLS})
        assert bool(said & {"girl", "she", "her"}) == girl, text
        assert bool(said & {"boy", "he", "his", "him"}) != girl, text


def test_animals_are_where_they_belong(texts):
    for text in texts:
        spots = {animal: spot for plot in stories._PLOTS for animal, spot in plot.pairs}
        if "mom of the" in text:
            animal = next(word for word in words(text) if word in ANIMALS)
            home = {spot for pair, spot in stories._HOME.pairs if pair == animal}
            assert home & set(words(text)), text
        assert spots


def test_articles_and_punctuation_are_right(texts):
    for text in texts:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", text), text
        assert not re.search(r"[{}]|  |\n", text), text
        assert text.count('"') % 2 == 0
        assert text[-1] == "."
        assert text.isascii()
        for sentence in re.findall(r"[^.!?]+[.!?]", text.replace('"', "")):
            assert sentence.strip()[0].isupper(), text


def test_stories_fit_a_context_of_128_with_their_bos(texts):
    tokenizer = stories_tokenizer()
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert min(lengths) >= 60
    assert max(lengths) <= 116


def test_there_are_many_stories_from_few_words(texts):
    assert len(set(texts)) > 0.995 * N
    vocabulary = Counter(word for text in texts for word in words(text))
    assert 100 < len(vocabulary) < 300
    assert min(vocabulary.values()) > N // 100  # each word is met often
    assert len({story(seed, 0) for seed in range(200)}) > 190


def test_every_plot_and_alternative_is_used(texts):
    joined = " ".join(texts)
    assert len({text.split(". ")[-1] for text in texts}) >= 8
    for plot in stories._PLOTS:
        for step in plot.steps:
            for alternative in step:
                shape = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(alternative))
                assert re.search(shape, joined), alternative


def test_the_shipped_tokenizer_is_the_one_we_know(texts, tmp_path):
    tokenizer = stories_tokenizer()
    assert tokenizer.vocab_size == 512
    assert tokenizer.fingerprint == STORIES_TOKENIZER_SHA256
    path = tokenizer.save(tmp_path)
    assert load_tokenizer(path).fingerprint == STORIES_TOKENIZER_SHA256
    for text in texts[:500]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert max(ids) < 512
        assert tokenizer.decode(ids) == text


def test_names_animals_and_colours_are_single_pieces():
    tokenizer = stories_tokenizer()
    for word in [*GIRLS, *BOYS, *stories._COLOURS]:
        assert len(tokenizer.encode(word, bos=False)) == 1, word


def test_the_tokenizer_is_what_its_tool_makes(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "tools" / "train_stories_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_stories_tokenizer", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shipped = tool.TARGET.read_bytes()
    monkeypatch.setattr(tool, "TARGET", tmp_path / "tokenizer.bin")
    tool.main()
    # sentencepiece may break ties another way in another version; the sizes must not move
    made = load_tokenizer(tmp_path / "tokenizer.bin")
    assert made.vocab_size == 512
    overlap = set(made.pieces) & set(load_tokenizer(tool.TARGET).pieces)
    assert len(overlap) > 480
    assert shipped
