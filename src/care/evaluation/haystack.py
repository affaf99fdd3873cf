"""A fact in a haystack: running text with one sentence put into it, and the question whose answer that sentence is.

The wording is that of RULER's single needle (arXiv 2404.06654): a word and a number drawn at random, and an answer that
is begun for the model, so that one prompt serves generation and log-probabilities, with a chat template or without.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ..errors import BadInput, InvalidRecipe

WORDS = (
    "anchor", "basket", "candle", "desert", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "marble", "needle", "orchid", "pepper", "quartz", "ribbon", "saddle", "temple", "umbrella", "velvet",
    "walnut", "yogurt", "zipper",
)  # fmt: skip
DIGITS = 7
"""Digits of an answer, as in RULER: no text has such numbers by the way."""

WRONG_ANSWERS = 9
"""Other numbers of as many digits that the right one is compared with: one in ten is chance."""

LONGEST = 400
"""Characters after which a text without an end of sentence is cut at a space."""

SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n")


@dataclass(frozen=True)
class Fact:
    """What is hidden: a word, its number, and other numbers of the same form."""

    word: str
    answer: str
    wrong: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The needle."""
        return f"One of the special magic numbers for {self.word} is: {self.answer}."

    @property
    def question(self) -> str:
        """What is asked behind the haystack."""
        return f"What is the special magic number for {self.word} mentioned in the provided text?"

    @property
    def opening(self) -> str:
        """How the answer begins."""
        return f"The special magic number for {self.word} mentioned in the provided text is"


@dataclass(frozen=True)
class Haystack:
    """A text in sentences, which give it back when joined, and the tokens of each."""

    sentences: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One prompt and its answers as tokens.

    `answers` are what follows the prompt, the right one first; all that they begin with alike is part of the prompt.
    """

    length: int
    depth: float
    trial: int
    answer: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def draw_fact(dice: random.Random) -> Fact:
    """A word, its number and the wrong numbers, no two alike."""
    word = dice.choice(WORDS)
    answer, *wrong = (str(n) for n in dice.sample(range(10 ** (DIGITS - 1), 10**DIGITS), 1 + WRONG_ANSWERS))
    return Fact(word, answer, tuple(wrong))


def cut(text: str, tokenizer: Any) -> Haystack:  # noqa: ANN401 - a transformers tokenizer
    """A text at the ends of its sentences."""
    sentences = [piece for sentence in _at_ends(text) for piece in _not_too_long(sentence)]
    return Haystack(tuple(sentences), tuple(len(_tokens(tokenizer, s, special=False)) for s in sentences))


def _at_ends(text: str) -> list[str]:
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(ends) if b > a]


def _not_too_long(sentence: str) -> list[str]:
    pieces = list[str]()
    while len(sentence) > LONGEST:
        place = sentence.rfind(" ", 0, LONGEST) + 1 or LONGEST
        pieces.append(sentence[:place])
        sentence = sentence[place:]
    return [*pieces, sentence] if sentence else pieces


def with_fact(sentences: Sequence[str], sizes: Sequence[int], depth: float, fact: Fact) -> str:
    """The sentences with the fact between those two where `depth` of all tokens lie nearest before it."""
    before = [0, *accumulate(sizes)]
    place = min(range(len(before)), key=lambda i: abs(before[i] - depth * before[-1]))
    head, tail = "".join(sentences[:place]), "".join(sentences[place:])
    space = "" if not head or head[-1].isspace() else " "
    return f"{head}{space}{fact.sentence} {tail}".strip()


def ask(
    tokenizer: Any,  # noqa: ANN401
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[Question]:
    """Questions for every length, trial and depth; a trial has the same fact and the same haystack at every depth.

    A prompt and its longest answer are at most `length` tokens, and less than a sentence shorter. Raises BadInput where
    the text is too short, InvalidRecipe where a length has no room for the question or a depth is none.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InvalidRecipe(f"--depths {depth:g} is not a share of the haystack; give numbers from 0 to 1")
    if trials < 1:
        raise InvalidRecipe(f"--trials {trials} asks nothing; give 1 or more")
    return [
        question
        for length in lengths
        for trial in range(trials)
        for question in _at_all_depths(tokenizer, haystack, length, depths, trial, seed)
    ]


def _at_all_depths(
    tokenizer: Any,  # noqa: ANN401
    haystack: Haystack,
    length: int,
    depths: Sequence[float],
    trial: int,
    seed: int,
) -> list[Question]:
    dice = random.Random(f"{seed} {length} {trial}")
    fact = draw_fact(dice)
    bare = _question(tokenizer, fact.sentence, fact, (length, 0.0, trial))
    room = length - _size(bare)
    if room <= 0:
        raise InvalidRecipe(f"--lengths {length}: fact, question and answer alone are {_size(bare)} tokens")
    first = _start(haystack, length, room, dice)
    ends = accumulate(haystack.sizes[first:])
    last = first + sum(1 for end in ends if end <= room)
    while True:
        # Sentences may have a few tokens more together than apart.
        sentences, sizes = haystack.sentences[first:last], haystack.sizes[first:last]
        asked = [
            _question(tokenizer, with_fact(sentences, sizes, d, fact), fact, (length, d, trial)) for d in depths
        ]  # fmt: skip
        if max(map(_size, asked)) <= length:
            return asked
        last -= 1


def _start(haystack: Haystack, length: int, room: int, dice: random.Random) -> int:
    """A sentence from which on the text fills the room."""
    left = list(accumulate(reversed(haystack.sizes)))
    enough = sum(1 for size in left if size >= room)
    if not enough:
        raise BadInput(
            f"the text has {sum(haystack.sizes)} tokens, --lengths {length} needs {room} of it; use a longer text"
        )
    return dice.randrange(enough)


def _question(tokenizer: Any, body: str, fact: Fact, place: tuple[int, float, int]) -> Question:  # noqa: ANN401
    text = f"{body}\n\n{fact.question}"
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + fact.opening
    else:
        text = f"{text} {fact.opening}"
    # A template writes its own special tokens.
    prompt = _tokens(tokenizer, text, special=not chat)
    wholes = [_tokens(tokenizer, f"{text} {number}", special=not chat) for number in (fact.answer, *fact.wrong)]
    shared = next(
        (i for i, tokens in enumerate(zip(prompt, *wholes, strict=False)) if len(set(tokens)) > 1), len(prompt)
    )
    answers = tuple(tuple(whole[shared:]) for whole in wholes)
    return Question(*place, fact.answer, tuple(prompt[:shared]), answers)


def _size(question: Question) -> int:
    return len(question.prompt) + max(map(len, question.answers))


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:  # noqa: ANN401
    return tokenizer(text, add_special_tokens=special)["input_ids"]
