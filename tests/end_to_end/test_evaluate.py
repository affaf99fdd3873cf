"""care eval: bits per byte, models with other tokenizers, figures by position, and what it says to bad input.

care generate: texts of two models side by side.
"""

import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import care.cli
import care.commands.generate
from care.evaluation import Continuation
from care.modeling.loading import Location, load_tokenizer
from tiny import TINY, Case, TinyModels, build_checkpoint
from tolerances import assert_numbers

SOURCE = "llama-gqa"
CONVERTED = Case(SOURCE, "palu", 0.5, "rebuild", "native")
SAMPLES = ("--samples", 4, "--length", 32, "--context", 64)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `care ARGUMENTS`: its exit code, and what it said on stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["care", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            care.cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def refusal(outcome: tuple[int, str, str]) -> str:
    """The one line of an error."""
    code, out, err = outcome
    assert (code, out, len(err.splitlines())) == (2, "", 1), outcome
    return err


def other_tokens(tiny: TinyModels, to: Path) -> Path:
    """The source with a tokenizer that has one token for " a" and one for "ab"."""
    copy = shutil.copytree(tiny.directory(SOURCE), to)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"\u0120a": 260, "ab": 261}
    tokenizer["model"]["merges"] += [["\u0120", "a"], ["a", "b"]]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def test_bits_per_byte_and_buckets_beside_perplexity(tiny: TinyModels, run: Run, text_file: Path) -> None:
    """A token is a byte here, so bits per byte are the bits of a token."""
    source, model = tiny.directory(SOURCE), tiny.converted(CONVERTED)
    options = ("--against", source, "--text", text_file, "--window", 100, "--windows", 3)
    measured = json.loads(run("eval", model, *options, "--json", "-")[1])["models"]
    for record in measured.values():
        assert record["bytes"] == record["predictions"] == 3 * 99
        expected = [record["nll"] / math.log(2), record["nll_standard_error"] / math.log(2)]
        assert_numbers([record["bits_per_byte"], record["bits_per_byte_standard_error"]], expected, "fp64 sums")
        assert [(b["first"], b["last"], b["predictions"]) for b in record["by_position"]] == [
            (0, 63, 3 * 64), (64, 98, 3 * 35),
        ]  # fmt: skip
        for figure in ("nll", "kl", "top1_agreement"):
            mean = sum(b[figure] * b["predictions"] for b in record["by_position"]) / record["predictions"]
            assert_numbers(mean, record[figure], "fp64 sums")
    converted = measured[str(model)]
    assert 0 < converted["kl_standard_error"] < converted["kl"]
    share = converted["top1_agreement"]
    assert_numbers(converted["top1_standard_error"], math.sqrt(share * (1 - share) / (3 * 99)), "fp64 sums")
    plain, shown = (run("eval", model, *options, *more)[1] for more in ((), ("--by-position",)))
    assert "64-98" in shown
    assert "64-98" not in plain
    assert f"{converted['kl']:.4f} ±" in plain
    assert f" {converted['kl_standard_error']:.4f} " in plain


def test_without_a_number_all_windows_of_a_short_text_are_measured(
    tiny: TinyModels, run: Run, tmp_path: Path, text_file: Path
) -> None:
    source, long, short = tiny.directory(SOURCE), tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(text_file.read_text()[:99])
    short.write_text(text_file.read_text()[:70])
    for more in ((), ("--bits-per-byte",)):
        measured = json.loads(run("eval", source, "--text", long, "--window", 32, *more, "--json", "-")[1])
        assert measured["windows"] == 3
        assert "short.txt: 2 windows of 32 tokens" in run("eval", source, "--text", short, "--window", 32, *more)[1]
    compared = json.loads(
        run("compare", source, "--recipes", "palu", "--kv-budgets", 0.5, "--text", long, "--text", short,
            "--window", 32, "--calibration", text_file, *SAMPLES, "--json", "-")[1]
    )  # fmt: skip
    assert compared["protocol"]["windows"] == 2
    assert {record["source"]["predictions"] for record in compared["texts"].values()} == {2 * 31}
    said = refusal(run("compare", source, "--text", long, "--text", short, "--window", 80, "--calibration", text_file))
    assert "short.txt has 70 tokens, less than one window of 80" in said


def test_other_tokenizers_are_compared_by_bytes_alone(
    tiny: TinyModels, run: Run, tmp_path: Path, text_file: Path
) -> None:
    source, other = tiny.directory(SOURCE), other_tokens(tiny, tmp_path / "other")
    options = ("--against", source, "--text", text_file, "--window", 64, "--windows", 4)
    said = refusal(run("eval", other, *options))
    assert "has another tokenizer than" in said
    assert "--bits-per-byte can" in said
    said = refusal(run("eval", other, *options, "--bits-per-byte", "--by-position"))
    assert "leave out --bits-per-byte" in said
    measured = json.loads(run("eval", other, *options, "--bits-per-byte", "--json", "-")[1])["models"]
    ours, theirs = measured[str(other)], measured[str(source)]
    assert ours["bytes"] == theirs["bytes"] == theirs["predictions"] > ours["predictions"]
    assert not {"perplexity", "kl", "top1_agreement", "nll"} & (ours.keys() | theirs.keys())
    # By hand: the same stretches, from their text.
    text, total, end = text_file.read_text(), 0.0, 0
    tokenizer, model = load_tokenizer(Location(other)), tiny.source_model(SOURCE)
    num_bytes = 0
    for _ in range(4):
        stretch = text[end : end + 64].rstrip()
        end += len(stretch)
        ids = tokenizer(stretch)["input_ids"]
        # The first letter behind which this tokenizer has a cut too, and which is no space.
        begin = next(n for n in range(1, 9) if not stretch[n - 1].isspace() and stretch[n - 1 : n + 1] != "ab")
        first = len(tokenizer(stretch[:begin])["input_ids"])
        with torch.inference_mode():
            logp_TV = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].double().log_softmax(-1)
        total -= float(logp_TV.gather(1, torch.tensor(ids[first:])[:, None]).sum())
        num_bytes += len(stretch) - begin
    assert num_bytes == ours["bytes"]
    assert_numbers(ours["bits_per_byte"], total / math.log(2) / num_bytes, "fp32 nats")
    assert run("eval", other, *options, "--bits-per-byte")[1].count("±") == 2


def test_other_vocabulary_sizes_are_refused(tiny: TinyModels, run: Run, tmp_path: Path, text_file: Path) -> None:
    """Padded to another size, with the same tokenizer."""
    padded = build_checkpoint(tmp_path / "padded", {**TINY[SOURCE], "vocab_size": 272})
    options = ("--text", text_file, "--window", 32, "--windows", 1)
    code, _, said = run("eval", padded, "--against", tiny.directory(SOURCE), *options)
    assert (code, "has another vocabulary size than" in said) == (2, True)


def test_a_wrong_task_name_is_offered_the_nearest(tiny: TinyModels, run: Run, tmp_path: Path) -> None:
    for name in ("hellaswag.jsonl.gz", "arc_easy.jsonl", "arc_easy.txt"):
        (tmp_path / name).touch()
    said = refusal(run("eval", tiny.directory(SOURCE), "--tasks", tmp_path / "helaswag.jsonl"))
    assert "no such task file" in said
    assert said.rstrip().endswith("did you mean hellaswag.jsonl.gz?")
    said = refusal(run("eval", tiny.directory(SOURCE), "--tasks", tmp_path / "arc-easy.json"))
    assert said.rstrip().endswith("did you mean arc_easy.jsonl?")
    said = refusal(run("eval", tiny.directory(SOURCE), "--tasks", tmp_path / "zzz"))
    assert "no .jsonl file of a like name" in said


@pytest.mark.parametrize("bits", [(), ("--bits-per-byte",)])
def test_a_text_of_less_than_a_window_is_one_line(
    tiny: TinyModels, run: Run, tmp_path: Path, bits: tuple[str, ...]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    said = refusal(run("eval", tiny.directory(SOURCE), "--text", tmp_path / "short.txt", "--window", 16, *bits))
    assert "the text has 9 tokens" in said
    assert "16" in said
    (tmp_path / "empty.txt").write_text("")
    said = refusal(run("eval", tiny.directory(SOURCE), "--text", tmp_path / "empty.txt", "--window", 16, *bits))
    assert "the text has 0 tokens" in said


def test_without_a_generation_config(tiny: TinyModels, run: Run, tmp_path: Path) -> None:
    """The model's own defaults are taken: the same text, and a conversion at parity has none either."""
    bare = shutil.copytree(tiny.directory(SOURCE), tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    code, _, _ = run("convert", bare, tmp_path / "out", "--kv-budget", 1)
    assert code == 0
    assert not (tmp_path / "out" / "generation_config.json").exists()
    texts = {
        run("generate", model, "abc", "--max-new-tokens", 8)[1]
        for model in (bare, tmp_path / "out", tiny.directory(SOURCE))
    }
    assert len(texts) == 1
    assert len(texts.pop()) > 1


def test_a_comparison_has_standard_errors_and_its_table_reads_it(
    tiny: TinyModels, run: Run, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ("--recipes", "palu,mha2mla", "--kv-budgets", 0.5, "--text", text_file, "--window", 32, "--windows", 4)
    file = tmp_path / "compare.json"
    assert run("compare", tiny.directory(SOURCE), *options, "--json", file)[0] == 0
    (table,) = json.loads(file.read_text())["texts"].values()
    for row in table["rows"]:
        assert row["kl_standard_error"] > 0
        share = row["top1_agreement"]
        assert_numbers(row["top1_standard_error"], math.sqrt(share * (1 - share) / (4 * 31)), "fp64 sums")
    assert table["source"]["kl_standard_error"] == 0
    monkeypatch.setattr(sys, "argv", ["table.py", str(file)])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "table.py"), run_name="__main__")
    assert f"{table['rows'][0]['kl']:.3f}" in capsys.readouterr().out


def greedy(model: Any, prompt: str, length: int) -> list[int]:
    """The likeliest token, again and again, without a cache."""
    tokens = load_tokenizer(Location(Path(model.name_or_path)))(prompt)["input_ids"]
    start = len(tokens)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[start:]


def test_texts_of_source_and_conversion_side_by_side(tiny: TinyModels, run: Run) -> None:
    source, model = str(tiny.directory(SOURCE)), str(tiny.converted(CONVERTED))
    loaded = {source: tiny.source_model(SOURCE), model: tiny.model(CONVERTED)}
    tokenizer, prompts, length = load_tokenizer(Location(Path(source))), ("abc", "b de"), 12
    options = ("generate", model, *prompts, "--against", source, "--max-new-tokens", length)
    code, said, progress = run(*options, "--json", "-")
    assert (code, progress.startswith("writing: done in ")) == (0, True)
    found = json.loads(said)
    generations = found.pop("generations")
    assert found == {
        "models": [source, model], "against": source, "max_new_tokens": length, "chat": False, "dtype": "float32",
        "decoding": "greedy",
    }  # fmt: skip
    shown = run(*options)[1]
    parted = []
    for prompt, made in zip(prompts, generations, strict=True):
        tokens = {name: greedy(loaded[name], prompt, length) for name in (source, model)}
        parted.append(next((n for n in range(length) if tokens[source][n] != tokens[model][n]), length))
        assert made == {
            "prompt": prompt, "texts": {name: tokenizer.decode(ids) for name, ids in tokens.items()},
            "tokens": {source: length, model: length}, "same_tokens": parted[-1],
        }  # fmt: skip
    assert max(parted) > 0
    assert min(parted) < length
    assert shown.index("prompt: abc\n") < shown.index("prompt: b de\n")
    assert [line for line in shown.splitlines() if line.startswith("same for ")] == [
        f"same for {n} of {length} tokens" for n in parted
    ]


def test_texts_of_one_model_and_several_prompts(tiny: TinyModels, run: Run) -> None:
    source = str(tiny.directory(SOURCE))
    options = ("--max-new-tokens", 4)
    found = json.loads(run("generate", source, "abc", "de", *options, "--json", "-")[1])
    assert (found["models"], found["against"]) == ([source], None)
    assert [made["prompt"] for made in found["generations"]] == ["abc", "de"]
    assert {made["same_tokens"] for made in found["generations"]} == {None}
    assert {made["tokens"][source] for made in found["generations"]} == {4}
    alone = [run("generate", source, prompt, *options)[1] for prompt in ("abc", "de")]
    shown = run("generate", source, "abc", "de", *options)[1]
    assert shown == f"prompt: abc\n{alone[0]}\nprompt: de\n{alone[1]}"


def test_texts_are_columns_that_wrap_and_not_markup(
    tiny: TinyModels, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source left; two columns of the same width together are as wide as a file."""
    source, model = (str(path.relative_to(tiny.root)) for path in (tiny.directory(SOURCE), tiny.converted(CONVERTED)))
    monkeypatch.chdir(tiny.root)
    texts = {source: "[bold]left[/bold] " * 20 + "[/]\x1b[2J", model: "right " * 3}
    tokens = {source: (1, 2, 3), model: (1, 2, 4, 5)}
    written = {name: Continuation(tokens[name], text) for name, text in texts.items()}
    monkeypatch.setattr(care.commands.generate, "continue_prompts", lambda *_, **__: [written])
    shown = run("generate", model, "[red]a[/red] [/]", "--against", source)[1]
    lines = shown.splitlines()
    assert lines[0] == "prompt: [red]a[/red] [/]"
    assert lines[-1] == "same for 2 of 4 tokens"
    cells = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    assert {len(cell) for row in cells for cell in row} <= {78, 79}
    left, right = ([word for cell in column for word in cell.split()] for column in zip(*cells, strict=True))
    assert left == ["[bold]left[/bold]"] * 20 + ["[/]\N{REPLACEMENT CHARACTER}[2J"]
    assert right == ["right"] * 3
    heads = [line.strip("┃").split("┃") for line in lines if line.startswith("┃")]
    assert ["".join(parts).replace(" ", "") for parts in zip(*heads, strict=True)] == [source, model]


def test_the_chat_template_is_the_references(tiny: TinyModels, run: Run, tmp_path: Path) -> None:
    """The JSON says whether there was one."""
    plain, spoken_to = tiny.directory(SOURCE), shutil.copytree(tiny.directory(SOURCE), tmp_path / "spoken to")
    (spoken_to / "chat_template.jinja").write_text("{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %}")

    def made(prompt: str, *options: object) -> tuple[bool, list[str]]:
        found = json.loads(run("generate", *options, prompt, "--max-new-tokens", 5, "--json", "-")[1])
        return found["chat"], list(found["generations"][0]["texts"].values())

    _, (bare,) = made("hi", plain)
    _, (templated,) = made("(user: hi)", plain)
    assert bare != templated
    assert made("hi", plain, "--against", spoken_to, "--chat") == (True, [templated] * 2)
    assert made("hi", spoken_to, "--against", plain, "--chat") == (False, [bare] * 2)
    assert made("hi", spoken_to) == (False, [bare])


def test_texts_that_cannot_be_compared_are_refused(tiny: TinyModels, run: Run, tmp_path: Path) -> None:
    source, other = tiny.directory(SOURCE), other_tokens(tiny, tmp_path / "other")
    said = refusal(run("generate", other, "abc", "--against", source))
    assert f"{other} has another tokenizer than {source}" in said
    assert said.rstrip().endswith("leave out --against")
    said = refusal(run("generate", source, "abc", "--against", source))
    assert "is MODEL itself" in said
    assert refusal(run("generate", tiny.converted(CONVERTED), "abc", "", "--against", source)).count("prompt") == 1
    code, _, said = run("generate", source, "abc", "--max-new-tokens", 0)
    assert (code, "--max-new-tokens" in said) == (2, True)
