"""What happened at every step, one JSON line each, written as it happens: the curve, and what a rerun repeats."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..output import writing


@dataclass(frozen=True)
class Step:
    """One optimizer step: means over its tokens, before the step was made. `kl` is at the objective's temperature."""

    step: int
    fraction: float
    seconds: float
    tokens: int
    loss: float
    ce: float
    kl: float
    rate: float
    gradient_norm: float


@dataclass(frozen=True)
class HeldOut:
    """Means over the held-out windows after `step` steps; `tokens` have been trained on by then."""

    step: int
    tokens: int
    ce: float
    kl: float


class Journal:
    """Lines are only added. After a resume a step may be there twice: the later line counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps = dict[int, Step]()
        self.held_out = dict[int, HeldOut]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                self._keep(json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue  # the line during which a run was killed
        # A line that was cut off must not swallow the next one.
        if path.exists():
            self._add("\n")

    def _keep(self, entry: Mapping[str, Any]) -> None:
        if "fraction" in entry:
            self.steps[entry["step"]] = Step(**entry)
        else:
            self.held_out[entry["step"]] = HeldOut(**entry)

    def write(self, entry: Step | HeldOut) -> None:
        """Keep an entry, on the disk too."""
        self._keep(asdict(entry))
        self._add(json.dumps(asdict(entry)) + "\n")

    def _add(self, line: str) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def cut(self, num_steps: int) -> None:
        """Forget steps from `num_steps` on: they were made by a run that was stopped and are not in the result."""
        self.steps = {n: step for n, step in self.steps.items() if n < num_steps}
        self.held_out = {n: found for n, found in self.held_out.items() if n <= num_steps}

    @property
    def seconds(self) -> float:
        """How long training has taken so far, over all runs."""
        return max((step.seconds for step in self.steps.values()), default=0.0)
