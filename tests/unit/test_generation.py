"""Continuations against arg-max by hand; where two part; text that a terminal must not obey."""

import io
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from care.commands.console import verbatim
from care.errors import BadInput
from care.evaluation import Continuation, continue_prompt, continue_prompts, encode_prompt, same_tokens
from care.source import Source
from tiny import TinyModels

Item = TypeVar("Item")
TEMPLATE = "{{ bos_token }}{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %}"


def by_hand(source: Source, prompt: str, length: int) -> list[int]:
    """The likeliest token, again and again, without a cache."""
    tokens = source.tokens(prompt)[None]
    start = tokens.shape[1]
    for _ in range(length):
        with torch.inference_mode():
            tokens = torch.cat((tokens, source.logits(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, start:].tolist()


def beginning_with_bos(tokenizer: Any, template: str | None = None) -> Any:
    """A copy that puts <s> before every text, as many do."""
    copy = deepcopy(tokenizer)
    copy.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    copy.chat_template = template
    return copy


def test_a_continuation_is_greedy(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    prompt_BT = encode_prompt(source.tokenizer, "abc def")
    written = continue_prompt(source.model, source.tokenizer, prompt_BT, max_new_tokens=6)
    tokens = by_hand(source, "abc def", 6)
    assert written == Continuation(tuple(tokens), source.tokenizer.decode(tokens))


def test_the_token_that_ends_a_text_is_counted_and_not_shown(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    tokens = by_hand(source, "abc def", 8)
    end = tokens[3]
    tokens = tokens[: tokens.index(end) + 1]
    model, tokenizer = deepcopy(source.model), deepcopy(source.tokenizer)
    model.generation_config.eos_token_id = end
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    written = continue_prompt(model, tokenizer, encode_prompt(tokenizer, "abc def"), max_new_tokens=8)
    assert written == Continuation(tuple(tokens), source.tokenizer.decode(tokens[:-1]))


def test_every_model_continues_every_prompt_step_by_step(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    seen: list[tuple[str, int]] = []

    def track(items: Iterable[Item], *, label: str, total: int) -> Iterator[Item]:
        for item in items:
            seen.append((label, total))
            yield item

    models = {"a": source.model, "b": tiny.source("llama-mha").model}
    prompts = [encode_prompt(source.tokenizer, prompt) for prompt in ("abc", "de")]
    written = continue_prompts(models, source.tokenizer, prompts, max_new_tokens=3, track=track)
    assert [list(by_name) for by_name in written] == [["a", "b"]] * 2
    for prompt, by_name in zip(("abc", "de"), written, strict=True):
        assert list(by_name["a"].tokens) == by_hand(source, prompt, 3)
        assert list(by_name["b"].tokens) == by_hand(tiny.source("llama-mha"), prompt, 3)
    assert seen == [("writing", 4)] * 4


def test_a_template_writes_its_own_special_tokens(tiny: TinyModels) -> None:
    plain = tiny.source("llama-gqa").tokenizer
    tokenizer = beginning_with_bos(plain, TEMPLATE)
    ids = {chat: encode_prompt(tokenizer, "hi", chat=chat).tolist() for chat in (False, True)}
    assert ids == {False: [[256, *plain("hi")["input_ids"]]], True: [[256, *plain("(user: hi)")["input_ids"]]]}
    without = beginning_with_bos(plain)
    assert encode_prompt(without, "hi", chat=True).tolist() == ids[False]


def test_a_prompt_without_tokens_is_refused(tiny: TinyModels) -> None:
    with pytest.raises(BadInput, match="the prompt has no tokens"):
        encode_prompt(tiny.source("llama-gqa").tokenizer, "")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((), (), 0), ((1, 2), (), 0), ((1, 2), (3, 2), 0), ((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 4), 2),
        ((1, 2, 4), (1, 2), 2), ((1, 2), (1, 2), 2), ((1, 2, 3, 4), (1, 5, 3, 4), 1),
    ],
)  # fmt: skip
def test_tokens_that_two_texts_begin_with(first: tuple[int, ...], second: tuple[int, ...], expected: int) -> None:
    assert same_tokens(first, second) == expected


def test_text_is_shown_and_not_obeyed() -> None:
    shown = io.StringIO()
    Console(file=shown, width=80, force_terminal=True, color_system=None).print(
        verbatim("[bold]a[/bold] [/] :smile:\n\tb\x1b[2J\x9bc\r\n")
    )
    assert (
        shown.getvalue()
        == "[bold]a[/bold] [/] :smile:\n        b\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}c\n\n"
    )
