"""Needle in a haystack: where the fact lies, and answers against forward passes without a cache."""

import math
import random
import re
from collections.abc import Callable
from itertools import accumulate
from statistics import stdev
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor

from care.errors import BadInput, InvalidRecipe
from care.evaluation.haystack import Question, ask, cut, draw_fact, with_fact
from care.evaluation.needle import SLACK, Answer, Mean, cells, difference, find_needles, overall
from care.modeling.loading import Location, load_tokenizer
from care.report.heat import HeatMap, draw_heat
from care.report.pictures import new_figure
from tiny import Case, TinyModels
from tolerances import assert_close, assert_numbers

SENTENCES = [f"Sentence {n} is {'very ' * (n % 5)}plain." for n in range(80)]
TEXT = " ".join(SENTENCES)
DEPTHS = (0.0, 0.5, 1.0)
TEMPLATE = "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"

VOCABULARY = 128


class Characters:
    """A tokenizer with one token a character; the special one is "~"."""

    chat_template: str | None = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in "~" * add_special_tokens + text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class Writer:
    """A model that expects one character next, which a function of the text so far names; its cache is that text."""

    def __init__(self, expects: Callable[[str], str], strength: float = 30.0) -> None:
        self.expects, self.strength, self.device = expects, strength, torch.device("cpu")
        self.most_held = 0

    def __call__(
        self, input_ids: Tensor, *, use_cache: bool, logits_to_keep: int = 0, cache: list[int] | None = None
    ) -> Any:
        assert use_cache
        held, new = [] if cache is None else cache, input_ids[0].tolist()
        held.extend(new)
        kept = logits_to_keep or len(new)
        self.most_held = max(self.most_held, kept)
        rows = [self._logits(held[: len(held) - back]) for back in reversed(range(kept))]
        return _Output(cache=held, logits=torch.stack(rows)[None])

    def _logits(self, held: list[int]) -> Tensor:
        logits_V = torch.zeros(VOCABULARY)
        logits_V[ord(self.expects("".join(map(chr, held))))] = self.strength
        return logits_V


def seeing_last(count: int) -> Callable[[str], str]:
    """Writes the number of a needle among the last `count` characters, else letters."""

    def expects(text: str) -> str:
        seen, _, said = text.rpartition("provided text is")
        needle = re.search(r"is: (\d+)\.", seen[-count:])
        return f" {needle.group(1) if needle else 'unknown'}. And so"[len(said)]

    return expects


def writing(answer: str) -> Callable[[str], str]:
    """Writes one thing behind "So it is"."""
    return lambda text: answer[len(text.rpartition("So it is")[2])]


class _Output(dict[str, Any]):
    """Found by key and by attribute, as transformers' outputs are."""

    __getattr__ = dict.__getitem__


def text_of(question: Question) -> str:
    """A prompt that was made with Characters."""
    return Characters().decode(list(question.prompt))


def test_sentences_give_the_text_back() -> None:
    """And a text without ends of sentences is cut at spaces."""
    for text in (TEXT, "no end " * 200, 'He said "why?" and left.\n\nA head\n\nThe rest'):
        haystack = cut(text, Characters())
        assert "".join(haystack.sentences) == text
        assert haystack.sizes == tuple(map(len, haystack.sentences))
        assert max(haystack.sizes) <= 400
    assert cut(TEXT, Characters()).sentences == (*(f"{s} " for s in SENTENCES[:-1]), SENTENCES[-1])


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_the_fact_lies_at_its_depth(depth: float) -> None:
    """At the end of the sentence next to it, by a search over all ends."""
    fact = draw_fact(random.Random(1))
    haystack = cut(TEXT, Characters())
    body = with_fact(haystack.sentences, haystack.sizes, depth, fact)
    before, found, after = body.partition(fact.sentence)
    assert found
    assert (before + after.lstrip()).replace("  ", " ").strip() == TEXT
    ends = [0, *accumulate(haystack.sizes)]
    assert abs(len(before) - depth * len(TEXT)) <= min(abs(end - depth * len(TEXT)) for end in ends) + 1


def test_prompts_fill_their_length_and_differ_in_depth_alone() -> None:
    questions = ask(Characters(), cut(TEXT, Characters()), [600, 1200], DEPTHS, 3, seed=7)
    assert questions == ask(Characters(), cut(TEXT, Characters()), [600, 1200], DEPTHS, 3, seed=7)
    assert questions != ask(Characters(), cut(TEXT, Characters()), [600, 1200], DEPTHS, 3, seed=8)
    assert [(q.length, q.trial, q.depth) for q in questions] == [
        (n, t, d) for n in (600, 1200) for t in range(3) for d in DEPTHS
    ]
    longest = max(map(len, SENTENCES)) + 2
    haystacks = dict[tuple[int, int], set[tuple[str, str]]]()
    for q in questions:
        whole = len(q.prompt) + len(q.answers[0])
        assert q.length - longest < whole <= q.length
        text = text_of(q)
        assert text.startswith("~")
        (needle,) = re.findall(rf"One of the special magic numbers for \w+ is: {q.answer}\. ?", text + " ")
        body = text.partition("\n\n")[0].removeprefix("~")
        assert body.replace(needle.strip(), "").replace("  ", " ").strip() in TEXT
        assert body.startswith(needle.strip()) == (q.depth == 0)
        assert body.endswith(needle.strip()) == (q.depth == 1)
        haystacks.setdefault((q.length, q.trial), set()).add((body.replace(needle.strip(), "").strip(), q.answer))
    rests = {key: {(rest.replace("  ", " "), answer) for rest, answer in found} for key, found in haystacks.items()}
    assert all(len(found) == 1 for found in rests.values())
    assert len({q.answer for q in questions}) == 6


class Swelling(Characters):
    """A tokenizer that has more tokens for a text than for its sentences."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return super().__call__("+" * (len(text) // 50) + text, add_special_tokens=add_special_tokens)


def test_prompts_fit_whatever_the_tokenizer_makes_of_them() -> None:
    for q in ask(Swelling(), cut(TEXT, Swelling()), [800, 1600], DEPTHS, 3, seed=7):
        assert q.length - 2 * max(map(len, SENTENCES)) < len(q.prompt) + len(q.answers[0]) <= q.length


def test_answers_are_numbers_of_one_form() -> None:
    (question,) = ask(Characters(), cut(TEXT, Characters()), [900], [0.5], 1, seed=3)
    numbers = ["".join(map(chr, tokens)) for tokens in question.answers]
    assert numbers[0] == f" {question.answer}"
    assert len(set(numbers)) == 10
    assert all(re.fullmatch(r" [1-9]\d{6}", number) for number in numbers)
    assert text_of(question).endswith(" mentioned in the provided text is")


def test_a_chat_template_is_used_with_its_own_special_tokens(tiny: TinyModels) -> None:
    """Its BOS is not doubled, and the answer is begun in the model's turn."""
    tokenizer = load_tokenizer(Location(tiny.directory("llama-gqa")))
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (question,) = ask(tokenizer, cut(TEXT, tokenizer), [700], [0.0], 1, seed=3)
    said = tokenizer.decode(question.prompt)
    assert re.fullmatch(
        r"<s>\[user\]One of .*What is the special magic number for (\w+) mentioned in the provided text\?"
        r"\[assistant\]The special magic number for \1 mentioned in the provided text is",
        said, re.DOTALL,
    )  # fmt: skip


def test_what_cannot_be_asked_is_refused() -> None:
    haystack = cut(TEXT, Characters())
    with pytest.raises(InvalidRecipe, match=r"--depths 1\.5 is not a share"):
        ask(Characters(), haystack, [600], [1.5], 1, seed=1)
    with pytest.raises(InvalidRecipe, match="--trials 0 asks nothing"):
        ask(Characters(), haystack, [600], [0.5], 0, seed=1)
    with pytest.raises(InvalidRecipe, match="--lengths 100: fact, question and answer alone are 2"):
        ask(Characters(), haystack, [100], [0.5], 1, seed=1)
    with pytest.raises(BadInput, match=f"the text has {len(TEXT)} tokens, --lengths 9000 needs 8"):
        ask(Characters(), haystack, [9000], [0.5], 1, seed=1)


def test_needles_are_found_where_a_model_sees_them() -> None:
    """Everywhere, at the end alone, and never by a model that finds all numbers alike."""
    questions = ask(Characters(), cut(TEXT, Characters()), [700, 1000], DEPTHS, 2, seed=5)
    models = {"all": Writer(seeing_last(2000)), "end": Writer(seeing_last(250)), "flat": Writer(seeing_last(2000), 0.0)}
    found = find_needles(models, Characters(), questions)
    assert all([a.question for a in answers] == questions for answers in found.values())
    shares = {
        name: [(c.length, c.depth, c.exact.value, c.choice.value) for c in cells(answers)]
        for name, answers in found.items()
    }
    places = [(length, depth) for length in (700, 1000) for depth in DEPTHS]
    assert shares["all"] == [(*place, 1.0, 1.0) for place in places]
    assert shares["end"] == [(*place, float(place[1] == 1), float(place[1] == 1)) for place in places]
    assert shares["flat"] == [(*place, 0.0, 0.0) for place in places]
    assert_numbers([a.nats for a in found["flat"]], [8 * math.log(VOCABULARY)] * 12, "fp32 nats")
    assert models["all"].most_held == 7  # a space and seven digits, of which the last is not read


@pytest.mark.parametrize(
    ("written", "exact", "choice"),
    [
        (" 1234567. So, and more", True, True),
        (": 1234567\n and more", True, False),
        (" 12345678 and more", False, True),
        (" 7654321. So, and more", False, False),
    ],
)
def test_what_counts_as_found(written: str, exact: bool, choice: bool) -> None:
    """The first number that is written, whole; a wrong one that is likelier is a wrong choice."""
    answers = tuple(tuple(map(ord, f" {number}")) for number in ("1234567", "7654321", "1111111"))
    question = Question(99, 0.0, 0, "1234567", tuple(map(ord, "So it is")), answers)
    (found,) = find_needles({"m": Writer(writing(written))}, Characters(), [question])["m"]
    assert (found.exact, found.choice) == (exact, choice)
    assert written.startswith(found.written)
    if written.startswith(" 1234567"):
        assert found.nats < 1e-6


@pytest.mark.parametrize(
    "case",
    [
        None,
        Case("llama-gqa", "best", 0.5, "absorbed", "native"),
        Case("llama-gqa", "palu", 0.5, "rebuild", "native"),
        Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"),
        Case("gemma3-local", "best", 0.5, "absorbed", "native"),
    ],
    ids=str,
)
def test_scores_are_those_of_whole_forward_passes(tiny: TinyModels, case: Case | None) -> None:
    """Of the source, and of every kind of converted model: each answer in one pass without a cache."""
    model = tiny.source_model("llama-gqa") if case is None else tiny.model(case)
    tokenizer = load_tokenizer(Location(tiny.directory("llama-gqa")))
    questions = ask(tokenizer, cut(TEXT, tokenizer), [250], [0.0, 1.0], 2, seed=11)
    for answer in find_needles({"m": model}, tokenizer, questions)["m"]:
        prompt, logp = list(answer.question.prompt), list[float]()
        for tokens in answer.question.answers:
            whole = torch.tensor([[*prompt, *tokens]])
            with torch.inference_mode():
                said = model(input_ids=whole, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            logp.append(float(said.gather(1, whole[0, 1:, None])[-len(tokens) :].sum()))
        assert_close(torch.tensor(answer.nats), torch.tensor(-logp[0]), "fp32 answers")
        assert answer.choice == (max(logp) == logp[0])
        start, steps = len(prompt), max(map(len, answer.question.answers)) + SLACK
        for _ in range(steps):
            with torch.inference_mode():
                prompt.append(int(model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].argmax()))
        assert answer.written == tokenizer.decode(prompt[start:])


def test_damaged_models_are_named() -> None:
    questions = ask(Characters(), cut(TEXT, Characters()), [700], [0.5], 1, seed=5)
    with pytest.raises(BadInput, match="model broken gives NaN or infinite logits"):
        find_needles({"broken": Writer(seeing_last(9), float("nan"))}, Characters(), questions)


def answer(length: int, depth: float, trial: int, value: float) -> Answer:
    """An answer with `value` as its nats."""
    return Answer(Question(length, depth, trial, "1", (1,) * length, ((1,),)), value > 0, value > 1, value, "")


def test_means_and_errors() -> None:
    """By cell over trials; over everything by trial, as trials share their haystack between depths."""
    values = {(8, 0.0): (0.0, 2.0, 4.0), (8, 1.0): (1.0, 1.0, 0.0), (16, 0.0): (2.0, 5.0, 2.0)}
    answers = [answer(*place, n, v) for place, vs in values.items() for n, v in enumerate(vs)]
    first, second, third = cells(answers)
    assert (first.length, first.depth, first.trials, first.tokens) == (8, 0.0, 3, 8.0)
    assert_numbers([first.nats.value, second.nats.value, third.nats.value], [2.0, 2 / 3, 3.0], "fp64")
    assert_numbers([first.exact.value, first.choice.value, second.choice.value], [2 / 3, 2 / 3, 0.0], "fp64")
    assert first.exact.error is not None
    assert_numbers(first.exact.error, (2 / 3 * 1 / 3 / 2) ** 0.5, "fp64")
    trials = [0.5, 1.5, 2.0, 2.0, 5.0, 2.0]
    whole = overall(answers, lambda a: a.nats)
    assert whole.error is not None
    assert_numbers([whole.value, whole.error], [sum(trials) / 6, stdev(trials) / 6**0.5], "fp64")
    shifted = [answer(a.question.length, a.question.depth, a.question.trial, a.nats + 1) for a in answers]
    assert difference(shifted, answers, lambda a: a.nats) == Mean(1.0, 0.0)
    assert overall(answers[:1], lambda a: a.nats) == Mean(0.0, None)


def test_a_heat_map_says_its_values() -> None:
    """In white on dark cells and in black on light ones, each where its row and column are."""
    pytest.importorskip("matplotlib")
    axes = new_figure(4, 3).subplots()
    heat = HeatMap(
        "m", ["0", "1"], ["512", "1,024", "2,048"], [[0, 0.4, 1], [0.6, 0.2, 0.9]], [["a", "b", "c"], ["d", "e", "f"]]
    )
    draw_heat(axes, heat, row_label="depth", column_label="tokens")
    said = {(*map(int, t.get_position()), t.get_text(), t.get_color()) for t in axes.texts}
    assert said == {
        (0, 0, "a", "black"), (1, 0, "b", "black"), (2, 0, "c", "white"),
        (0, 1, "d", "white"), (1, 1, "e", "black"), (2, 1, "f", "white"),
    }  # fmt: skip
    assert [t.get_text() for t in axes.get_xticklabels()] == ["512", "1,024", "2,048"]
    assert axes.get_images()[0].cmap.name == "Greys"
