"""A context and its continuation as tokens, as the lm-evaluation-harness has them."""

from typing import Any


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[tuple[int, ...], int]:  # noqa: ANN401
    """Tokens of both together, and how many of them are the context's.

    The tokenizer adds its own special tokens (a BOS, where it has the habit) unless the text brings the BOS along.
    Spaces at the end of the context count as part of the continuation: words begin with their space. Without a context
    the BOS, else the EOS, stands for it. The context is tokenized alone to see where the continuation begins, which has
    at least one token.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        tokens = tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return (tokens if tokens[0] == start else (start, *tokens)), 1
    begun = tokenizer.bos_token and kept.startswith(tokenizer.bos_token)
    habit = {"add_special_tokens": False} if begun else {}
    whole = tuple(tokenizer(kept + continuation, **habit)["input_ids"])
    # What has nothing before it cannot be predicted, so something always counts as context.
    return whole, max(min(len(tokenizer(kept, **habit)["input_ids"]), len(whole) - 1), 1)
