"""Text from models, greedily: what a person compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent


@dataclass(frozen=True)
class Continuation:
    """What a model wrote: all its tokens, and their text without special ones such as the end of a text."""

    tokens: tuple[int, ...]
    text: str


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tensor:  # noqa: ANN401
    """A prompt's tokens, (1, T), through the chat template if `chat` and there is one; BadInput where it has none."""
    templated = has_template(tokenizer) and chat
    if templated:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template writes its own special tokens.
    tokens = tokenizer(prompt, add_special_tokens=not templated)["input_ids"]
    if not tokens:
        raise BadInput("the prompt has no tokens; give some text to continue")
    return torch.tensor([tokens])


def has_template(tokenizer: Any) -> bool:  # noqa: ANN401
    """Whether a tokenizer knows how its model was spoken to."""
    return bool(getattr(tokenizer, "chat_template", None))


def continue_prompt(model: Any, tokenizer: Any, prompt_BT: Tensor, *, max_new_tokens: int) -> Continuation:  # noqa: ANN401
    """The greedy continuation of one encoded prompt."""
    prompt_BT = prompt_BT.to(model.device)
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    tokens = output_BT[0, prompt_BT.shape[1] :].tolist()
    return Continuation(tuple(tokens), tokenizer.decode(tokens, skip_special_tokens=True))


def continue_prompts(
    models: Mapping[str, Any],
    tokenizer: Any,  # noqa: ANN401
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> list[dict[str, Continuation]]:
    """For each encoded prompt what each model, by name, makes of it; all models have the tokens of one tokenizer."""
    written: list[dict[str, Continuation]] = [{} for _ in prompts]
    steps = [(index, name) for index in range(len(prompts)) for name in models]
    for index, name in track(steps, label="writing", total=len(steps)):
        written[index][name] = continue_prompt(models[name], tokenizer, prompts[index], max_new_tokens=max_new_tokens)
    return written


def same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations have in common before they part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
