"""KV parity: at the full budget an absorbed model equals its source, in the same cache.

Usage: python benchmarks/parity.py SRC TEXT RESULT.json [WINDOWS]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from care import convert, load_recipe, open_source, plan_conversion
from care.calibration import first_windows, load_text
from care.evaluation import live_cache, measure
from care.modeling.loading import load_model, locate

WINDOW, WINDOWS = 1024, 4


def main(source_name: str, text: str, result: Path, num_windows: int) -> None:
    """Convert, reload, and compare logits on the first windows of the text."""
    source = open_source(source_name)
    recipe = load_recipe("care-mla", format="native")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "model"
        convert(plan_conversion(source, recipe, 1.0, None), out)
        converted = load_model(locate(str(out)), dtype=torch.float32)
    windows_BT = first_windows(source.tokens(load_text(text)), WINDOW, num_windows)
    largest = {"difference": 0.0, "logit": 0.0}

    def logits(tokens_BT: torch.Tensor) -> torch.Tensor:
        ours, theirs = converted(input_ids=tokens_BT, use_cache=False).logits, source.logits(tokens_BT)
        largest["difference"] = max(largest["difference"], float((ours - theirs).abs().max()))
        largest["logit"] = max(largest["logit"], float(theirs.abs().max()))
        return ours

    quality = measure({"source": source.logits, "converted": logits}, windows_BT, reference="source")
    summary: dict[str, Any] = {
        "model": Path(source_name).name, "text": Path(text).name, "window": WINDOW, "windows": num_windows,
        "largest_logit_difference": largest["difference"], "largest_logit": largest["logit"],
        "perplexity": {name: q.perplexity for name, q in quality.items()}, "kl": quality["converted"].kl,
        "cache_bytes_per_token": {
            "source": live_cache(source.model).bytes_per_token, "converted": live_cache(converted).bytes_per_token,
        },
    }  # fmt: skip
    result.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else WINDOWS)
