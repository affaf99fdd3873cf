"""Healing on a real model: how much of the excess is left, which start heals best, and what parity can learn.

    python benchmarks/heal.py short    SRC DIR RESULT.json --data FILE ... --test FILE ... --minutes 30
    python benchmarks/heal.py starts   SRC DIR RESULT.json --data FILE ... --test FILE ... --tokens 65536
    python benchmarks/heal.py again    SRC DIR RESULT.json --data FILE ... --test FILE ... --tokens 65536
    python benchmarks/heal.py parity   SRC DIR RESULT.json --data FILE ... --tokens 65536

short    converts SRC by `best`, heals it, and measures before and after on texts not trained on, and on --tasks.
starts   the same from transmla, care-mla and best, all at the same share of the cache, with the same tokens.
again    best at half the cache, healed, against best at five eighths, healed on half the tokens, cut to half the cache
         by what its training made of it (benchmarks/reranking.py), and healed on as many tokens again.
parity   fine-tunes SRC and its lossless conversion at the full cache by cross-entropy alone, on the same tokens.

DIR keeps the checkpoints; what is there is not made again. Next to RESULT.json is a picture of the held-out curves.
"""

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from reranking import choose_again

from care import load_recipe, open_source
from care.calibration import first_windows, load_text, sampled_windows
from care.conversion import run_conversion
from care.evaluation import load_task, measure, score
from care.healing import HealingRequest, Objective, heal
from care.healing.students import TRAINED
from care.modeling.lazy_logits import lazy_logits
from care.modeling.loading import load_model, locate
from care.source import Source
from care.statistics import CalibrationRequest

WINDOW, WINDOWS = 1024, 24
CHOSEN_ON = 32
"""Windows of training text on which ranks are chosen again."""

STARTS = ("transmla", "care-mla", "best")


def converted(source: Source, options: argparse.Namespace, recipe: str, budget: float) -> Path:
    """A conversion of the source in DIR."""
    out = options.directory / f"{recipe}-{budget:g}"
    if not out.exists():
        request = CalibrationRequest(options.calibration or options.data[0])
        run_conversion(source, load_recipe(recipe, format="native"), budget, request, out, say=print)
    return out


def own_copy(source: Source, options: argparse.Namespace) -> Path:
    """The source itself as a directory that can be trained."""
    out = options.directory / "source"
    if not out.exists():
        source.model.save_pretrained(out)
        source.tokenizer.save_pretrained(out)
    return out


def healed(
    source: Source, options: argparse.Namespace, model: Path, more: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """A model, healed in DIR, and its report."""
    out = options.directory / f"{model.name}-healed-{options.tokens or options.minutes}"
    asked: dict[str, Any] = {
        "minutes": options.minutes, "tokens": options.tokens, "rate": options.rate, "batch": options.batch,
        "length": options.length, "together": options.together, "held_out": options.held_out,
        "precision": options.precision, "trained": options.train, "compile": options.compile,
        "cuda_graph": options.cuda_graph,
        "objective": Objective(beta=options.beta, hidden=options.hidden), **(more or {}),
    }  # fmt: skip
    request = HealingRequest(str(model), source.name, tuple(options.data), **asked)
    if not out.exists():
        heal(request, out, device=options.device, say=print)
    report = json.loads((out / "healing.json").read_text())
    # Without those that the report names by their last component, and its versions.
    wanted = {key: value for key, value in asdict(request).items() if key not in {"model", "teacher", "data"}}
    other = [key for key in wanted.keys() & report["request"].keys() if wanted[key] != report["request"][key]]
    if other:
        sys.exit(f"{out} was healed with another {', '.join(sorted(other))}; use another DIR")
    return out, report


def excesses(source: Source, options: argparse.Namespace, models: dict[str, Path]) -> dict[str, Any]:
    """ln(perplexity / perplexity of the source) and KL to the source, per text and model."""
    loaded = {
        name: load_model(locate(str(at)), dtype=torch.float32, device=options.device) for name, at in models.items()
    }
    found: dict[str, Any] = {}
    for text in options.test:
        windows_BT = first_windows(source.tokens(load_text(text)), WINDOW, options.windows)
        runs = {name: partial(lazy_logits, model) for name, model in {"source": source.model, **loaded}.items()}
        quality = measure(runs, windows_BT, reference="source")
        base = quality["source"].nll
        found[Path(text).name] = {"source perplexity": math.exp(base)} | {
            name: {"perplexity": quality[name].perplexity, "excess": quality[name].nll - base, "kl": quality[name].kl}
            for name in models
        }
    return found


def answers(source: Source, options: argparse.Namespace, models: dict[str, Path]) -> dict[str, Any]:
    """Shares of right answers per task and their means over tasks, acc and acc_norm apart, of the source and models."""
    found: dict[str, Any] = {}
    for name, at in {"source": None, **models}.items():
        model = source.model if at is None else load_model(locate(str(at)), dtype=torch.float32, device=options.device)
        scores = {task: score(model, source.tokenizer, rows) for task, rows in options.tasks.items()}
        found[name] = {task: asdict(one) for task, one in scores.items()}
        for kind in ("acc", "acc_norm"):
            values = [value for one in scores.values() if (value := getattr(one, kind)) is not None]
            found[name][f"mean {kind}"] = fmean(values) if values else None
    return found


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out divergence and cross-entropy of several runs against tokens."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to load
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, key, label in zip(axes, ("kl", "ce"), ("KL to the teacher", "cross-entropy"), strict=True):
        for (name, looks), marker in zip(curves.items(), "osv^Dx", strict=False):
            axis.plot([x["tokens"] for x in looks], [x[key] for x in looks], marker=marker, label=name)
        axis.set(ylabel=f"held-out {label},\nnats/token")
    axes[1].set(xlabel="tokens trained on")
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(curves))
    figure.savefig(path, dpi=120)


def short(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """What a short run leaves of the excess."""
    model = converted(source, options, "best", options.budget)
    out, report = healed(source, options, model)
    quality = excesses(source, options, {"one shot": model, "healed": out})
    left = {text: rows["healed"]["excess"] / rows["one shot"]["excess"] for text, rows in quality.items()}
    tasks = answers(source, options, {"one shot": model, "healed": out}) if options.tasks else {}
    return {"quality": quality, "excess left": left, "tasks": tasks, "runs": {"best": report}}


def starts(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Several initializations at one cache width and one number of tokens."""
    models = {name: converted(source, options, name, options.budget) for name in STARTS}
    runs = {name: healed(source, options, model) for name, model in models.items()}
    ends = {f"{name} healed": out for name, (out, _) in runs.items()}
    return {
        "quality": excesses(source, options, {**models, **ends}),
        "runs": {name: report for name, (_, report) in runs.items()},
    }


def again(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Whether a model that is healed first and cut then is better than one that was cut at once."""
    half = {"tokens": options.tokens // 2}
    straight, wide = (converted(source, options, "best", budget) for budget in (0.5, 0.625))
    straight_out, straight_report = healed(source, options, straight)
    wide_out, wide_report = healed(source, options, wide, half)
    table = json.loads((straight / "config.json").read_text())["latent_attention"]
    width = sum(table["kv_lora_rank"]) + sum(table["qk_rope_head_dim"])
    windows_BT = sampled_windows(source.tokens(load_text(options.data[0])), options.length, CHOSEN_ON, seed=1)
    cut = {name: options.directory / f"{name}-again" for name in (wide.name, wide_out.name)}
    for name, out in cut.items():
        if not out.exists():
            choose_again(options.directory / name, windows_BT, width, out)
    # Another seed: the second half of the tokens is not the first one again.
    out, report = healed(source, options, cut[wide_out.name], {**half, "seed": 1, "refit_tokens": 0})
    models = {
        "one shot": straight, "healed": straight_out, "five eighths": wide, "five eighths healed": wide_out,
        "five eighths cut": cut[wide.name], "healed and cut": cut[wide_out.name], "healed, cut, healed": out,
    }  # fmt: skip
    return {
        "quality": excesses(source, options, models),
        "runs": {"at once": straight_report, "before the cut": wide_report, "after the cut": report},
    }


def parity(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Whether latent attention in the source's own cache learns more than the source."""
    models = {"source": own_copy(source, options), "converted": converted(source, options, "care-mla", 1.0)}
    settings = {"objective": Objective(beta=0.0), "refit_tokens": 0}
    return {"runs": {name: healed(source, options, model, settings)[1] for name, model in models.items()}}


EXPERIMENTS = {"short": short, "starts": starts, "again": again, "parity": parity}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("source")
    parser.add_argument("directory", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--data", nargs="+", required=True, help="texts to train on, in equal shares")
    parser.add_argument("--test", nargs="+", default=[], help="texts to measure on")
    parser.add_argument("--tasks", nargs="+", default=[], type=Path, help="multiple-choice rows, for short")
    parser.add_argument("--calibration", help="text for conversion; default: the first of --data")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the cache that short and starts keep")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--train", choices=TRAINED, default=HealingRequest.trained)
    for name in ("--compile", "--cuda-graph"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the divergence beside cross-entropy")
    parser.add_argument("--hidden", type=float, default=Objective.hidden, help="weight of hidden states' distance")
    for name in ("rate", "batch", "length", "together", "held_out", "precision"):
        default = getattr(HealingRequest, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def main() -> None:
    """Run one experiment, write its figures and its picture."""
    options = parse()
    # Before hours of healing, as one may not be there.
    options.tasks = {task.name: load_task(task) for task in options.tasks}
    options.directory.mkdir(parents=True, exist_ok=True)
    source = open_source(options.source, options.device)
    result = EXPERIMENTS[options.experiment](source, options)
    machine = {
        "processor": torch.cuda.get_device_name(options.device) if options.device != "cpu" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"), "transformers": version("transformers"),
    }  # fmt: skip
    summary = {
        "experiment": options.experiment, "source": Path(options.source).name, "machine": machine,
        "data": [Path(name).name for name in options.data], "window": WINDOW, "windows": options.windows, **result,
    }  # fmt: skip
    options.result.write_text(json.dumps(summary, indent=2) + "\n")
    plot({name: report["held_out"] for name, report in result["runs"].items()}, options.result.with_suffix(".png"))
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
