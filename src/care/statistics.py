"""Calibration of a source: what was asked, taken from a text or from the disk."""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import (
    EXPLANATION,
    Calibration,
    CalibrationInfo,
    Collection,
    Wanted,
    equal_shares,
    finish_calibration,
    first_windows,
    is_calibration,
    load_calibration,
    load_text,
    num_batches,
    sampled_windows,
    taken_in_turn,
)
from .errors import BadInput
from .progress import Track, silent
from .ranks import on_main, shared_directory, world
from .source import Source
from .version import __version__

STATISTICS = frozenset({"inputs", "gradients", "distances"})
"""Everything that calibration can collect."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on: a text by name or file and how much of it, or a directory of saved statistics.

    Attention distances are taken on windows of `context` tokens from the start of the text, as long as the
    contexts that will be served: `num_contexts` of them, fewer where the text is shorter. Gradients are taken on
    one window in `windows_per_gradient`, as a pass back costs several passes forward. Of several texts, `text` and
    those in `also`, each gives an equal share of all windows.
    """

    text: str
    num_windows: int = 128
    window: int = 256
    seed: int = 42
    context: int = 1024
    num_contexts: int = 4
    windows_per_gradient: int = 4
    also: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts."""
        return (self.text, *self.also)

    @property
    def gradient_windows(self) -> int:
        """How many windows gradients are taken on."""
        return math.ceil(self.num_windows / self.windows_per_gradient)


def calibrate(
    source: Source,
    request: CalibrationRequest,
    needs: frozenset[str] = frozenset({"inputs"}),
    *,
    directory: Path | None = None,
    track: Track = silent,
) -> Calibration:
    """Statistics of every layer on windows sampled from the text, or saved ones, checked to fit the source.

    With a `directory` they are saved there as they are taken, and a run that was killed is continued.
    """
    if request.also and any(is_calibration(Path(name)) for name in request.texts):
        raise BadInput("saved statistics cannot be mixed with other texts; give the texts that they were taken on")
    if is_calibration(Path(request.text)):
        calibration = load_calibration(Path(request.text))
        if calibration.info.fingerprint != source.fingerprint:
            raise BadInput(f"{request.text} was calibrated on {calibration.info.source}, not on {source.name}")
        return calibration
    if directory is not None:
        return _collected(source, request, needs, directory, track)
    with shared_directory() as temporary:
        calibration = _collected(source, request, needs, temporary, track)
        return replace(calibration, layers=list(calibration.layers))


def _collected(
    source: Source, request: CalibrationRequest, needs: frozenset[str], directory: Path, track: Track
) -> Calibration:
    """Statistics collected in a directory, unless they are there."""
    if is_calibration(directory):
        return load_calibration(directory)
    start = time.perf_counter()
    wanted = _wanted(source, request, needs)
    Collection(source.observed, wanted, directory).run(track)
    info = CalibrationInfo(
        source=source.name, fingerprint=source.fingerprint, text=request.text, num_windows=request.num_windows,
        window=request.window, seed=request.seed, num_layers=source.spec.num_layers,
        seconds=time.perf_counter() - start, context=0 if wanted.contexts_BT is None else request.context,
        gradient_windows=wanted.gradient_windows, also=request.also,
    )  # fmt: skip
    on_main(lambda: finish_calibration(directory, info, wanted.windows_BT))
    return load_calibration(directory)


def _wanted(source: Source, request: CalibrationRequest, needs: frozenset[str]) -> Wanted:
    """Windows of the texts, and what is asked of them."""
    texts = {name: source.tokens(load_text(name)) for name in request.texts}
    windows_BT = _sampled(texts, request)
    if num_batches(windows_BT) < world():
        raise BadInput(
            f"{request.num_windows} windows of {request.window} tokens run in {num_batches(windows_BT)} batches, fewer "
            f"than the {world()} processes; start fewer processes, or give more windows"
        )
    contexts_BT = None
    if "distances" in needs:
        contexts_BT = _contexts(texts, request)
    return Wanted(windows_BT, contexts_BT, request.gradient_windows if "gradients" in needs else 0, request.seed)


def _sampled(texts: Mapping[str, Tensor], request: CalibrationRequest) -> Tensor:
    """Windows (B, T) drawn from tokens by text, in equal shares."""
    if len(texts) < len(request.texts):
        raise BadInput(f"the same text is given twice among {', '.join(request.texts)}; name each once")
    if request.num_windows < len(texts):
        raise BadInput(f"{request.num_windows} windows cannot be taken of {len(texts)} texts; give more windows")
    shares = zip(texts.items(), equal_shares(request.num_windows, len(texts)), strict=True)
    return taken_in_turn(
        [
            sampled_windows(tokens_T, request.window, share, request.seed, name=name)
            for (name, tokens_T), share in shares
        ]
    )


def _contexts(texts: Mapping[str, Tensor], request: CalibrationRequest) -> Tensor:
    """The first windows of `context` tokens of each text, as many as there are, at least one of each."""
    shares = equal_shares(max(request.num_contexts, len(texts)), len(texts))
    length = max(request.context, 1)
    return taken_in_turn([
        first_windows(tokens_T, request.context, max(min(share, len(tokens_T) // length), 1), name=name)
        for (name, tokens_T), share in zip(texts.items(), shares, strict=True)
    ])  # fmt: skip


def describe_run(source: Source, request: CalibrationRequest) -> dict[str, Any]:
    """What decides about the bytes of statistics, as far as it can change between two runs."""
    return {**describe_source(source), **describe_request(request)}


def describe_source(source: Source) -> dict[str, Any]:
    """What decides about the numbers of a model that is run as it is."""
    return {
        "version": f"{__version__}, torch {torch.__version__}", "source": source.identity, "device": source.device,
        "number_of_processes": world(),
    }  # fmt: skip


def describe_request(request: CalibrationRequest) -> dict[str, Any]:
    """What is asked of which texts, by what is in them."""
    return {"calibration": asdict(request), "text": [_content_digest(Path(name)) for name in request.texts]}


def _content_digest(text: Path) -> str:
    """A hash of a text file, or of what explains saved statistics; of nothing for a text by name."""
    explained = text / EXPLANATION if is_calibration(text) else text
    content = explained.read_bytes() if explained.is_file() else b""
    return hashlib.sha256(content).hexdigest()
