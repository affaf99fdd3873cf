"""Healing tiny models: measurable in seconds, the same format and shape, resumable, on one process and on two."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file
from test_resume import run_care
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import care.healing.run
from care.calibration import first_windows
from care.errors import BadInput, Diverged, Interrupted, InvalidRecipe
from care.evaluation import measure
from care.healing import HealingRequest, Objective, heal, training
from care.healing.data import split_windows, write_text
from care.healing.training import Training
from care.modeling.loading import Location, load_model, logits
from tiny import TINY, Case, TinyModels, build_checkpoint, random_text
from tolerances import TOLERANCES, assert_numbers

SOURCE = "llama-gqa"
NATIVE = Case(SOURCE, "care-mla", 0.5, "absorbed", "native")
DEEPSEEK = Case(SOURCE, "care-mla", 0.5, "absorbed", "deepseek")
REBUILD = Case(SOURCE, "palu", 0.5, "rebuild", "native")
PER_LAYER = Case(SOURCE, "best", 0.5, "absorbed", "native")


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here: --compile is not tested")


def request_for(tiny: TinyModels, case: Case = NATIVE, **options: Any) -> HealingRequest:
    """A run of a few steps; a random teacher knows nothing of texts, so that only the divergence can fall."""
    defaults = {"tokens": 1024, "length": 32, "batch": 4, "held_out": 3, "rate": 1e-2, "objective": Objective(ce=False)}
    asked: dict[str, Any] = defaults | options
    return HealingRequest(str(tiny.converted(case)), str(tiny.directory(case.source)), (str(tiny.text_file),), **asked)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for shard in sorted(directory.glob("*.safetensors")) for name, t in load_file(shard).items()}


def losses_of(report: dict[str, Any]) -> list[float]:
    """Of every step, and the last look at held-out windows."""
    return [step["loss"] for step in report["steps"]] + [look["kl"] for look in report["held_out"]]


RATES = {NATIVE: 3e-2, DEEPSEEK: 3e-2, REBUILD: 3e-2, PER_LAYER: 5e-3}
KEPT = {NATIVE: 0.85, DEEPSEEK: 0.85, REBUILD: 0.85, PER_LAYER: 0.96}
"""What is nearer to its source is moved less, and has less to gain: at most this share of the divergence is left."""


@pytest.mark.parametrize("case", RATES, ids=str)
def test_a_tiny_model_heals(tiny: TinyModels, tmp_path: Path, case: Case) -> None:
    """On text that was not trained on, and the result is what it was but for the values of attention."""
    out, model = tmp_path / "healed", tiny.converted(case)
    report = heal(request_for(tiny, case, tokens=8192, batch=8, together=8, rate=RATES[case]), out)
    source = tiny.source(case.source)
    windows_BT = first_windows(source.tokens(random_text(600, seed=9)), 32, 12)
    loaded = {name: load_model(Location(at), dtype=torch.float32) for name, at in (("model", model), ("healed", out))}
    runs = {name: lambda x, m=m: logits(m, x) for name, m in {"source": source.model, **loaded}.items()}
    quality = measure(runs, windows_BT, reference="source")
    kl = {name: found.kl for name, found in quality.items()}
    assert kl["healed"] < KEPT[case] * kl["model"]  # type: ignore[operator]
    old, new = tensors_of(model), tensors_of(out)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if ".self_attn." in name and "layernorm" not in name} | (
        changed & {name for name in old if "kv_a_layernorm" in name}
    )
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()} | {"healing.json", "healing.png"}
    assert json.loads((out / "healing.json").read_text())["held_out"] == report["held_out"]
    assert report["overfitting"]["held_out_kl"] == report["held_out"][-1]["kl"] < report["held_out"][0]["kl"]
    assert (out / "healing.png").read_bytes().startswith(b"\x89PNG")


def test_outputs_are_refit_first_where_conversion_did_not(tiny: TinyModels, tmp_path: Path) -> None:
    """Without a step of training: what is left is the refit, by default only of conversions that had none."""
    kl = {}
    for name, tokens in (("refit", None), ("as it is", 0)):
        report = heal(request_for(tiny, tokens=0, refit_tokens=tokens), tmp_path / name)
        assert (report["refit"], report["num_steps"]) == (tokens is None, 0)
        kl[name] = report["held_out"][0]["kl"]
    assert kl["refit"] < 0.95 * kl["as it is"]
    assert not heal(request_for(tiny, PER_LAYER, tokens=0), tmp_path / "best")["refit"]


def test_the_refit_knows_the_scaled_residual_stream(tiny: TinyModels, tmp_path: Path) -> None:
    """A source whose eps is not 1e-6 has a scaled stream in deepseek: the refit is that of its native twin."""
    reports = [heal(request_for(tiny, case, tokens=0), tmp_path / str(case)) for case in (NATIVE, DEEPSEEK)]
    assert_numbers(*(report["held_out"][0]["kl"] for report in reports), kind="fp32 refit")


def test_hidden_states_are_compared_at_their_scale(tiny: TinyModels, tmp_path: Path) -> None:
    """The first loss of the two formats is one, as they are one function."""
    asked = {"tokens": 128, "refit_tokens": 0, "objective": Objective(hidden=10.0)}
    steps = [heal(request_for(tiny, case, **asked), tmp_path / str(case))["steps"] for case in (NATIVE, DEEPSEEK)]
    assert_numbers(*([step["loss"] for step in found] for found in steps), kind="fp32 refit")
    assert steps[0][0]["loss"] > steps[0][0]["ce"] + steps[0][0]["kl"] + 0.01


def test_comparing_hidden_states_brings_the_student_nearer(tiny: TinyModels, tmp_path: Path) -> None:
    """In the same few steps, to the teacher's logits on what was held out."""
    kl = {}
    for hidden in (0.0, 10.0):
        objective = Objective(ce=False, hidden=hidden)
        asked = request_for(tiny, PER_LAYER, tokens=4096, rate=RATES[PER_LAYER], objective=objective)
        kl[hidden] = heal(asked, tmp_path / str(hidden))["held_out"][-1]["kl"]
    assert kl[10.0] < 0.98 * kl[0.0]


@pytest.mark.parametrize("options", [{"recompute": True}, {"together": 1}], ids=str)
def test_what_saves_memory_changes_no_losses(tiny: TinyModels, tmp_path: Path, options: dict[str, Any]) -> None:
    asked = request_for(tiny, together=4, objective=Objective(ce=False, hidden=1.0))
    plain = heal(asked, tmp_path / "plain")
    other = heal(replace(asked, **options), tmp_path / "other")
    assert_numbers(losses_of(other), losses_of(plain), "fp32 nats")


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own imports
def test_fused_operations_change_no_losses(tiny: TinyModels, tmp_path: Path) -> None:
    asked = request_for(tiny, objective=Objective(ce=False, hidden=1.0))
    plain = heal(asked, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    fused = heal(replace(asked, compile=True), tmp_path / "fused")
    assert counters["stats"]["unique_graphs"] > 1
    assert_numbers(losses_of(fused), losses_of(plain), "fp32 nats")


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own imports
def test_fusing_without_a_compiler(tiny: TinyModels, tmp_path: Path) -> None:
    torch._dynamo.reset()
    without = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        inductor_config.patch(without),
        pytest.raises(
            BadInput, match=r"--compile: torch cannot compile here .*No working C\+\+ compiler.*leave it out"
        ),
    ):
        heal(request_for(tiny, compile=True), tmp_path / "healed")


@pytest.mark.parametrize("case", [NATIVE, DEEPSEEK], ids=str)
@pytest.mark.parametrize("trained", ["attention", "all", "lora"])
def test_recorded_passes_change_no_losses(tiny: TinyModels, tmp_path: Path, case: Case, trained: str) -> None:
    """Although a step is in two parts, which add up."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: --cuda-graph is not tested")
    asked = request_for(tiny, case, together=2, trained=trained, objective=Objective(hidden=1.0))
    plain = heal(asked, tmp_path / "plain", device="cuda")
    recorded = heal(replace(asked, cuda_graph=True), tmp_path / "recorded", device="cuda")
    assert_numbers(losses_of(recorded), losses_of(plain), "fp32 nats")


def test_recording_without_a_gpu(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--cuda-graph needs one process with --device cuda; leave it out"):
        heal(request_for(tiny, cuda_graph=True), tmp_path / "healed")


def test_a_text_with_two_shares_is_read_once(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And held out from once; what the teacher writes is as much as both of its shares."""
    cut, written = [], []

    def split(texts: Any, *rest: Any) -> Any:
        cut.append(split_windows(texts, *rest))
        return cut[-1]

    def write(*asked: Any, **options: Any) -> Any:
        written.append(asked[3])
        return write_text(*asked, **options)

    monkeypatch.setattr(care.healing.run, "split_windows", split)
    monkeypatch.setattr(care.healing.run, "write_text", write)
    asked = request_for(tiny, tokens=3072, refit_tokens=0)
    report = heal(replace(asked, data=("self", *asked.data, "self")), tmp_path / "healed")
    assert written == [2048 // 32 + 2 * 3]
    assert [len(windows.train) for windows in cut] == [2]
    assert report["rounds"]["self"] == 2 * 32 / len(cut[0].train[0])
    assert report["rounds"][tiny.text_file.name] == 32 / len(cut[0].train[1])


def test_bfloat16_heals_too(tiny: TinyModels, tmp_path: Path) -> None:
    report = heal(request_for(tiny, tokens=4096, precision="bfloat16", rate=3e-2), tmp_path / "healed")
    looks = report["held_out"]
    assert looks[-1]["kl"] < looks[0]["kl"]
    assert tensors_of(tmp_path / "healed")["model.norm.weight"].dtype == torch.float32


def test_all_weights(tiny: TinyModels, tmp_path: Path) -> None:
    report = heal(request_for(tiny, trained="all"), tmp_path / "healed")
    old, new = tensors_of(tiny.converted(NATIVE)), tensors_of(tmp_path / "healed")
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)
    assert report["request"]["trained"] == "all"


@pytest.mark.filterwarnings("ignore")  # of peft's own imports
def test_low_rank_additions_are_merged(tiny: TinyModels, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="make setup installs it")
    report = heal(request_for(tiny, trained="lora", lora_rank=4, tokens=4096, rate=5e-2), tmp_path / "healed")
    looks = report["held_out"]
    assert looks[-1]["kl"] < 0.98 * looks[0]["kl"]
    assert tensors_of(tmp_path / "healed").keys() == tensors_of(tiny.converted(NATIVE)).keys()
    after = heal(
        replace(request_for(tiny, tokens=0, refit_tokens=0), model=str(tmp_path / "healed")), tmp_path / "twice"
    )
    assert_numbers(after["held_out"][0]["kl"], looks[-1]["kl"], "fp32 nats")


def test_the_teacher_can_write_the_text(tiny: TinyModels, tmp_path: Path) -> None:
    asked = replace(request_for(tiny, tokens=4096, rate=3e-2), data=("self",))
    report = heal(asked, tmp_path / "healed")
    assert report["request"]["data"] == ["self"]
    # It writes what the refit reads, 512 windows, the three that are held out, and three more.
    assert report["rounds"] == {"self": 128 / 515}
    assert report["held_out"][-1]["kl"] < report["held_out"][0]["kl"]


def test_minutes_are_minutes(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes ten seconds with every look at it; the rate falls with it."""
    ticks = iter(range(0, 100_000, 10))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(ticks)))
    report = heal(request_for(tiny, tokens=None, minutes=10.0), tmp_path / "healed")
    assert 10 < report["num_steps"] < 40
    assert 540 < report["seconds"] <= 600
    rates = [step["rate"] for step in report["steps"]]
    assert max(rates) > 5 * rates[-1]


def _die_at_step(number: int) -> None:
    """Kill this process when it has made a step that is not in a checkpoint yet."""
    real = Training._write  # pyright: ignore[reportPrivateUsage]

    def write(self: Training, step: int, *rest: Any) -> None:
        real(self, step, *rest)
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Training._write = write  # type: ignore[method-assign]


@pytest.mark.parametrize("length", [("--tokens", "1280"), ("--minutes", "0.2")], ids=str)
def test_killed_it_goes_on_to_the_same_losses(tiny: TinyModels, tmp_path: Path, length: tuple[str, str]) -> None:
    """By the clock too: steps that are made again are made at the rate that they had."""
    arguments = (
        "heal", tiny.converted(NATIVE), tmp_path / "out", "--teacher", tiny.directory(SOURCE), "--data", tiny.text_file,
        *length, "--length", 32, "--batch", 4, "--held-out", 2, "--rate", 0.01, "--kl-only",
    )  # fmt: skip

    def die(number: int, every: float) -> Any:
        def prepare() -> None:
            _die_at_step(number)
            real = Training._save  # pyright: ignore[reportPrivateUsage]
            # A checkpoint after every third step, without waiting for minutes to pass.
            Training._save = lambda self, step: real(self, step) if step % 3 == 0 or step > every else None  # type: ignore

        return prepare

    code, _ = run_care(tmp_path, *arguments, "--checkpoint-minutes", 0, prepare=die(7, 1e9))
    assert code == -signal.SIGKILL
    work = tmp_path / "out.partial" / "work"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-00000006"]
    lines = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines() if line]
    first = {line["step"]: line["loss"] for line in lines if "fraction" in line}
    code, said = run_care(tmp_path, *arguments, "--checkpoint-minutes", 0)
    assert (code, "continuing from" in said) == (0, True), said
    report = json.loads((tmp_path / "out" / "healing.json").read_text())
    losses = {step["step"]: step["loss"] for step in report["steps"]}
    assert first.items() <= losses.items()
    assert not (tmp_path / "out.partial").exists()
    if length[0] == "--tokens":
        whole = heal(request_for(tiny, tokens=1280, held_out=2), tmp_path / "whole")
        assert losses_of(report) == losses_of(whole)
        old, new = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
        assert all(torch.equal(old[name], new[name]) for name in old)


def stopped_and_gone_on(asked: HealingRequest, out: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> list[float]:
    """Losses of a run that is interrupted in its fifth step and goes on from a checkpoint after the fourth."""
    real = Training._write  # pyright: ignore[reportPrivateUsage]

    def write(self: Training, step: int, *rest: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        real(self, step, *rest)

    monkeypatch.setattr(Training, "_write", write)
    with pytest.raises(Interrupted):
        heal(asked, out, device=device)
    monkeypatch.undo()
    torch._dynamo.reset()
    return losses_of(heal(asked, out, device=device))


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own imports
def test_fused_it_goes_on_to_the_same_losses(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although what goes on sees shapes in another order than what it goes on from."""
    asked = request_for(tiny, compile=True, checkpoint_minutes=0.0)
    torch._dynamo.reset()
    whole = heal(asked, tmp_path / "whole")
    assert stopped_and_gone_on(asked, tmp_path / "out", monkeypatch, "cpu") == losses_of(whole)


def test_recorded_it_goes_on_to_the_same_losses(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although rates are tensors, which a checkpoint holds too, and moments are put where the update finds them."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: --cuda-graph is not tested")
    asked = request_for(tiny, cuda_graph=True, checkpoint_minutes=0.0)
    whole = heal(asked, tmp_path / "whole", device="cuda")
    again = stopped_and_gone_on(asked, tmp_path / "out", monkeypatch, "cuda")
    assert_numbers(again, losses_of(whole), "fp32 nats")


def test_a_loss_that_is_no_number_stops_the_run(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good checkpoint is kept, and a smaller rate goes on from it."""
    real = Training._step  # pyright: ignore[reportPrivateUsage]

    def step(self: Training, number: int, fraction: float) -> Any:
        if number == 3:
            with torch.no_grad():
                self._parameters[0].fill_(float("nan"))  # pyright: ignore[reportPrivateUsage]
        return real(self, number, fraction)

    monkeypatch.setattr(Training, "_step", step)
    asked = request_for(tiny, checkpoint_minutes=0.0)
    with pytest.raises(Diverged, match=r"the loss is nan.* at step 3.*--rate below 0.01 goes on"):
        heal(asked, tmp_path / "out")
    assert (tmp_path / "out.partial" / "work" / "checkpoint-00000003").is_dir()
    monkeypatch.undo()
    report = heal(replace(asked, rate=1e-3), tmp_path / "out")
    assert report["steps"][2]["rate"] > report["steps"][3]["rate"]
    assert report["num_steps"] == 8


def gguf_file(directory: Path) -> Path:
    """Looks like one."""
    path = directory / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_other_tokenizers_and_smaller_teachers_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    small = build_checkpoint(tmp_path / "small", {**TINY[SOURCE], "num_hidden_layers": 2})
    with pytest.raises(InvalidRecipe, match=r"small \(2 layers of width 32\) is smaller than"):
        heal(replace(request_for(tiny), teacher=str(small)), tmp_path / "out")
    other = build_checkpoint(tmp_path / "other", TINY[SOURCE])
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidRecipe, match="has another tokenizer"):
        heal(replace(request_for(tiny), teacher=str(other)), tmp_path / "out")
    with pytest.raises(BadInput, match="is a GGUF file; heal the directory"):
        heal(replace(request_for(tiny), model=str(gguf_file(tmp_path))), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_larger_teacher_is_taken(tiny: TinyModels, tmp_path: Path) -> None:
    """Of another depth: distilled from, but no hidden states are compared."""
    large = build_checkpoint(tmp_path / "large", {**TINY[SOURCE], "num_hidden_layers": 4})
    report = heal(replace(request_for(tiny), teacher=str(large)), tmp_path / "out")
    assert (report["refit"], report["num_steps"]) == (False, 8)
    with pytest.raises(
        InvalidRecipe, match="--hidden compares layer by layer and needs a teacher of the model's own shape"
    ):
        heal(replace(request_for(tiny), teacher=str(large), objective=Objective(hidden=1.0)), tmp_path / "compared")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Sharding(Accelerator):
    """Accelerate shards on GPUs only by its own choice, though its code and torch's do it on CPUs as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )


def _one_of_two(rank: int, port: int, sharded: bool, asked: HealingRequest, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    if sharded:
        care.healing.run.Accelerator = _Sharding  # type: ignore[misc]
    torch.set_num_threads(1)
    heal(asked, out)


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "sharded"])
def test_two_processes_are_one(tiny: TinyModels, tmp_path: Path, sharded: bool) -> None:
    """Over gloo, each with a copy of the model, and each with a half of every weight (FSDP2)."""
    objective, port = Objective(ce=False, hidden=1.0), _free_port()
    asked = request_for(tiny, refit_tokens=512, checkpoint_minutes=0.0, objective=objective)
    spawn = multiprocessing.get_context("spawn").Process
    both = [spawn(target=_one_of_two, args=(rank, port, sharded, asked, tmp_path / "two")) for rank in range(2)]
    for process in both:
        process.start()
    one = heal(asked, tmp_path / "one")
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    two = json.loads((tmp_path / "two" / "healing.json").read_text())
    assert (two["processes"], two["sharded"]) == (2, sharded)
    assert_numbers(losses_of(two), losses_of(one), "fp32 nats")
    old, new = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    row = TOLERANCES["fp32 gradients"]
    assert all(torch.allclose(old[name], new[name], atol=row.absolute, rtol=row.relative) for name in old)
