"""care generate: text from any model, converted or not."""

import click

from ..evaluation import generate_text
from ..modeling.loading import load_tokenizer, locate
from .console import device_option, dtype_option, emit, json_option
from .models import load_models


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
    loaded = load_models({model: location}, dtype, device)[model]
    text = generate_text(loaded, load_tokenizer(location), prompt, max_new_tokens=max_new_tokens, chat=chat)
    emit({"model": model, "prompt": prompt, "text": text}, json_file, text)
