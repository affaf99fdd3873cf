"""Text from a model, greedily: what a person compares."""

from typing import Any

import torch

from ..errors import BadInput


def generate_text(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, chat: bool = False) -> str:  # noqa: ANN401
    """The greedy continuation of a prompt, which is put through the chat template if `chat`."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not tokenizer(prompt)["input_ids"]:
        raise BadInput("the prompt has no tokens; give some text to continue")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    encoded.pop("token_type_ids", None)
    with torch.inference_mode():
        output = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
