"""care heal: a short distillation after conversion."""

import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import BadInput
from ..healing import HealingRequest, HeldOut, Objective, Step, heal
from ..healing.request import PRECISIONS
from ..healing.students import TRAINED
from ..healing.training import Meter
from .console import LOG_SECONDS, device_option, emit, err, json_option, rich_track, say, table

OVERFITTED = 1.2
"""Held-out divergence over that on trained texts from which on more text is advised: SmolLM2 had 0.98 where no text was
read twice, 1.30 to 1.44 where some were read six or seven times."""


@click.command()
@click.argument("model")
@click.argument("out_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, metavar="SRC", help="The source, or a larger model with the same tokenizer.")
@click.option(
    "--data", required=True, multiple=True, help="Text FILE or NAME, several in equal shares; self: the teacher writes."
)
@click.option(
    "--minutes", type=float, help="How long to train by the clock, refit and writing by the teacher included."
)
@click.option("--tokens", type=int, help="How long to train by tokens.")
@click.option(
    "--train", "trained", type=click.Choice(TRAINED), default="attention", show_default=True, help="Which weights."
)
@click.option("--lora-rank", default=HealingRequest.lora_rank, show_default=True, help="Rank of --train lora.")
@click.option(
    "--beta", default=Objective.beta, show_default=True, help="Weight of the divergence beside cross-entropy."
)
@click.option("--temperature", default=Objective.temperature, show_default=True, help="Temperature of the divergence.")
@click.option("--kl-only", is_flag=True, help="Leave cross-entropy out of what is minimized.")
@click.option(
    "--hidden",
    default=Objective.hidden,
    show_default=True,
    help="Weight of the distance of hidden states, layer by layer.",
)
@click.option("--rate", default=HealingRequest.rate, show_default=True, help="Adam's step relative to a matrix's rms.")
@click.option("--batch", default=HealingRequest.batch, show_default=True, help="Windows of a step, over all devices.")
@click.option("--length", default=HealingRequest.length, show_default=True, help="Tokens of a window.")
@click.option("--together", default=HealingRequest.together, show_default=True, help="Windows on a device at a time.")
@click.option("--held-out", default=HealingRequest.held_out, show_default=True, help="Windows that are not trained on.")
@click.option("--refit-tokens", type=int, help="Refit outputs on so many tokens first; default: if conversion did not.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Of products; sums are fp32.",
)
@click.option("--recompute", is_flag=True, help="Gradient checkpointing: less memory, a third more time.")
@click.option("--compile", is_flag=True, help="Fuse norms, feed-forward networks and losses; needs a C++ compiler.")
@click.option("--cuda-graph", is_flag=True, help="Record a step and start it as a whole: for small models on one GPU.")
@click.option("--seed", default=HealingRequest.seed, show_default=True, help="Draws the order of windows.")
@click.option(
    "--checkpoint-minutes", default=HealingRequest.checkpoint_minutes, show_default=True, help="Between checkpoints."
)
@click.option("--tensorboard", type=click.Path(path_type=Path), metavar="DIR", help="Write the curve there as well.")
@device_option
@json_option
def command(
    model: str,
    out_dir: Path,
    beta: float,
    temperature: float,
    kl_only: bool,
    hidden: float,
    tensorboard: Path | None,
    device: str,
    json_file: str | None,
    **training: Any,  # noqa: ANN401 - the fields of HealingRequest, checked there
) -> None:
    """Train MODEL, a converted model, to give what the teacher SRC gives; write it to OUT in the same format and shape.

    A run that was stopped is continued by the same command. For many GPUs: accelerate launch -m care heal ...
    """
    objective = Objective(beta, temperature, ce=not kl_only, hidden=hidden)
    request = HealingRequest(model, objective=objective, **training)
    with ExitStack() as stack:
        meters = [stack.enter_context(_bar())]
        if tensorboard is not None:
            meters.append(stack.enter_context(_board(tensorboard)))

        def meter(entry: Step | HeldOut) -> None:
            for tell in meters:
                tell(entry)

        report = heal(request, out_dir, device=device, say=say, track=rich_track, meter=meter)
    if report:
        looks = report["held_out"]
        columns = ("held out", "tokens", "CE", "KL")
        rows = [(name, f"{at['tokens']:,}", f"{at['ce']:.4f}", f"{at['kl']:.4f}")
                for name, at in (("before", looks[0]), ("after", looks[-1]))]  # fmt: skip
        emit(report, json_file, table(f"wrote {out_dir} after {report['num_steps']} steps", columns, rows))
        if read_too_often(report):
            found = report["overfitting"]
            say(
                f"texts were read up to {max(report['rounds'].values()):.1f} times, and KL is {found['train_kl']:.3f} "
                f"on them but {found['held_out_kl']:.3f} on what was held out: more text may heal further"
            )


def read_too_often(report: Mapping[str, Any]) -> bool:
    """Whether a text was read more than once and divergence on what was held out stayed well above it."""
    found = report["overfitting"]
    return bool(found) and max(report["rounds"].values()) > 1 and found["held_out_kl"] > OVERFITTED * found["train_kl"]


def _facts(entry: Step, speed: float) -> str:
    return f"loss {entry.loss:.3f}  KL {entry.kl:.4f}  {speed:,.0f} tokens/s"


@contextmanager
def _bar() -> Generator[Meter]:
    """Loss, speed and remaining time: a bar on a terminal, else a line now and then."""
    begun = said = time.monotonic()
    first: Step | None = None
    columns = (TextColumn("healing"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
               TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("ETA"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def show(entry: Step | HeldOut) -> None:
            nonlocal first, said
            if isinstance(entry, HeldOut):
                say(f"held out after {entry.tokens:,} tokens: CE {entry.ce:.4f}, KL {entry.kl:.4f}")
                return
            first = first or entry
            now = time.monotonic()
            step_tokens = entry.tokens // (entry.step + 1)
            facts = _facts(entry, (entry.tokens - first.tokens + step_tokens) / max(now - begun, 1e-9))
            progress.update(task, completed=entry.fraction, description=facts)
            if not err.is_terminal and now - said >= LOG_SECONDS and entry.fraction > first.fraction:
                said = now
                left = (now - begun) * (1 - entry.fraction) / (entry.fraction - first.fraction)
                say(f"healing: {entry.fraction:.0%}, {facts}, {left:.0f} s left")

        yield show


@contextmanager
def _board(directory: Path) -> Generator[Meter]:
    """The curve for TensorBoard, by tokens."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise BadInput("--tensorboard needs tensorboard; pip install tensorboard") from error
    with SummaryWriter(str(directory)) as board:

        def show(entry: Step | HeldOut) -> None:
            kind = "held-out" if isinstance(entry, HeldOut) else "train"
            for name in ("ce", "kl"):
                board.add_scalar(f"{name}/{kind}", getattr(entry, name), entry.tokens)

        yield show
