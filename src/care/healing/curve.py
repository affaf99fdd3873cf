"""The curve of a run as a picture: loss of every step, and the divergence on what is trained on and on what is not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.pictures import new_figure, save_png

SMOOTHED = 0.1
"""Share of a new step in the running mean that is drawn over the steps."""


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean, without a bias towards zero at the start."""
    means, total, weight = list[float](), 0.0, 0.0
    for value in values:
        total, weight = (1 - SMOOTHED) * total + SMOOTHED * value, (1 - SMOOTHED) * weight + SMOOTHED
        means.append(total / weight)
    return means


def plot_curve(report: Mapping[str, Any], path: Path) -> None:
    """Train and held-out divergence above, cross-entropy below, against tokens; of a report as in healing.json."""
    steps, held_out = report["steps"], report["held_out"]
    figure = new_figure(9, 6)
    divergence, entropy = figure.subplots(2, 1, sharex=True)
    for axes, key, label in ((divergence, "kl", "KL to the teacher"), (entropy, "ce", "cross-entropy")):
        tokens = [step["tokens"] for step in steps]
        values = [step[key] for step in steps]
        axes.plot(tokens, values, color="0.8", linewidth=0.8, label="steps")
        axes.plot(tokens, running_mean(values), color="0.4", label="steps, running mean")
        axes.plot(
            [look["tokens"] for look in held_out], [look[key] for look in held_out], color="black", marker="o",
            label="held out",
        )  # fmt: skip
        axes.set(ylabel=f"{label}, nats/token")
        axes.legend()
    divergence.set(yscale="log")
    divergence.set_title("healing: what was trained on and what was held out")
    entropy.set(xlabel="tokens trained on")
    save_png(figure, path)
