"""Built-in synthetic stories: a seeded grammar that generates endless children's stories.

A story has one child, one thing with one colour, and one animal, in a setting, a problem, help and
a moral. Each is chosen once and then repeated, so that a good model must keep track of the name,
the pronoun, the thing, its colour and the animal. All the text is our own. `story(seed, index)` is
pure integer arithmetic: the same on every Python version and machine.
"""

from __future__ import annotations

from typing import NamedTuple

from onelaunch.training.shuffle import mix64

STORIES_LABEL = "built-in synthetic stories"

# Part of the saved state of a sampler: raise it when the text of any story changes.
GRAMMAR_VERSION = 1

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15

# A child meets only some of the animals, a thing has only some of the colours: these correlations
# help a small model to learn early that names and colours are repeated.

# kind, He, he, his, him
_GIRL = ("girl", "She", "she", "her", "her")
_BOY = ("boy", "He", "he", "his", "him")
# name, the above, and the animals that the child meets
_CHILDREN = (
    ("Mia", _GIRL, ("cat", "duck", "bear", "dog")),
    ("Lily", _GIRL, ("bird", "fox", "frog", "dog")),
    ("Anna", _GIRL, ("cat", "frog", "bear", "fox")),
    ("Tom", _BOY, ("bird", "bear", "frog", "cat")),
    ("Ben", _BOY, ("duck", "fox", "dog", "bear")),
    ("Sam", _BOY, ("cat", "bird", "dog", "duck")),
)
_COLOURS = {
    "ball": ("red", "blue", "green"),
    "boat": ("red", "blue", "white"),
    "book": ("red", "green", "pink"),
    "bun": ("white", "pink"),
    "cake": ("white", "pink", "green"),
    "cap": ("blue", "green", "red"),
    "car": ("red", "green", "blue"),
    "coat": ("white", "blue", "green"),
    "hat": ("pink", "white", "red"),
    "kite": ("blue", "pink", "green"),
    "pear": ("green", "red"),
    "pie": ("red", "blue", "white"),
}
_TRAITS = ("big", "little", "kind", "small")


class _Plot(NamedTuple):
    """The things, animals and sentences of a plot; one alternative is drawn per step.

    `pairs` are (animal, spot): a duck swims, a bird flies.
    """

    things: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    steps: tuple[tuple[str, ...], ...]


_TOYS = ("ball", "boat", "kite", "hat", "car", "book")
_FOODS = ("cake", "pie", "bun", "pear")
_ANIMALS = ("dog", "cat", "bird", "duck", "fox", "bear", "frog")
_SPOTS = ("tree", "rock", "log", "box")
_PLACES = ("park", "farm", "hill", "lake")

_OPENING = (
    "Once there was a {kind} named {name}.",
    "There was a {kind} named {name}.",
)
_OWNS = ("{He} had a {colour} {thing}.", "{name} loved {his} {colour} {thing}.")
_SAD = ("{name} was very sad.", "{name} sat down and cried.")
_MEETS = ("{name} met a {trait} {animal}.", "A {trait} {animal} saw {name}.")
_THANKS = ('"Thank you!" said {name}.', "{name} gave the {animal} a big hug.")

_LOST = _Plot(
    things=_TOYS,
    pairs=tuple((animal, spot) for animal in _ANIMALS for spot in _SPOTS),
    steps=(
        _OPENING,
        _OWNS,
        (
            "One day, {name} took {his} {colour} {thing} to the {place}.",
            "One day, {name} went to the {place}.",
        ),
        (
            "But then {his} {colour} {thing} was gone!",
            "But then {name} lost {his} {colour} {thing}!",
        ),
        _SAD,
        _MEETS,
        (
            '"I can help you," said the {animal}.',
            '"Do not be sad," said the {animal}.',
        ),
        ("The {animal} looked under a {spot}.", "{name} and the {animal} looked under a {spot}."),
        ("There was {his} {colour} {thing}!", "The {animal} saw {his} {colour} {thing}!"),
        _THANKS,
        ("A good friend will help you.", "It is good to have a friend."),
    ),
)

_STUCK = _Plot(
    things=("ball", "kite", "hat", "boat"),
    pairs=(("bird", "tree"), ("cat", "tree"), ("duck", "lake"), ("frog", "lake")),
    steps=(
        _OPENING,
        _OWNS,
        (
            "One day, {name} lost {his} {colour} {thing} in a {spot}.",
            "One day, the wind took {his} {colour} {thing} to a {spot}.",
        ),
        ("{name} could not get it.", "{name} tried, but {he} could not get it."),
        _MEETS,
        (
            '"I want my {colour} {thing}," said {name}.',
            '"Can you help me?" said {name}.',
        ),
        ('"I can help you," said the {animal}.', "The {animal} went to the {spot}."),
        (
            "The {animal} got {his} {colour} {thing}.",
            "The {animal} gave {name} {his} {colour} {thing}.",
        ),
        _THANKS,
        ("It is good to ask for help.", "A good friend will help you."),
    ),
)

_SHARE = _Plot(
    things=_FOODS,
    pairs=tuple((animal, spot) for animal in _ANIMALS for spot in ("tree", "rock")),
    steps=(
        _OPENING,
        _OWNS,
        ("One day, {name} took {his} {colour} {thing} to the {place}.",),
        _MEETS,
        ('"Can I have some?" said the {animal}.', '"I have no food," said the {animal}.'),
        ('"No, it is my {colour} {thing}!" said {name}.', "{name} did not want to share."),
        ("The {animal} was very sad.", "The {animal} sat down and cried."),
        (
            "Then {name} gave the {animal} some of {his} {colour} {thing}.",
            "Then {name} and the {animal} ate {his} {colour} {thing}.",
        ),
        ("The {animal} was very happy.", '"Thank you!" said the {animal}.'),
        ("It is good to share.", "It is good to have a friend."),
    ),
)

_BROKEN = _Plot(
    things=("boat", "kite", "car", "book"),
    pairs=tuple((animal, spot) for animal in _ANIMALS for spot in ("rock", "tree", "box")),
    steps=(
        _OPENING,
        _OWNS,
        ("One day, {name} ran too fast and hit a {spot}.", "One day, {name} ran and fell."),
        ("Then {his} {colour} {thing} broke!", "Oh no, {his} {colour} {thing} broke!"),
        _SAD,
        _MEETS,
        (
            '"I can help you," said the {animal}.',
            '"I can fix it," said the {animal}.',
        ),
        (
            "{name} and the {animal} sat under a tree.",
            "The {animal} looked at {his} {colour} {thing}.",
        ),
        (
            "Then {his} {colour} {thing} was like new!",
            "Then {name} had {his} {colour} {thing} again!",
        ),
        _THANKS,
        ("Do not run too fast.", "It is good to ask for help."),
    ),
)

_HOME = _Plot(
    things=("hat", "coat", "cap"),
    pairs=(
        ("duck", "lake"),
        ("frog", "lake"),
        ("bird", "tree"),
        ("fox", "hill"),
        ("bear", "hill"),
        ("cat", "farm"),
        ("dog", "farm"),
    ),
    steps=(
        _OPENING,
        _OWNS,
        ("One day, {name} went to play in the rain.", "One day, {name} went for a walk."),
        ("{name} met a little {animal}.", "{name} saw a little {animal}."),
        ("The {animal} was lost and cold.", "The {animal} was cold and very sad."),
        ('"I want my mom," said the {animal}.', '"Can you help me?" said the {animal}.'),
        (
            "{name} gave the {animal} {his} {colour} {thing}.",
            "{name} put {his} {colour} {thing} on the {animal}.",
        ),
        ("Then they went to the {spot}.", "{name} and the {animal} went to the {spot}."),
        ("There was the mom of the {animal}!", "The mom of the {animal} was there!"),
        ("The {animal} was very happy.", '"Thank you!" said the {animal}.'),
        ("It is good to help.", "It is good to have a friend."),
    ),
)

_PLOTS = (_LOST, _STUCK, _SHARE, _BROKEN, _HOME)


def story(seed: int, index: int) -> str:
    """Generate story number `index` of the endless series of `seed`: one line of text.

    Series with different seeds are independent samples of the same grammar.
    """
    state = mix64(mix64(seed) + index)

    def below(n: int) -> int:
        nonlocal state
        state = (state + _GAMMA) & _MASK
        return ((mix64(state) >> 32) * n) >> 32

    plot = _PLOTS[below(len(_PLOTS))]
    name, (kind, subject, he, his, him), animals = _CHILDREN[below(len(_CHILDREN))]
    pairs = [pair for pair in plot.pairs if pair[0] in animals]
    animal, spot = pairs[below(len(pairs))]
    thing = plot.things[below(len(plot.things))]
    colours = _COLOURS[thing]
    slots = {
        "name": name,
        "kind": kind,
        "He": subject,
        "he": he,
        "his": his,
        "him": him,
        "animal": animal,
        "spot": spot,
        "thing": thing,
        "colour": colours[below(len(colours))],
        "trait": _TRAITS[below(len(_TRAITS))],
        "place": _PLACES[below(len(_PLACES))],
    }
    return " ".join(step[below(len(step))].format_map(slots) for step in plot.steps)
