"""The lm-evaluation-harness and our own scorer on the same files: the same log-likelihoods, accuracies and errors."""

import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import processors

from care.commands.evaluate import command
from care.errors import BadInput
from care.evaluation.harness import HarnessScore, harness_scores, load_harness_tasks, run_harness
from care.evaluation.pairs import encode_pair
from care.evaluation.tasks import TaskScore, load_task, log_probabilities, score
from care.modeling.loading import Location, load_tokenizer
from tiny import Case, TinyModels, random_text
from tolerances import assert_close, assert_numbers

NATIVE = Case("llama-gqa", "best", 0.5, "absorbed", "native")
ROWS = 24


def installed() -> Any:
    """The harness, or a skip that says how to have it; it warns of much on import, which is not ours to mend."""
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-harness has it")


pytestmark = pytest.mark.filterwarnings("ignore")


def choices_file(path: Path) -> Path:
    """Questions with several choices of unequal length, spaces at the end of a context and letters of several bytes."""
    records = [
        {
            "ctx": f"Question: {random_text(20 + n, n)}?\nAnswer:" + " " * (n % 5 == 0),
            "choices": [random_text(2 + 3 * c + n % 4, 100 * n + c) + "é" * (c == 1) for c in range(3 + n % 2)],
            "gold": n % 3,
        }
        for n in range(ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def contexts_file(path: Path) -> Path:
    """Two contexts with one continuation each, as WinoGrande is scored."""
    records = [
        {
            "contexts": [random_text(12, 7 * n) + " a", random_text(14, 7 * n + 1) + " bc"],
            "continuation": f"{random_text(9, 7 * n + 2)}.",
            "gold": n % 2,
        }
        for n in range(ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def tokenizer_with(bos: bool, tiny: TinyModels) -> Any:
    """One token a byte; with the habit of Llama and Gemma to begin with a BOS, or without."""
    tokenizer = load_tokenizer(Location(tiny.directory("llama-gqa")))
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def harness_likelihoods(result: dict[str, Any], name: str) -> list[list[float]]:
    """The same from the harness' samples."""
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("converted", [False, True], ids=["source", "native"])
def test_harness_and_scorer_agree(tiny: TinyModels, tmp_path: Path, bos: bool, converted: bool) -> None:
    installed()
    model = tiny.model(NATIVE) if converted else tiny.source_model("llama-gqa")
    tokenizer = tokenizer_with(bos, tiny)
    files = [choices_file(tmp_path / "choices.jsonl"), contexts_file(tmp_path / "contexts.jsonl")]
    result = run_harness(model, tokenizer, load_harness_tasks([str(file) for file in files]))
    official = harness_scores(result)
    for file in files:
        rows = load_task(file)
        ours, theirs = log_probabilities(model, tokenizer, rows), harness_likelihoods(result, file.name)
        assert [len(row) for row in theirs] == [len(row) for row in ours]
        assert_close(torch.tensor([*chain(*theirs)]), torch.tensor([*chain(*ours)]), "fp32 answers")
        assert official[file.name] == expected(score(model, tokenizer, rows))


def expected(ours: TaskScore) -> HarnessScore:
    """What our scorer says, as the harness would."""
    values, errors = {"acc": ours.acc}, {"acc": ours.acc_error}
    if ours.acc_norm is not None:
        values, errors = values | {"acc_norm": ours.acc_norm}, errors | {"acc_norm": ours.acc_norm_error}
    exactly: Any = lambda found: {name: pytest.approx(value, abs=1e-12) for name, value in found.items()}  # noqa: E731
    return HarnessScore(ours.rows, "1.0", 0, exactly(values), exactly(errors))


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_pairs_are_cut_as_the_harness_cuts_them(tiny: TinyModels, bos: bool) -> None:
    """Spaces, a BOS that the text brings along or that stands for no context at all, and the tokenizer's habit."""
    installed()
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tokenizer = tokenizer_with(bos, tiny)
    lm = HFLM(pretrained=tiny.source_model("llama-gqa"), tokenizer=tokenizer, backend="causal")
    for context, continuation in (("ab", " c"), ("ab  ", " c"), ("<s>ab", " c"), ("a\n", "b"), ("a\n ", " é")):
        head, tail = lm._encode_pair(context, continuation)
        assert encode_pair(tokenizer, context, continuation) == ((*head, *tail), len(head))
    seen = list[Any]()
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    lm.loglikelihood([SimpleNamespace(args=("", text), task_name="") for text in (" c", "<s>c")])
    assert [((*head, *tail), len(head)) for _, head, tail in seen] == [
        encode_pair(tokenizer, "", text) for text in (" c", "<s>c")
    ]


def test_rows_are_limited_and_every_answer_is_a_step(tiny: TinyModels, tmp_path: Path) -> None:
    installed()
    seen = dict[str, Any]()

    def track(items: Any, *, label: str, total: int) -> Any:
        seen.update(label=label, total=total, steps=0)
        for item in items:
            yield item
            seen["steps"] += 1

    tasks = load_harness_tasks([str(contexts_file(tmp_path / "contexts.jsonl"))])
    model, tokenizer = tiny.source_model("llama-gqa"), tokenizer_with(False, tiny)
    result = run_harness(model, tokenizer, tasks, rows=5, track=track, label="official")
    assert seen == {"label": "official", "total": 10, "steps": 10}
    assert harness_scores(result)["contexts.jsonl"].rows == 5


def test_unknown_names_come_with_the_nearest(tmp_path: Path) -> None:
    installed()
    with pytest.raises(BadInput, match=r"unknown harness task 'helaswag' \(nearest: hellaswag,"):
        load_harness_tasks(["helaswag"])
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        '{"ctx": "q", "choices": ["a", "b"], "gold": 1}\n{"contexts": ["a", "b"], "continuation": "c", "gold": 0}'
    )
    with pytest.raises(BadInput, match=r"mixed\.jsonl mixes rows"):
        load_harness_tasks([str(mixed)])


def test_data_that_cannot_be_had_is_one_line() -> None:
    """Tests have no network, and neither may a user."""
    installed()
    with pytest.raises(BadInput, match=r"task arc_easy cannot be loaded \(.*\); give its rows as a \.jsonl file"):
        load_harness_tasks(["arc_easy"])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput, match=r"--harness needs lm-eval; pip install 'care-mla\[eval\]'"):
        load_harness_tasks([str(choices_file(tmp_path / "choices.jsonl"))])


GROUPED = {
    "results": {
        "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "a": {"acc,none": 0.25, "acc_stderr,none": 0.2, "acc_norm,none": 1, "acc_norm_stderr,none": "N/A"},
        "b": {"f1,best": 0.75, "f1_stderr,best": 0.3, "sample_len": 9},
    },
    "versions": {"a": 1.0, "g": 2},
    "n-shot": {"a": 0, "b": 5},
    "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 5}},
    "group_subtasks": {"g": ["a", "b"], "a": [], "b": []},
}  # fmt: skip


def test_metrics_are_read_apart() -> None:
    """Of tasks and groups; a filter is part of a metric's name, and an error may be absent."""
    assert harness_scores(GROUPED) == {
        "g": HarnessScore(9, "2", None, {"acc": 0.5}, {"acc": 0.1}),
        "a": HarnessScore(4, "1.0", 0, {"acc": 0.25, "acc_norm": 1.0}, {"acc": 0.2, "acc_norm": None}),
        "b": HarnessScore(5, None, 5, {"f1,best": 0.75}, {"f1,best": 0.3}),
    }


def test_eval_reports_metrics_apart(tiny: TinyModels, tmp_path: Path) -> None:
    """In the table one row a metric; in the JSON with the harness' version, for both models."""
    harness, file = installed(), choices_file(tmp_path / "choices.jsonl")
    source, out = str(tiny.directory("llama-gqa")), str(tiny.converted(NATIVE))
    options = ["--text", str(tiny.text_file), "--window", "32", "--windows", "1", "--tasks", str(file)]
    asked = ["--harness", str(file), "--harness-rows", str(ROWS), "--json", str(tmp_path / "eval.json")]
    ended = CliRunner().invoke(command, [out, "--against", source, *options, *asked], catch_exceptions=False)
    assert ended.exit_code == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["harness"] == {"lm_eval_version": harness.__version__, "rows": ROWS}
    for name in (source, out):
        ours, theirs = (
            result["models"][name]["tasks"]["choices.jsonl"],
            result["models"][name]["harness"]["choices.jsonl"],
        )
        assert_numbers([theirs["values"][m] for m in ("acc", "acc_norm")], [ours["acc"], ours["acc_norm"]], "fp64")
