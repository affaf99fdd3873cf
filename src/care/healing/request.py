"""What a healing run is asked to do; everything that decides about its numbers is here."""

from dataclasses import dataclass

from ..errors import InvalidRecipe
from .objective import Objective
from .students import TRAINED, Trained

CE_AND_KL = Objective()
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class HealingRequest:
    """Model, teacher, texts, and how long and how to train.

    `minutes` counts everything but loading; `tokens` counts those trained on. One of both is given. `rate` is the
    step of Adam relative to a matrix's rms. A step sees `batch` windows of `length` tokens, `together` of them at a
    time on each device.
    """

    model: str
    teacher: str
    data: tuple[str, ...]
    minutes: float | None = None
    tokens: int | None = None
    trained: Trained = "attention"
    lora_rank: int = 16
    objective: Objective = CE_AND_KL
    rate: float = 7e-4
    batch: int = 4
    length: int = 512
    together: int = 2
    held_out: int = 8
    refit_tokens: int | None = None
    precision: str = "float32"
    recompute: bool = False
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.tokens is None):
            raise InvalidRecipe("say how long to heal: either --minutes or --tokens")
        if (self.minutes or 0) < 0 or (self.tokens or 0) < 0 or self.checkpoint_minutes < 0:
            raise InvalidRecipe("--minutes, --tokens and --checkpoint-minutes must not be negative")
        if self.trained not in TRAINED:
            raise InvalidRecipe(f"--train {self.trained!r} is not one of {', '.join(TRAINED)}")
        if self.precision not in PRECISIONS:
            raise InvalidRecipe(f"--precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.rate <= 0 or self.objective.temperature <= 0:
            raise InvalidRecipe("--rate and --temperature must be positive")
        if self.objective.beta < 0 or (self.objective.beta == 0 and not self.objective.ce):
            raise InvalidRecipe("--beta must not be negative, nor 0 without cross-entropy")
        if self.objective.hidden < 0:
            raise InvalidRecipe("--hidden must not be negative")
        if min(self.batch, self.together, self.held_out, self.lora_rank) < 1 or self.length < 2:
            raise InvalidRecipe(
                "--batch, --together, --held-out and --lora-rank must be at least 1, --length at least 2"
            )
        if self.cuda_graph and (self.batch % min(self.together, self.batch) or self.recompute):
            raise InvalidRecipe("--cuda-graph needs a --batch that --together divides, and goes without --recompute")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all devices."""
        return self.batch * self.length
