"""The command line: every command's JSON, and every bad input as one line, exit code 2, nothing left behind."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import care.cli
import care.conversion
from care.commands.console import verbatim
from care.recipe import recipe_names
from tiny import NUM_WINDOWS, WINDOW, Case, TinyModels
from tolerances import assert_numbers

SAMPLES = ("--samples", str(NUM_WINDOWS), "--length", str(WINDOW), "--context", str(2 * WINDOW))
EXIT_ERROR = 2
Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """What `--json -` printed."""
        return json.loads(self.stdout)


@pytest.fixture
def care_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `care ARGUMENTS` in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["care", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            care.cli.main()
        said = capsys.readouterr()
        return Outcome(int(left.value.code or 0), said.out, said.err)

    return run


Run = Callable[..., Outcome]


def assert_refused(outcome: Outcome, words: str, out: Path, *, worked: bool = False) -> None:
    """One line of error, and no trace of the output; progress may come before it when work was `worked`."""
    lines = [line for line in outcome.stderr.splitlines() if line]
    assert outcome.code == EXIT_ERROR, outcome
    assert lines[-1].startswith("care: error: "), outcome.stderr
    assert words in lines[-1]
    assert all(": done in " in line for line in lines[:-1]), outcome.stderr
    assert worked or len(lines) == 1
    assert outcome.stdout == ""
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def assert_stopped(outcome: Outcome, words: str, out: Path) -> None:
    """One line of error; no output, but what it can be continued from."""
    assert outcome.code == EXIT_ERROR, outcome
    assert outcome.stderr.splitlines()[-1].startswith("care: error: ")
    assert words in outcome.stderr.splitlines()[-1]
    assert not out.exists()
    assert {p.name for p in out.with_name(out.name + ".partial").iterdir()} == {"result", "run.json", "work"}


def damaged(tiny: TinyModels, to: Path, edit: Edit) -> Path:
    """A copy of the GQA model with one thing wrong."""
    copy = shutil.copytree(tiny.directory("llama-gqa"), to / "source")
    edit(copy)
    return copy


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Edit:
    """Change or remove one tensor."""

    def edit(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        changed = change(tensors.pop(name).clone())
        save_file(tensors | ({} if changed is None else {name: changed}), file, {"format": "pt"})

    return edit


def with_config(**changes: object) -> Edit:
    """Change keys of config.json; None removes one."""

    def edit(directory: Path) -> None:
        file = directory / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def truncate(directory: Path) -> None:
    """Cut the weights short, as an interrupted download does."""
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_pickles(directory: Path) -> None:
    """Weights as pickles, beside a config that is right."""
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def infinite(weight: torch.Tensor) -> torch.Tensor:
    """Finite weights that overflow as soon as they meet an activation."""
    return torch.full_like(weight, torch.finfo(weight.dtype).max)


def first_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put a value into the first place of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


KEY = "model.layers.1.self_attn.k_proj.weight"
MLP = "model.layers.1.mlp.down_proj.weight"
BAD_SOURCES: dict[str, tuple[Edit, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "is not a JSON object"),
    "no model_type": (with_config(model_type=None), "no model_type"),
    "unsupported architecture": (with_config(model_type="mamba"), "'mamba' is not supported; known: gemma2, "),
    "no layers": (with_config(num_hidden_layers=None), "num_hidden_layers"),
    "biases promised": (with_config(attention_bias=True), "model.layers.0.self_attn.q_proj.bias is missing"),
    "fp8": (with_config(quantization_config={"quant_method": "fp8"}), "is quantized (fp8)"),
    "gptq": (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized (gptq)"),
    "awq": (with_config(quantization_config={"quant_method": "awq", "bits": 4}), "is quantized (awq)"),
    "layer kinds missing": (with_config(model_type="gemma2", layer_types=["full_attention"]), "fewer layers than"),
    "dynamic rope": (
        with_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rope type 'yarn'",
    ),
    "too many layers promised": (with_config(num_hidden_layers=4), "model.layers.3.self_attn.q_proj.weight is missing"),
    "too few layers promised": (with_config(num_hidden_layers=2), "model.layers.2."),
    "heads that disagree": (with_config(num_key_value_heads=4), "has shape (16, 32), config.json says (32, 32)"),
    "hidden size that disagrees": (with_config(hidden_size=64, head_dim=8), "has shape (32, 32)"),
    "tensor missing": (with_tensor(KEY, lambda _: None), f"tensor {KEY} is missing"),
    "truncated": (truncate, "truncated or not a safetensors file"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_text("hello"), "not a safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no safetensors weights"),
    "pickles only": (only_pickles, "only pickled weights"),
    "NaN in an attention weight": (with_tensor(KEY, first_value(float("nan"))), f"tensor {KEY} holds NaN or Inf"),
    "Inf in an attention weight": (with_tensor(KEY, first_value(float("inf"))), f"tensor {KEY} holds NaN or Inf"),
    "NaN in another weight": (with_tensor(MLP, first_value(float("nan"))), f"tensor {MLP} holds NaN or Inf"),
    "quantized": (with_tensor("model.layers.0.self_attn.q_proj.weight", lambda t: t.to(torch.int8)), "int8"),
}
"""What is wrong with a source, and what the error says; found without running the model."""


@pytest.mark.parametrize("name", list(BAD_SOURCES))
def test_bad_sources(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    edit, words = BAD_SOURCES[name]
    source, out = damaged(tiny, tmp_path, edit), tmp_path / "out"
    assert_refused(care_main("convert", source, out, "--recipe", "palu"), words, out, worked="weight" in name)


@pytest.mark.parametrize("name", [name for name in BAD_SOURCES if "NaN" not in name and "Inf" not in name])
def test_bad_sources_are_refused_before_calibration(
    tiny: TinyModels, care_main: Run, tmp_path: Path, name: str, text_file: Path
) -> None:
    edit, words = BAD_SOURCES[name]
    source, out = damaged(tiny, tmp_path, edit), tmp_path / "out"
    outcome = care_main("convert", source, out, "--recipe", "care-mla", "--calibration", text_file, *SAMPLES)
    assert_refused(outcome, words, out)


MISFITS: dict[str, tuple[Edit, str]] = {
    "vocabulary that disagrees": (with_config(vocab_size=300), "embed_tokens"),
    "MLP that disagrees": (with_config(intermediate_size=64), "mlp"),
    "MLP tensor missing": (with_tensor(MLP, lambda _: None), MLP),
}


@pytest.mark.parametrize("recipe", ["palu", "care-u"])
@pytest.mark.parametrize("name", list(MISFITS))
def test_misfits_outside_attention(
    tiny: TinyModels, care_main: Run, tmp_path: Path, name: str, recipe: str, text_file: Path
) -> None:
    """Config and tensors that disagree where conversion only copies."""
    edit, words = MISFITS[name]
    source, out = damaged(tiny, tmp_path, edit), tmp_path / "out"
    outcome = care_main("convert", source, out, "--recipe", recipe, "--calibration", text_file, *SAMPLES)
    assert_refused(outcome, words, out, worked=True)


@pytest.mark.parametrize("command", ["convert", "calibrate", "inspect", "eval", "compare", "generate"])
@pytest.mark.parametrize("what", ["no such path", "not a model", "hub name", "not a GGUF file"])
def test_paths_that_are_no_model(care_main: Run, tmp_path: Path, command: str, what: str) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.gguf").write_bytes(b"nothing")
    model, words = {
        "no such path": (tmp_path / "absent" / "model", "no such path"),
        "not a model": (tmp_path / "empty", "holds no config.json"),
        "hub name": ("someone/some-model", "someone/some-model is neither a local path nor"),
        "not a GGUF file": (tmp_path / "fake.gguf", "fake.gguf"),
    }[what]
    more = {"convert": [out], "calibrate": [out], "generate": ["hello"]}.get(command, [])
    assert_refused(care_main(command, model, *more), words, out)


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "budget 0": (["--kv-budget", "0"], "kv budget 0.0 must lie in (0, 1]"),
    "budget over 1": (["--kv-budget", "1.5"], "kv budget 1.5 must lie in (0, 1]"),
    "negative budget": (["--kv-budget", "-0.5"], "must lie in (0, 1]"),
    "budget that is no number": (["--kv-budget", "nan"], "must lie in (0, 1]"),
    "budget too small": (["--recipe", "care-mla", "--kv-budget", "0.25"], "raise --kv-budget above 0.281"),
    "budget of less than one value": (["--recipe", "palu", "--kv-budget", "0.01"], "leaves 0.3 values"),
    "unknown recipe": (["--recipe", "care-u2"], "did you mean 'care-u'?"),
    "missing recipe file": (["--recipe", "absent.toml"], "cannot read recipe absent.toml"),
    "missing text": (["--calibration", "absent.txt"], "no such text file: absent.txt"),
    "context of nothing": (["--context", "0"], "need at least 1 window of 2 tokens"),
    "format that cannot hold it": (["--mode", "rebuild", "--format", "deepseek"], "cannot rebuild keys"),
    "format without its own rope table": (["--kv-budget", "1.0", "--format", "deepseek"], "--format native"),
    "dtype too small": (["--format", "deepseek", "--recipe", "care-mla", "--dtype", "float16"], "float16"),
}


@pytest.mark.parametrize("name", list(BAD_OPTIONS))
def test_bad_options(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    options, words = BAD_OPTIONS[name]
    out = tmp_path / "out"
    assert_refused(care_main("convert", tiny.directory("llama-gqa"), out, *options), words, out)


BAD_RECIPES = {
    "unknown key": ('[factorization]\nmethod = "whitened"\nshrinkag = 0.1\n', "did you mean 'shrinkage'?"),
    "unknown section": ('[factorisation]\nmethod = "svd"\n', "did you mean 'factorization'?"),
    "unknown method": ('[factorization]\nmethod = "whiten"\n', "did you mean 'whitened'?"),
    "not TOML": ("[factorization\n", "is not TOML"),
    "wrong type": ('[factorization]\nmethod = "whitened"\nshrinkage = "much"\n', "factorization.shrinkage is 'much'"),
    "out of range": ('[factorization]\nmethod = "whitened"\nshrinkage = 2.0\n', "must lie in [0, 1]"),
}


@pytest.mark.parametrize("name", list(BAD_RECIPES))
def test_bad_recipe_files(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    content, words = BAD_RECIPES[name]
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(content)
    assert_refused(care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", recipe), words, out)


def test_text_too_short(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    text, out = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("too short")
    source = tiny.directory("llama-gqa")
    words = "short.txt has 9 tokens, less than one window of 256"
    assert_refused(care_main("convert", source, out, "--calibration", text), words, out)
    assert_refused(care_main("calibrate", source, out, "--text", text), words, out)
    words = "the text has 9 tokens, less than one window of 1024"
    assert_refused(care_main("eval", source, "--text", text), words, out)
    words = "short.txt has 9 tokens, less than one window of 1024"
    assert_refused(care_main("compare", source, "--text", text, "--recipes", "palu"), words, out)


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_infinite_activations(tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path, command: str) -> None:
    """Every weight is finite, their products are not."""
    source = damaged(tiny, tmp_path, with_tensor("model.layers.1.input_layernorm.weight", infinite))
    out = tmp_path / "out"
    option = "--calibration" if command == "convert" else "--text"
    outcome = care_main(command, source, out, option, text_file, *SAMPLES)
    assert_refused(outcome, "activations of layer 1 are NaN or Inf", out, worked=True)


def test_infinite_logits(tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path) -> None:
    source = damaged(tiny, tmp_path, with_tensor("model.norm.weight", infinite))
    outcome = care_main("eval", source, "--text", text_file, "--window", 32, "--windows", 1)
    assert_refused(outcome, "gives NaN or infinite logits", tmp_path / "out", worked=True)


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_output_not_empty(tiny: TinyModels, care_main: Run, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    outcome = care_main(command, tiny.directory("llama-gqa"), out)
    assert outcome.code == EXIT_ERROR
    assert outcome.stderr.startswith("care: error: output ")
    assert "is not empty" in outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "precious"


def test_output_that_is_a_file(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    outcome = care_main("convert", tiny.directory("llama-gqa"), tmp_path / "out", "--recipe", "palu")
    assert outcome.code == EXIT_ERROR
    assert (tmp_path / "out").read_text() == "precious"


def test_output_under_a_file(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" / "out"
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu")
    assert_refused(outcome, "cannot write", out, worked=True)


def test_an_empty_output_directory_is_used(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert care_main("convert", tiny.directory("llama-gqa"), tmp_path / "out", "--recipe", "palu").code == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_working_directory_can_be_the_output(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert care_main("convert", tiny.directory("llama-gqa"), ".", "--recipe", "palu").code == 0
    assert (tmp_path / "here" / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("command", ["convert", "calibrate", "eval", "generate"])
def test_a_device_that_is_not_there(
    tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path, command: str
) -> None:
    out = tmp_path / "out"
    more = {
        "convert": [out, "--recipe", "care-u", "--calibration", text_file, *SAMPLES],
        "calibrate": [out, "--text", text_file, *SAMPLES],
        "eval": ["--text", text_file, "--window", 32, "--windows", 1],
        "generate": ["hello"],
    }[command]
    outcome = care_main(command, tiny.directory("llama-gqa"), *more, "--device", "warp:9")
    assert_refused(outcome, "warp:9", out)


def test_an_empty_prompt(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    for prompts in ([""], ["abc", ""]):
        assert_refused(care_main("generate", tiny.directory("llama-gqa"), *prompts), "prompt", tmp_path / "out")


def test_disk_known_to_be_too_small(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    out = tmp_path / "out"
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu")
    assert_refused(outcome, "0.0 GB free, the output needs", out)


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_disk_full_while_tensors_are_written(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path, command: str
) -> None:
    """The second file does not fit; what fits is kept, and the same command goes on from it."""
    saved: list[Path] = []

    def save(tensors: Any, file: Path, metadata: Any) -> None:
        if len(saved) == 1:
            saved.append(file)
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr("care.output.save_file", save)
    out = tmp_path / "out"
    option = "--calibration" if command == "convert" else "--text"
    arguments = (command, tiny.directory("llama-gqa"), out, option, text_file, *SAMPLES)
    assert_stopped(care_main(*arguments), "the disk is full", out)
    assert len(saved) == 2
    again = care_main(*arguments)
    assert (again.code, "continuing from" in again.stderr) == (0, True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_disk_full_while_the_tokenizer_is_copied(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", write)
    out = tmp_path / "out"
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu")
    assert_stopped(outcome, "cannot write", out)


def test_interrupt_in_the_middle(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first layer is on disk; the same command goes on with the second."""
    real, done = care.conversion.factorize, []
    out = tmp_path / "out"

    def factorize(*arguments: Any) -> Any:
        if done:
            assert list((tmp_path / "out.partial" / "result").glob("*.safetensors"))
            raise KeyboardInterrupt
        done.append(True)
        return real(*arguments)

    monkeypatch.setattr(care.conversion, "factorize", factorize)
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu")
    assert_stopped(outcome, "interrupted; the same command continues from", out)
    monkeypatch.setattr(care.conversion, "factorize", lambda *arguments: done.append(True) or real(*arguments))
    assert care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu").code == 0
    assert len(done) == 3


def test_the_remains_of_a_killed_run_are_replaced(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00009-of-00009.safetensors").write_text("half a file")
    assert care_main("convert", tiny.directory("llama-gqa"), tmp_path / "out", "--recipe", "palu").code == 0
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "model-00009-of-00009.safetensors").exists()


def test_the_process_itself_exits_with_2(tmp_path: Path) -> None:
    """Through `python -m care`, as a shell sees it."""
    done = subprocess.run(
        [sys.executable, "-m", "care", "convert", str(tmp_path / "absent"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "no such path", tmp_path / "out")


def test_inspect(tiny: TinyModels, care_main: Run) -> None:
    facts = care_main("inspect", tiny.directory("llama-gqa"), "--json", "-").json
    expected = {
        "model_type": "llama", "layers": 3, "hidden_size": 32, "query_heads": 4, "key_value_heads": 2, "head_dim": 8,
        "cache_width_per_layer": 32, "formats": "deepseek: yes, native: yes",
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    assert facts["parameters"] == sum(p.numel() for p in tiny.source_model("llama-gqa").parameters())
    half = next(row for row in facts["cache"] if row["kept"] == 0.5)
    assert (half["values_per_token"], half["bytes_per_token"]) == (48, 96)
    assert half["gib_at_32k"] == 96 * 32768 / 2**30
    refused = care_main("inspect", tiny.directory("mistral-window"), "--json", "-").json["formats"]
    assert "deepseek: no (format deepseek has no sliding window" in refused


LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def test_a_config_alone_is_planned(care_main: Run, tmp_path: Path) -> None:
    """Of a 70B model: its parameters, its cache on several GPUs, and what converting takes; nothing is written."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(LLAMA_70B))
    facts = care_main("inspect", source, "--json", "-").json
    assert facts["parameters"] == 70553706496
    own, half = facts["cache"][0], next(row for row in facts["cache"] if row["kept"] == 0.5)
    assert (own["values_per_token"], half["values_per_token"]) == (80 * 2048, 80 * 1024)
    assert own["gib_at_32k_per_gpu"]["8"] == own["gib_at_32k"] / 8
    assert half["gib_at_32k_per_gpu"]["8"] == half["gib_at_32k"] == own["gib_at_32k"] / 2
    plan = care_main("convert", source, out, "--dry-run", "--kv-budget", "0.25", "--json", "-").json
    assert [row["values_per_token"] for row in plan["cache"]] == [80 * 2048, 80 * 512]
    assert plan["effort"]["disk_bytes"] > 2 * 70553706496
    assert 855654400 * 4 < plan["effort"]["memory_bytes"] < 16e9
    assert plan["effort"]["seconds"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    shown = care_main("convert", source, out, "--dry-run").stdout
    assert "TP 8" in shown
    assert "peak memory" in shown
    refused = care_main("convert", source, out, "--dry-run", "--kv-budget", "1.0", "--format", "deepseek")
    assert_refused(refused, "--format native", out)


def test_convert_inspect_eval_generate(tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path) -> None:
    """One model through every command, numbers against each other."""
    source, stats, out = tiny.directory("llama-gqa"), tmp_path / "stats", tmp_path / "out"
    info = care_main("calibrate", source, stats, "--text", text_file, *SAMPLES, "--json", "-").json
    assert (info["num_windows"], info["window"], info["num_layers"]) == (NUM_WINDOWS, WINDOW, 3)
    report = care_main("convert", source, out, "--recipe", "care-u", "--calibration", stats, "--json", "-").json
    assert report["recipe"]["name"] == "care-u"
    assert report["mean_cache_width"] == 16
    inspected = care_main("inspect", out, "--json", "-").json
    assert inspected.pop("engines")["transformers"] == "no (call care.register() first)"
    assert inspected == report
    assert json.loads((out / "conversion.json").read_text()) == report

    measured = care_main(
        "eval", out, "--against", source, "--text", text_file, "--window", 32, "--windows", 4, "--json", "-"
    ).json["models"]
    assert measured[str(source)]["kl"] == 0
    assert measured[str(out)]["kl"] > 0
    assert measured[str(out)]["predictions"] == 4 * 31
    assert measured[str(out)]["cache_bytes_per_token"] * 2 == measured[str(source)]["cache_bytes_per_token"]

    said = care_main("generate", out, "abc", "--max-new-tokens", 5, "--json", "-").json
    (made,) = said["generations"]
    assert made["prompt"] == "abc"
    shown = verbatim(made["texts"][str(out)]).plain.strip()
    assert care_main("generate", out, "abc", "--max-new-tokens", 5).stdout.strip() == shown


def test_calibration_by_text_is_calibration_by_directory(
    tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path
) -> None:
    source = tiny.directory("llama-gqa")
    care_main("calibrate", source, tmp_path / "stats", "--text", text_file, *SAMPLES)
    care_main("convert", source, tmp_path / "a", "--recipe", "care-mla", "--calibration", text_file, *SAMPLES)
    care_main("convert", source, tmp_path / "b", "--recipe", "care-mla", "--calibration", tmp_path / "stats")
    # These two say what was calibrated, which in a directory is more than this recipe asks for.
    told = ("conversion.json", "README.md")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name not in told} for n in "ab")
    assert first == second


def test_statistics_of_another_model_are_refused(
    tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path
) -> None:
    care_main("calibrate", tiny.directory("llama3-rope"), tmp_path / "stats", "--text", text_file, *SAMPLES)
    out = tmp_path / "out"
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--calibration", tmp_path / "stats")
    assert_refused(outcome, "was calibrated on", out)


def test_statistics_that_lack_what_a_recipe_needs_are_refused(
    tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path
) -> None:
    """Collected for care-u alone, they hold no gradients."""
    source, stats, out = tiny.directory("llama-gqa"), tmp_path / "stats", tmp_path / "out"
    care_main("calibrate", source, stats, "--text", text_file, *SAMPLES, "--recipes", "care-u")
    assert care_main("convert", source, tmp_path / "u", "--recipe", "care-u", "--calibration", stats).code == 0
    outcome = care_main("convert", source, out, "--recipe", "best", "--calibration", stats)
    assert_refused(outcome, "needs calibration of distances, gradients", out)


@pytest.mark.parametrize(
    ("engine", "architecture"), [("anything", "CareLlama"), ("vllm-cpu", "CareLlama"), ("llama.cpp", "DeepseekV3")]
)
def test_an_engine_picks_recipe_and_format(
    tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path, engine: str, architecture: str
) -> None:
    out = tmp_path / "out"
    source = tiny.directory("llama-gqa")
    assert care_main("convert", source, out, "--for", engine, "--calibration", text_file, *SAMPLES).code == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [f"{architecture}ForCausalLM"]


def test_an_engine_and_another_format_are_refused(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = care_main("convert", tiny.directory("llama-gqa"), out, "--for", "vllm", "--format", "native")
    assert_refused(outcome, "--for vllm needs --format deepseek", out)


FOR_VLLM: dict[str, tuple[str, list[str], str]] = {
    "small heads": ("llama-gqa", ["--for", "vllm"], "prefill has no heads of 8 no-rope and value dims; --for vllm-cpu"),
    "another body": ("olmo2-norm", ["--for", "vllm-cpu"], "not that of olmo2; use --for anything"),
    "too large a budget": ("llama-mqa", ["--for", "vllm", "--kv-budget", "1.5"], "kv budget 1.5 must lie in (0, 1]"),
    "rebuilt keys": (
        "llama-gqa", ["--for", "vllm-cpu", "--mode", "rebuild"], "vllm-cpu needs --format native in absorbed mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FOR_VLLM))
def test_what_vllm_cannot_run_is_refused(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    source, options, words = FOR_VLLM[name]
    assert_refused(care_main("convert", tiny.directory(source), tmp_path / "o", *options), words, tmp_path / "o")


@pytest.mark.parametrize(("budget", "width"), [("0.5", 576), ("0.27", 512), ("0.16", 320)])
def test_vllm_gets_the_widest_shape_that_it_has_a_kernel_for(
    care_main: Run, tmp_path: Path, budget: str, width: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(LLAMA_70B))
    outcome = care_main(
        "convert", source, tmp_path / "o", "--for", "vllm", "--dry-run", "--kv-budget", budget, "--json", "-"
    )
    plan = outcome.json
    assert plan["cache"][1]["values_per_token"] == 80 * width
    assert plan["recipe"]["rope"]["dims"] == 64
    assert f"vLLM has kernels for {width - 64} + 64 values" in outcome.stderr


def test_serve_starts_the_server_in_its_own_place(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which and why on stderr; a model that nothing serves is one line with remedies."""
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _path, command: started.append(command))
    outcome = care_main("serve", tmp_path / "m.gguf", "--port", "8123")
    assert "serving m.gguf with llama.cpp on port 8123 (the first that takes it; vllm: it takes check" in outcome.stderr
    assert started == [[str(tmp_path / "llama-server"), "-m", str(tmp_path / "m.gguf"), "--jinja", "--port", "8123"]]
    source = tiny.directory("llama-gqa")
    assert "is not a converted model; serve it with" in care_main("serve", source).stderr
    assert "is neither a converted model's directory nor" in care_main("serve", tmp_path / "absent").stderr
    native = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", "native"))
    assert "care: error: cannot serve" in care_main("serve", native, "--engine", "llama.cpp").stderr
    assert len(started) == 1


EXPORT_OPTIONS: dict[str, tuple[list[str], str]] = {
    "k-quant": (["--quantize", "q4_k_m"], "export with --quantize bf16, then run llama-quantize"),
    "unknown type": (["--quantize", "int7"], "--quantize 'int7' is unknown (known: f32, bf16, f16, q8_0"),
}


@pytest.mark.parametrize("name", list(EXPORT_OPTIONS))
def test_export_types_that_cannot_be_had(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    options, words = EXPORT_OPTIONS[name]
    model = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"))
    assert_refused(care_main("export", model, tmp_path / "f.gguf", *options), words, tmp_path / "f.gguf")


def test_export(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    """A file once, never over another; other formats are told what to do."""
    file = tmp_path / "f.gguf"
    model = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"))
    said = care_main("export", model, file, "--quantize", "Q8_0", "--json", "-").json
    assert (said["quantization"], said["num_bytes"]) == ("q8_0", file.stat().st_size)
    again = care_main("export", model, file)
    assert (again.code, "f.gguf exists; name a new file" in again.stderr) == (EXIT_ERROR, True)
    native = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", "native"))
    out = tmp_path / "other.gguf"
    assert_refused(care_main("export", native, out), "convert with --recipe best-deepseek --format deepseek", out)
    assert_refused(care_main("export", tiny.directory("llama-gqa"), out), "llama is not a converted model's", out)
    assert_refused(care_main("export", tmp_path, out), "is not a converted model's directory", out)
    outside = tmp_path / "absent" / "f.gguf"
    assert_refused(care_main("export", model, outside), "cannot write", outside, worked=True)


def test_needle(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    """Tables, JSON with protocol and errors, and a picture; source and conversion are asked the same."""
    pytest.importorskip("matplotlib")
    source, picture, file = tiny.directory("llama-gqa"), tmp_path / "needle.png", tmp_path / "needle.json"
    out = tiny.converted(Case("llama-gqa", "best", 0.5, "absorbed", "native"))
    options = ("--lengths", "230,250", "--depths", "0,1", "--trials", "3", "--plot", picture, "--json", file)
    outcome = care_main("needle", out, "--against", source, *options)
    assert outcome.code == 0, outcome.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(file.read_text())
    protocol = result["protocol"]
    assert (protocol["lengths"], protocol["depths"], protocol["trials"]) == ([230, 250], [0.0, 1.0], 3)
    first, second = (result["models"][str(name)] for name in (source, out))
    keys = ("length", "depth", "trial", "answer")
    assert [[a[k] for k in keys] for a in first["answers"]] == [[a[k] for k in keys] for a in second["answers"]]
    for model in (first, second):
        assert [(c["length"], c["depth"], c["trials"]) for c in model["cells"]] == [
            (230, 0.0, 3), (230, 1.0, 3), (250, 0.0, 3), (250, 1.0, 3),
        ]  # fmt: skip
        nats = [a["nats"] for a in model["answers"]]
        assert_numbers(model["overall"]["nats"]["value"], sum(nats) / len(nats), "fp64 sums")
    told = second["overall"]["nats"]["value"] - first["overall"]["nats"]["value"]
    assert_numbers(second["difference"]["nats"]["value"], told, "fp64 sums")
    (line,) = [line for line in outcome.stdout.splitlines() if "difference" in line]
    assert f"{told:.2f} ± " in line
    cell = first["cells"][1]["choice"]
    assert f"{cell['value']:.0%} ± {cell['error']:.0%}" in outcome.stdout


NEEDLES: dict[str, tuple[list[str], str]] = {
    "beyond the positions": (["--lengths", "200,300"], "--lengths 300 is beyond the 256 positions of"),
    "not a number": (["--lengths", "2k"], "--lengths '2k' must be numbers such as 512,1024"),
    "no depth": (["--depths", "2", "--lengths", "250"], "--depths 2 is not a share of the haystack"),
    "no room": (["--lengths", "150"], "--lengths 150: fact, question and answer alone are"),
    "not a number either": (["--depths", "half"], "--depths 'half' must be numbers such as 0,0.5,1"),
}


@pytest.mark.parametrize("name", list(NEEDLES))
def test_needles_that_cannot_be_hidden(tiny: TinyModels, care_main: Run, tmp_path: Path, name: str) -> None:
    options, words = NEEDLES[name]
    assert_refused(care_main("needle", tiny.directory("llama-gqa"), *options), words, tmp_path / "absent")


def test_harness_without_its_package(
    tiny: TinyModels, care_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line before any work, which names the extra."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = care_main("eval", tiny.directory("llama-gqa"), "--harness", "arc_easy")
    assert_refused(outcome, "--harness needs lm-eval; pip install 'care-mla[eval]'", tmp_path / "absent")


def test_inspect_says_which_engine(tiny: TinyModels, care_main: Run) -> None:
    model = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"))
    assert care_main("inspect", model, "--json", "-").json["engines"]["llama.cpp"] == "yes"
    assert "rank + rope is 16, it has kernels for" in care_main("inspect", model).stdout
    of_source = care_main("inspect", tiny.directory("mistral-window"), "--json", "-").json["engines"]
    assert of_source["llama.cpp"].startswith("no (format deepseek has no sliding window")


def test_compare_draws_and_lists_the_front(tiny: TinyModels, care_main: Run, text_file: Path, tmp_path: Path) -> None:
    """One recipe at two budgets: which rows are on the front follows from the table itself."""
    pytest.importorskip("matplotlib")
    picture, result = tmp_path / "front.png", tmp_path / "compare.json"
    outcome = care_main(
        "compare", tiny.directory("llama-gqa"), "--recipes", "palu", "--kv-budgets", "0.5,0.25", "--text", text_file,
        "--window", 32, "--windows", 2, "--plot", picture, "--json", result,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(result.read_text())["texts"][str(text_file)]
    half, quarter = (row["perplexity"] for row in record["rows"])
    assert [row["kv_budget"] for row in record["pareto"]] == ([0.5, 0.25] if half < quarter else [0.25])
    assert [row["cache_kept"] for row in record["pareto"]] == [row["kv_budget"] for row in record["pareto"]]
    listed = [line.split()[:3] for line in outcome.stdout.splitlines() if line.startswith("* palu")]
    assert listed == [["*", "palu", f"{row['kv_budget']:g}"] for row in record["pareto"]]
    refused = care_main("compare", tiny.directory("llama-gqa"), "--plot", tmp_path / "absent" / "front.png")
    assert_refused(refused, "cannot write", tmp_path / "absent")


def test_compare(tiny: TinyModels, care_main: Run, text_file: Path) -> None:
    """All recipes by default; a row that cannot be had says why; the JSON has every number of the table."""
    source = tiny.directory("llama-gqa")
    options = ("--calibration", text_file, *SAMPLES, "--text", text_file, "--window", 32, "--windows", 2)
    more = ("--text", "python-help-heldout")
    texts = care_main("compare", source, "--kv-budgets", "0.5,0.25", *options, *more, "--json", "-").json["texts"]
    assert list(texts) == [str(text_file), "python-help-heldout"]
    table, other = texts.values()
    assert table["source"]["nll"] != other["source"]["nll"]
    assert len(table["rows"]) == 2 * len(recipe_names())
    assert {row["recipe"] for row in table["rows"] if "refused" in row} == {"care-mla", "transmla"}
    for row in table["rows"]:
        if "refused" not in row:
            assert row["cache_values_per_token"] == row["kv_budget"] * 32 * 3
            assert_numbers(row["excess"], row["nll"] - table["source"]["nll"], "fp64")
    everything_refused = care_main("compare", source, "--kv-budgets", "0.01", *options)
    assert everything_refused.code == EXIT_ERROR


def test_json_to_a_file_and_text_to_the_screen(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    outcome = care_main("inspect", tiny.directory("llama-gqa"), "--json", tmp_path / "facts.json")
    assert json.loads((tmp_path / "facts.json").read_text())["layers"] == 3
    assert "cache width per layer" in outcome.stdout
    refused = care_main("inspect", tiny.directory("llama-gqa"), "--json", tmp_path / "absent" / "facts.json")
    assert (refused.code, "cannot write" in refused.stderr) == (EXIT_ERROR, True)


def test_profile_is_drawn(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out", tmp_path / "profile.png"
    care_main("convert", tiny.directory("llama-gqa"), out, "--recipe", "palu")
    outcome = care_main("inspect", out, "--plot", picture)
    assert outcome.code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line for line in outcome.stdout.splitlines() if "\u2588" in line and "latent" not in line]
    assert [row.split()[2:] for row in rows] == [["16", "8", "+", "8"]] * 3
    refused = care_main("inspect", tiny.directory("llama-gqa"), "--plot", picture)
    assert_refused(refused, "is not a converted model", tmp_path / "absent")


def test_report_is_written_from_a_conversion(tiny: TinyModels, care_main: Run, tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("matplotlib")
    source, page, measured = tiny.directory("llama-gqa"), tmp_path / "report.html", tmp_path / "eval.json"
    out = tiny.converted(Case("llama-gqa", "best", 0.5, "absorbed", "native"))
    options = ("--text", text_file, "--window", 32, "--windows", 2, "--json", measured)
    care_main("eval", out, "--against", source, *options)
    texts = tmp_path / "texts.json"
    care_main("generate", out, "abc", "--against", source, "--max-new-tokens", 6, "--json", texts)
    given = ("--measured", measured, "--measured", texts)
    outcome = care_main("report", out, page, *given, "--json", tmp_path / "report.json")
    assert outcome.code == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    (run,) = facts["generations"]
    (shown,) = run["prompts"]
    (made,) = json.loads(texts.read_text())["generations"]
    assert (run["source"], run["converted"]) == (source.name, out.name)
    assert shown["common"] + shown["source_rest"] == made["texts"][str(source)]
    assert shown["common"] + shown["converted_rest"] == made["texts"][str(out)]
    assert f"same for {made['same_tokens']} of 6 tokens" in page.read_text()
    assert facts["verdict"][0] in outcome.stdout
    assert facts["losses"]["key"] > 0
    assert page.read_text().count("<svg") == 3
    assert "report.html" in outcome.stdout
    refused = care_main("report", source, tmp_path / "other.html")
    assert_refused(refused, "is not a converted model", tmp_path / "other.html")
    assert_refused(care_main("report", out, tmp_path / "a" / "b.html"), "cannot write", tmp_path / "a")
    care_main("generate", out, "abc", "--max-new-tokens", 6, "--json", texts)
    refused = care_main("report", out, tmp_path / "other.html", "--measured", texts)
    assert_refused(refused, "care generate OUT PROMPT --against SRC", tmp_path / "other.html")


def test_no_command_runs_pickles(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    """Not even the commands that leave loading to transformers."""
    source = damaged(tiny, tmp_path, only_pickles)
    for command in (["eval", source], ["generate", source, "hello"]):
        outcome = care_main(*command, *(["--window", 32, "--windows", 1] if command[0] == "eval" else []))
        assert outcome.code == EXIT_ERROR, command
        assert outcome.stderr.splitlines()[-1].startswith("care: error: ")
        assert "safetensors" in outcome.stderr


def test_code_in_a_checkpoint_is_not_run(tiny: TinyModels, care_main: Run, tmp_path: Path) -> None:
    """A config that asks for its own modeling code."""
    source = damaged(
        tiny, tmp_path,
        with_config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    )  # fmt: skip
    marker = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    for command in (["convert", source, tmp_path / "out"], ["eval", source], ["generate", source, "hello"]):
        assert care_main(*command).code == EXIT_ERROR
    assert not marker.exists()
