"""The loop: steps on Accelerate, checkpoints, and going on from them."""

import math
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import Diverged
from ..output import writing
from .data import Windows
from .journal import HeldOut, Journal, Step
from .recording import RecordedPasses, RecordedUpdate
from .request import HealingRequest

WARMUP_STEPS = 10
EVALUATIONS = 8
"""How often held-out windows are looked at, beside before the first step."""

BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0
"""Norm to which gradients are cut: the first batches of a badly converted model are far from typical."""

CHECKPOINT = "checkpoint"
STUDENT = "student."

Meter = Callable[[Step | HeldOut], None]
"""Told of every step and of every look at held-out windows."""


def unmetered(entry: Step | HeldOut) -> None:
    """Tell nobody."""
    del entry


class Training:
    """One run: a prepared Distiller and its optimizer, from the last checkpoint in `work` to the end.

    `spent` are the seconds of its minutes that were spent before.
    """

    def __init__(
        self, accelerator: Accelerator, request: HealingRequest, distiller: Any, rates: Mapping[str, float],  # noqa: ANN401
        windows: Windows, work: Path, meter: Meter = unmetered, *, spent: float = 0.0,
    ) -> None:  # fmt: skip
        self._accelerator, self._request, self._windows = accelerator, request, windows
        self._work, self._meter, self._spent = work, meter, spent
        named = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
        self._names = frozenset(named)
        groups = [{"params": [p], "scale": rates[name.removeprefix(STUDENT)]} for name, p in named.items()]
        # Every parameter is a group of its own, so what is fused is fused within one parameter.
        fused = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            groups, lr=request.rate, betas=BETAS, weight_decay=0.0, fused=fused, capturable=request.cuda_graph
        )
        self._model, self._optimizer = accelerator.prepare(distiller, optimizer)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._scales_G = torch.tensor([group["scale"] for group in groups], device=accelerator.device)
        self._rates_G = torch.zeros_like(self._scales_G)
        self._recorded: RecordedPasses | None = None
        self._update = RecordedUpdate(self._optimizer.optimizer) if request.cuda_graph else self._optimizer.step
        self._set_rates(request.rate)
        self._journal = Journal(work / "journal.jsonl") if accelerator.is_main_process else None

    @property
    def journal(self) -> Journal:
        """The curve; on the main process."""
        assert self._journal is not None
        return self._journal

    def rounds(self, num_steps: int) -> dict[str, float]:
        """How often each text is read in so many steps; one that was named twice has two turns."""
        rounds = dict[str, float]()
        for text, often in zip(self._request.data, self._windows.rounds(num_steps * self._request.batch), strict=True):
            name = Path(text).name
            rounds[name] = rounds.get(name, 0.0) + often
        return rounds

    def run(self) -> int:
        """Train to the end; the number of steps."""
        step = self._restore()
        start, before = time.monotonic(), (self._journal.seconds if self._journal else 0.0) or self._spent
        saved = start
        last = self._fraction(step - 1, before) if step else -1.0
        while (fraction := self._fraction(step, before + time.monotonic() - start)) < 1:
            if math.floor(fraction * EVALUATIONS) > math.floor(last * EVALUATIONS):
                self._look_at_held_out(step)
            last = fraction
            found, rate = self._step(step, fraction)
            self._write(step, fraction, before + time.monotonic() - start, found, rate)
            step += 1
            if self._same(time.monotonic() - saved >= 60 * self._request.checkpoint_minutes):
                self._save(step)
                saved = time.monotonic()
        self._look_at_held_out(step)
        self._save(step)
        if self._journal:
            self._journal.cut(step)
        return step

    def _same(self, value: Any) -> Any:  # noqa: ANN401
        """The main process's value, on all processes."""
        held = [value]
        broadcast_object_list(held)
        return held[0]

    def _fraction(self, step: int, seconds: float) -> float:
        """How much of the run is behind it: by tokens, or by the clock, as it was where a step is made again."""
        if self._request.tokens is not None:
            return step * self._request.step_tokens / self._request.tokens if self._request.tokens else 1.0
        assert self._request.minutes is not None
        known = self._journal.steps.get(step) if self._journal else None
        return self._same(known.fraction if known else seconds / max(60 * self._request.minutes, 1e-9))

    def _step(self, step: int, fraction: float) -> tuple[Tensor, float]:
        """One optimizer step; loss, CE, KL and the gradient's norm, and the rate."""
        request, accelerator = self._request, self._accelerator
        torch.manual_seed(request.seed + step)
        rate = request.rate * min((step + 1) / WARMUP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * fraction))
        batch_BT = self._windows.batch(step * request.batch, request.batch, request.seed)
        own_BT = batch_BT[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        terms = torch.zeros(3, device=accelerator.device)
        parts = own_BT.split(request.together)
        for number, part_BT in enumerate(parts):
            share = len(part_BT) / len(own_BT)
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                terms += self._passes(part_BT, share) * share
        norm = accelerator.clip_grad_norm_(self._parameters, LARGEST_GRADIENT)
        terms = torch.as_tensor(accelerator.reduce(terms, "mean"))
        # Read once: every look at a value waits for a GPU.
        found = torch.cat((terms, _whole(norm).reshape(1).to(terms))).cpu()
        self._check_finite(step, found)
        self._set_rates(rate)
        self._update()
        self._optimizer.zero_grad(set_to_none=not request.cuda_graph)
        return found, rate

    def _set_rates(self, rate: float) -> None:
        """Each group's rate: a number, or where the update is recorded its place in a tensor that is written anew."""
        if not self._request.cuda_graph:
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            return
        torch.mul(self._scales_G, rate, out=self._rates_G)
        for group, place in zip(self._optimizer.param_groups, self._rates_G, strict=True):
            group["lr"] = place

    def _passes(self, part_BT: Tensor, share: float) -> Tensor:
        """Forward and backward on a part of a step's windows: loss, CE, KL; recorded at the first if so asked."""
        if not self._request.cuda_graph:
            return self._pass(part_BT, share)
        if self._recorded is None:
            self._recorded = RecordedPasses(lambda x_BT: self._pass(x_BT, share), part_BT, self._parameters)
        return self._recorded(part_BT)

    def _pass(self, part_BT: Tensor, share: float) -> Tensor:
        with self._accelerator.autocast():
            found = self._model(part_BT)
            self._accelerator.backward(found[0] * share)
        return found.detach()

    def _check_finite(self, step: int, found: Tensor) -> None:
        if not bool(torch.isfinite(found).all()):
            raise Diverged(
                f"the loss is {float(found[0])} and its gradient {float(found[3])} at step {step}; the last good "
                f"checkpoint is kept in {self._work}, and the same command with a --rate below "
                f"{self._request.rate:g} goes on from it"
            )

    def _write(self, step: int, fraction: float, seconds: float, found: Tensor, rate: float) -> None:
        if self._journal is None:
            return
        loss, ce, kl, norm = map(float, found)
        tokens = (step + 1) * self._request.step_tokens
        entry = Step(step, fraction, round(seconds, 3), tokens, loss, ce, kl, rate, norm)
        self._journal.write(entry)
        self._meter(entry)

    def _look_at_held_out(self, step: int) -> None:
        """Means over all held-out windows; every process takes as many, the last ones again with weight 0."""
        accelerator, windows_BT = self._accelerator, self._windows.held_out_BT
        sums = torch.zeros(4, device=accelerator.device)
        own = range(accelerator.process_index, len(windows_BT), accelerator.num_processes)
        for turn in range(math.ceil(len(windows_BT) / accelerator.num_processes)):
            weight = 1.0 if turn < len(own) else 0.0
            window_T = windows_BT[own[turn] if weight else 0]
            with torch.no_grad(), accelerator.autocast():
                found = self._model(window_T[None].to(accelerator.device))
            sums += weight * torch.cat((found, torch.ones_like(found[:1])))
        sums = accelerator.reduce(sums, "sum")
        if self._journal is not None:
            _, ce, kl = (float(value / sums[3]) for value in sums[:3])
            entry = HeldOut(step, step * self._request.step_tokens, ce, kl)
            self._journal.write(entry)
            self._meter(entry)

    def _state(self) -> dict[str, Any]:
        """Trained weights and the optimizer's moments, sharded as they are."""
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self._model, self._optimizer.optimizer, options=options)
        return {"model": self._only_trained(model), "optimizer": optimizer}

    def _only_trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Without second names of tied weights, which torch does not count as frozen."""
        return {name: tensor for name, tensor in state.items() if name in self._names}

    def _save(self, step: int) -> None:
        """A checkpoint that appears under its name when it is complete; then the one before goes."""
        part, done = self._work / "checkpoint.part", self._work / f"{CHECKPOINT}-{step:08d}"
        if self._accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        with writing(done), _alone_or_not():
            try:
                save(self._state(), checkpoint_id=part)
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from error
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process and not done.exists():
            part.replace(done)
            for other in self._checkpoints():
                if other != done:
                    shutil.rmtree(other)
        self._accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        return sorted(self._work.glob(f"{CHECKPOINT}-*"))

    def _restore(self) -> int:
        """Go on from the last checkpoint; the number of steps behind it."""
        found = self._checkpoints()
        if not found:
            return 0
        state = self._state()
        with _alone_or_not():
            load(state, checkpoint_id=found[-1])
        set_state_dict(
            self._model, self._optimizer.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        return int(found[-1].name.removeprefix(f"{CHECKPOINT}-"))

    def trained(self) -> dict[str, Tensor]:
        """Trained weights by their names in the student, whole and on the CPU; empty but on the main process."""
        options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
        state = self._only_trained(get_model_state_dict(self._model, options=options))
        return {name.removeprefix(STUDENT): tensor for name, tensor in state.items()}


@contextmanager
def _alone_or_not() -> Generator[None]:
    """Without torch's advice, on one process, that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _whole(norm: Any) -> Tensor:  # noqa: ANN401
    """A norm as a plain tensor, where it comes sharded."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
