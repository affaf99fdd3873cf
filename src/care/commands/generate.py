"""care generate: text from any model, converted or not, and beside that of another one."""

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Table

from ..errors import BadInput
from ..evaluation import Continuation, continue_prompts, encode_prompt, has_template, same_tokens
from ..modeling.loading import load_tokenizer, locate
from .console import device_option, dtype_option, emit, json_option, rich_track, verbatim
from .models import load_models, refuse_other_tokenizers

TOKEN_BY_TOKEN = "what they write cannot be compared token by token; leave out --against"
"""What cannot be done with models that have other tokens, and the remedy."""


@click.command()
@click.argument("model")
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--against", metavar="SRC", help="Reference model: shows what it writes beside what MODEL writes.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest continuation."
)
@click.option("--chat", is_flag=True, help="Put every prompt through the model's chat template.")
@dtype_option
@device_option
@json_option
def command(
    model: str,
    prompts: tuple[str, ...],
    against: str | None,
    max_new_tokens: int,
    chat: bool,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Continue each PROMPT greedily with MODEL."""
    if model == against:
        raise BadInput(f"--against {against} is MODEL itself; give the source that it was converted from")
    names = [name for name in (against, model) if name is not None]
    locations = {name: locate(name) for name in names}
    tokenizers = {name: load_tokenizer(at) for name, at in locations.items()}
    refuse_other_tokenizers(tokenizers, TOKEN_BY_TOKEN)
    # The same tokens for both models, with the reference's template.
    tokenizer = tokenizers[names[0]]
    encoded = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    models = load_models(locations, dtype, device)
    written = continue_prompts(models, tokenizer, encoded, max_new_tokens=max_new_tokens, track=rich_track)
    result: dict[str, Any] = {
        "models": names, "against": against, "max_new_tokens": max_new_tokens,
        "chat": chat and has_template(tokenizer), "dtype": dtype or "float32", "decoding": "greedy",
        "generations": [_record(prompt, by_name) for prompt, by_name in zip(prompts, written, strict=True)],
    }  # fmt: skip
    emit(result, json_file, *_shown(result["generations"]))


def _record(prompt: str, written: Mapping[str, Continuation]) -> dict[str, Any]:
    """What became of one prompt as plain data."""
    tokens = [continuation.tokens for continuation in written.values()]
    return {
        "prompt": prompt,
        "texts": {name: continuation.text for name, continuation in written.items()},
        "tokens": {name: len(continuation.tokens) for name, continuation in written.items()},
        "same_tokens": same_tokens(*tokens) if len(tokens) > 1 else None,
    }


def _shown(generations: Sequence[Mapping[str, Any]]) -> list[object]:
    """The text of one model and prompt alone; else each prompt, and below it what was written."""
    parts: list[object] = []
    for made in generations:
        texts: dict[str, str] = made["texts"]
        if len(generations) > 1 or len(texts) > 1:
            parts += [*([""] if parts else []), verbatim(f"prompt: {made['prompt']}", "bold")]
        parts += _beside(made) if len(texts) > 1 else [verbatim(text) for text in texts.values()]
    return parts


def _beside(made: Mapping[str, Any]) -> list[object]:
    """One prompt's texts in columns, and from where they part."""
    texts = Table(expand=True)
    for name in made["texts"]:
        texts.add_column(verbatim(name), overflow="fold", ratio=1)
    texts.add_row(*map(verbatim, made["texts"].values()))
    return [texts, f"same for {made['same_tokens']} of {max(made['tokens'].values())} tokens"]
