"""care generate: text from any model, converted or not."""

import click

from ..conversion import DTYPES
from ..evaluation import generate_text
from ..modeling.loading import load_model, load_tokenizer, locate
from .console import device_option, dtype_option, emit, json_option, working


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True, help="Longest continuation.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@dtype_option
@device_option
@json_option
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Continue PROMPT greedily with MODEL."""
    location = locate(model)
    with working(f"loading {model}"):
        loaded = load_model(location, dtype=DTYPES[dtype or "float32"], device=device)
        tokenizer = load_tokenizer(location)
    text = generate_text(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    emit({"model": model, "prompt": prompt, "text": text}, json_file, text)
