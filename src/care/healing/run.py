"""A healing run from paths to a directory: refit, distill, write in the model's own format."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from torch import Tensor

from ..architectures import architecture_for
from ..calibration import load_text
from ..checkpoint import CONVERSION_NAME, INDEX_NAME, SafetensorsReader, check_finite, read_json
from ..errors import BadInput, InvalidRecipe
from ..licenses import CARD_NAME, stated_license
from ..modeling.loading import load_config, load_model, load_tokenizer, tokenize
from ..output import CheckpointWriter, Say, check_output_free, check_space, partial_of, save_tensors, unsaid, writing
from ..progress import Track, silent
from ..ranks import PATIENCE
from ..refit import Ridge
from ..report import model_card
from ..version import __version__
from .curve import plot_curve
from .data import SELF, Windows, split_windows, write_text
from .layerwise import refit_outputs
from .objective import Distiller, check_compiler
from .pair import Pair, open_pair
from .request import HealingRequest
from .students import checkpoint_tensors, open_student, rates, recompute_activations
from .training import Meter, Training, unmetered

HEALING_NAME = "healing.json"
CURVE_NAME = "healing.png"
"""What a healed model's directory has beside a converted one's files."""

WRITTEN_TOKENS = 2**24
"""Most tokens that the teacher writes; a longer run sees them again."""

WRITTEN_SHARE = 0.3
"""Most of the minutes of a run that the teacher may write."""


def heal(
    request: HealingRequest,
    out_dir: Path,
    *,
    device: str = "cpu",
    say: Say = unsaid,
    track: Track = silent,
    meter: Meter = unmetered,
) -> dict[str, Any]:
    """Heal a model into `out_dir`, on every process of the launch; the report, as in healing.json.

    What a killed run of the same request has trained is not trained again.
    """
    check_output_free(out_dir)
    accelerator = _launched(request, device)
    pair = open_pair(request.model, request.teacher, compared=request.objective.hidden > 0)
    reader = SafetensorsReader(pair.student.directory)
    check_space(out_dir, reader.num_bytes())
    shards = sorted(set(pair.student.directory.glob("*.safetensors")))
    main = accelerator.is_main_process
    writer = CheckpointWriter(out_dir, len(shards), run_description(request), say)
    with writer if main else nullcontext():
        accelerator.wait_for_everyone()
        job = _Job(request, pair, accelerator, partial_of(out_dir) / "work", say, track)
        training = job.training(meter)
        num_steps = training.run()
        trained = training.trained()
        report = dict[str, Any]()
        if main:
            report = job.report(training, num_steps)
            _write(writer, shards, job.healed(trained), pair.student.directory, report)
    accelerator.wait_for_everyone()
    return report


def _launched(request: HealingRequest, device: str) -> Accelerator:
    """This process's part of the launch, which is one that the request can run on."""
    # Accelerate keeps its first choice for the life of the process; a second run may make another.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision="bf16" if request.precision == "bfloat16" else "no",
        # Others wait while one refits, or has the teacher write.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
    if request.batch % accelerator.num_processes:
        raise InvalidRecipe(f"--batch {request.batch} cannot be shared evenly by {accelerator.num_processes} processes")
    if request.compile:
        check_compiler(str(accelerator.device))
    alone = accelerator.num_processes == 1 and not accelerator.is_fsdp2
    if request.cuda_graph and not (alone and accelerator.device.type == "cuda"):
        raise BadInput("--cuda-graph needs one process with --device cuda; leave it out")
    return accelerator


def run_description(request: HealingRequest) -> dict[str, Any]:
    """What decides about the result; a rerun may lower the rate, and save more or less often."""
    described = asdict(request)
    for name in ("rate", "checkpoint_minutes"):
        del described[name]
    return {**described, "care": __version__, "torch": torch.__version__}


class _Job:
    """The parts of a run, each found in `work` again when it is there."""

    def __init__(
        self, request: HealingRequest, pair: Pair, accelerator: Accelerator, work: Path, say: Say, track: Track
    ) -> None:
        self._request, self._pair, self._accelerator = request, pair, accelerator
        self._work, self._say, self._track = work, say, track
        self._spent = 0.0
        self._refit: Mapping[str, Tensor] = {}

    def training(self, meter: Meter) -> Training:
        """Everything up to the first step, or to the one after the last checkpoint."""
        request = self._request
        teacher = self._teacher()
        windows = self._windows(teacher)
        self._refit = self._made("refit", lambda: self._refit_outputs(windows))
        student = self._student()
        if request.recompute:
            recompute_activations(student)
        distiller = Distiller(student, teacher, request.objective, cached=request.cuda_graph)
        if request.compile:
            distiller.fuse()
        return Training(
            self._accelerator, request, distiller, rates(student), windows, self._work, meter, spent=self._spent
        )

    def _teacher(self) -> Any:  # noqa: ANN401
        """Frozen; in bfloat16 where the run is and the checkpoint too, so that nothing is lost, else in fp32."""
        stated = str(load_config(self._pair.teacher).get("dtype")).removeprefix("torch.")
        dtype = torch.bfloat16 if stated == self._request.precision == "bfloat16" else torch.float32
        return load_model(self._pair.teacher, dtype=dtype, device=str(self._accelerator.device))

    def _student(self) -> Any:  # noqa: ANN401
        """The model in balanced factors, after the refit."""
        request = self._request
        return open_student(self._pair.student, request.trained, request.lora_rank, request.seed, self._refit)

    def _made(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that the main process makes once and all read; what that takes is part of the run's minutes."""
        path = self._work / f"{name}.safetensors"
        if self._accelerator.is_main_process and not path.exists():
            begun = time.monotonic()
            save_tensors(path, make(), {"format": "pt"})
            self._spent += time.monotonic() - begun
        self._accelerator.wait_for_everyone()
        return load_file(path)

    def _windows(self, teacher: Any) -> Windows:  # noqa: ANN401
        made = {name: tensor.long() for name, tensor in self._made("windows", lambda: self._cut(teacher)).items()}
        texts = self._texts()
        return Windows(tuple(made[f"train-{texts.index(name)}"] for name in self._request.data), made["held-out"])

    def _texts(self) -> list[str]:
        """A text that is named twice has two turns, but is read and held out from once."""
        return list(dict.fromkeys(self._request.data))

    def _cut(self, teacher: Any) -> dict[str, Tensor]:  # noqa: ANN401
        request, tokenizer = self._request, load_tokenizer(self._pair.teacher)
        texts = [
            self._written(teacher, tokenizer) if name == SELF else tokenize(tokenizer, load_text(name))
            for name in self._texts()
        ]
        windows = split_windows(texts, request.length, request.held_out)
        train = {f"train-{number}": windows_BT.int() for number, windows_BT in enumerate(windows.train)}
        return {**train, "held-out": windows.held_out_BT.int()}

    def _written(self, teacher: Any, tokenizer: Any) -> Tensor:  # noqa: ANN401
        """What the teacher writes: as much as is trained on, or for a share of the minutes."""
        request = self._request
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise BadInput("this tokenizer has no token that a text begins with; use --data FILE")
        wanted, deadline = WRITTEN_TOKENS, None
        if request.minutes is not None:
            deadline = time.monotonic() + 60 * WRITTEN_SHARE * request.minutes
        if request.tokens is not None:
            # What the refit reads is of this text too.
            share = request.tokens * request.data.count(SELF) // len(request.data)
            wanted = min(max(share, self._refit_tokens()), WRITTEN_TOKENS)
        # In fp32 on a CPU, where autocast would cast all weights for every token.
        with nullcontext() if teacher.device.type == "cpu" else self._accelerator.autocast():
            return write_text(
                teacher, start, request.length, wanted // request.length + 2 * request.held_out, request.seed,
                deadline=deadline, track=self._track,
            )  # fmt: skip

    def _refit_tokens(self) -> int:
        """0 where the conversion had a refit, teacher and student differ in shape, or it was switched off."""
        asked, pair = self._request.refit_tokens, self._pair
        if not pair.one_shape or (asked is None and was_refit(pair.student.directory)):
            return 0
        return Ridge.tokens if asked is None else asked

    def _refit_outputs(self, windows: Windows) -> Mapping[str, Tensor]:
        request, pair, wanted = self._request, self._pair, self._refit_tokens()
        if not wanted:
            return {}
        device = str(self._accelerator.device)
        student, teacher = (load_model(at, dtype=torch.float32, device=device) for at in (pair.student, pair.teacher))
        post_norm = architecture_for(load_config(pair.teacher)).post_norm
        windows_BT = windows.batch(0, max(wanted // request.length, 1), request.seed)
        return refit_outputs(student, teacher, windows_BT, post_norm=post_norm, track=self._track)

    def healed(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The healed model's tensors that differ from the student's, by their names in its checkpoint."""
        student = self._student()
        unknown = student.load_state_dict(trained, strict=False).unexpected_keys
        assert not unknown, unknown
        return checkpoint_tensors(student, self._request.trained)

    def report(self, training: Training, num_steps: int) -> dict[str, Any]:
        """Settings, and the curve of what was trained on and what was held out."""
        steps = [asdict(step) for step in training.journal.steps.values()]
        looks = [asdict(look) for look in training.journal.held_out.values()]
        described = run_description(self._request)
        described["model"], described["teacher"] = (Path(described[name]).name for name in ("model", "teacher"))
        described["data"] = [Path(name).name for name in self._request.data]
        return {
            "care_version": __version__,
            "request": {**described, "rate": self._request.rate},
            "processes": self._accelerator.num_processes,
            "sharded": self._accelerator.is_fsdp2,
            "refit": sorted(self._refit) != [],
            "num_steps": num_steps,
            "seconds": training.journal.seconds,
            "rounds": training.rounds(num_steps),
            "overfitting": overfitting(steps, looks),
            "held_out": looks,
            "steps": steps,
        }


def overfitting(steps: list[dict[str, Any]], looks: list[dict[str, Any]]) -> dict[str, float] | None:
    """Mean divergence over the last tenth of the steps, on held-out windows at the end, and at their best look."""
    if not steps:
        return None
    last = steps[-max(len(steps) // 10, 1) :]
    return {
        "train_kl": sum(step["kl"] for step in last) / len(last),
        "held_out_kl": looks[-1]["kl"],
        "best_held_out_kl": min(look["kl"] for look in looks),
    }


def was_refit(directory: Path) -> bool:
    """Whether the conversion's recipe had a refit."""
    report = directory / CONVERSION_NAME
    return report.is_file() and bool(read_json(report).get("recipe", {}).get("refit"))


def _write(
    writer: CheckpointWriter, shards: list[Path], healed: Mapping[str, Tensor], model: Path, report: Mapping[str, Any]
) -> None:
    """The model's own shards with what was healed in the place of what it had, in the same types."""
    for number, shard in enumerate(shards, start=1):
        tensors = load_file(shard)
        writer.write_shard(
            number,
            {name: check_finite(name, healed.get(name, old).to(old.dtype).cpu()) for name, old in tensors.items()},
        )
    with writing(writer.out_dir):
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX_NAME:
                shutil.copyfile(file, writer.result / file.name)
    writer.index()
    plot_curve(report, writer.result / CURVE_NAME)
    writer.write_text(CARD_NAME, _card(model, report))
    writer.write_json(HEALING_NAME, report)


def _card(model: Path, report: Mapping[str, Any]) -> str:
    """The card anew, from what the conversion said of itself; an older version said less, another tool nothing.

    A license that was written into the model's own card since then is kept.
    """
    provenance = model / CONVERSION_NAME
    conversion = read_json(provenance) if provenance.is_file() else dict[str, Any]()
    stated = stated_license(model) or conversion.get("source_license")
    again = (model / HEALING_NAME).is_file()
    config = read_json(model / "config.json")
    return model_card({**conversion, "source_license": stated}, config, report, healed_before=again)
