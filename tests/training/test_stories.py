"""The story grammar: the same everywhere, consistent within a story, short, varied."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from onelaunch.checkpoints.tokenizers import load_tokenizer
from onelaunch.training import stories
from onelaunch.training.stories import story
from onelaunch.training.story_data import STORIES_TOKENIZER_SHA256, stories_tokenizer

N = 3000
GIRLS = {name for name, words, _ in stories._CHILDREN if words is stories._GIRL}
BOYS = {name for name, words, _ in stories._CHILDREN if words is stories._BOY}
COLOURS = {colour for colours in stories._COLOURS.values() for colour in colours}
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


FIRST = (
    "There was a girl named Anna. She had a blue cap. One day, Anna went for a walk. "
    "Anna met a little frog. The frog was cold and very sad. "
    '"Can you help me?" said the frog. Anna put her blue cap on the frog. '
    "Anna and the frog went to the lake. The mom of the frog was there! "
    "The frog was very happy. It is good to have a friend."
)
FAR = (
    "Once there was a boy named Ben. He had a pink kite. One day, Ben took his pink kite to the "
    "farm. But then Ben lost his pink kite! Ben was very sad. Ben met a small duck. "
    '"I can help you," said the duck. The duck looked under a tree. '
    "The duck saw his pink kite! Ben gave the duck a big hug. It is good to have a friend."
)


@pytest.mark.parametrize("group", [GIRLS | BOYS, ANIMALS, THINGS, COLOURS])
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


def test_animals_and_colours_are_where_they_belong(texts):
    met = {name: set(animals) for name, _, animals in stories._CHILDREN}
    homes: dict[str, set[str]] = {}
    for animal, spot in stories._HOME.pairs:
        homes.setdefault(animal, set()).add(spot)
    for text in texts:
        found = words(text)
        name = next(word for word in found if word in met)
        animal = next(word for word in found if word in ANIMALS)
        thing = next(word for word in found if word in THINGS)
        colour = next(word for word in found if word in COLOURS)
        assert animal in met[name], text
        assert colour in stories._COLOURS[thing], text
        if "mom of the" in text:
            assert homes[animal] & set(found), text


def test_every_child_can_be_in_every_plot():
    for _, _, animals in stories._CHILDREN:
        for plot in stories._PLOTS:
            assert {animal for animal, _ in plot.pairs} & set(animals)


def test_articles_and_punctuation_are_right(texts):
    for text in texts:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", text), text
        assert not re.search(r"[{}]|  |\n", text), text
        assert text.count('"') % 2 == 0
        assert text[-1] == "."
        assert text.isascii()
        for sentence in re.split(r"(?<=[.!?]) ", text):
            assert sentence.lstrip('"')[0].isupper(), text


def test_stories_fit_a_context_of_128_with_their_bos(texts):
    tokenizer = stories_tokenizer()
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert min(lengths) >= 60
    assert max(lengths) <= 112


def test_there_are_many_stories_from_few_words(texts):
    assert len(set(texts)) > 0.995 * N
    vocabulary = Counter(word for text in texts for word in words(text))
    assert 100 < len(vocabulary) < 300
    assert min(vocabulary.values()) > N // 100  # each word is met often
    assert len({story(seed, 0) for seed in range(200)}) > 190


def test_every_plot_and_alternative_is_used(texts):
    joined = " ".join(texts)
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
    for word in [*GIRLS, *BOYS, *COLOURS]:
        assert len(tokenizer.encode(word, bos=False)) == 1, word


def test_the_tokenizer_is_what_its_tool_makes(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    path = Path(__file__).parents[2] / "tools" / "train_stories_tokenizer.py"
    tool = runpy.run_path(str(path))
    # fewer stories than the tool takes, and sentencepiece may order equals in another way: the
    # pieces must be nearly the same, not the scores
    made = tool["train"](2000)
    shipped = stories_tokenizer()
    assert made.vocab_size == shipped.vocab_size
    assert len(set(made.pieces) & set(shipped.pieces)) > 480
    assert tool["TARGET"].read_bytes() == shipped.to_bytes()
