"""The lm-evaluation-harness on a model that is already loaded: its tasks, prompts, metrics and standard errors.

A task is a name that the harness knows, whose data set it fetches from a hub, or a file of multiple-choice rows as
`load_task` reads them, which becomes a task of the harness' own kind. Nothing is computed here but by the harness.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import BadInput, first_line
from ..progress import Track, silent
from .tasks import Row, load_task

HELD_LOGITS = 2**28
"""Logits that the harness may hold at a time: it keeps those of every position of a batch."""

TYPICAL_TOKENS = 512
"""Tokens of a long question, by which the batch is sized."""

LARGEST_BATCH = 16
ANSWERED_BY = ("multiple_choice", "loglikelihood")
"""Kinds of task that are run: what is generated would need stop words and minutes, and some of it runs code."""

NEAREST = 5
"""Names that are offered for one that is unknown."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks and groups that are loaded, data and all, and the harness' manager that loaded them."""

    harness: Any
    manager: Any
    loaded: Sequence[Any]

    @property
    def version(self) -> str:
        """The harness' version."""
        return self.harness.__version__


@dataclass(frozen=True)
class HarnessScore:
    """What the harness says of one task or group of tasks: values and standard errors by metric, never mixed."""

    rows: int
    task_version: str | None
    few_shot: int | None
    values: dict[str, float]
    errors: dict[str, float | None]


def load_harness_tasks(names: Sequence[str]) -> HarnessTasks:
    """Tasks by name or file.

    Raises BadInput without lm-eval, for a name that it does not know (with the nearest ones), for data that cannot be
    had, and for a task whose answers are generated.
    """
    harness = _harness()
    files = [name for name in names if _is_file(name)]
    own = [_task_of_file(Path(name)) for name in files]
    manager = import_module("lm_eval.tasks").TaskManager(include_defaults=len(files) < len(names))
    for name in names:
        if name not in files and name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, NEAREST)) or "none"
            raise BadInput(f"unknown harness task {name!r} (nearest: {near}); a .jsonl file of rows is a task too")
    with _no_code_from_hubs():
        loaded = [part for name in names if name not in files for part in _load(manager, name)]
        loaded += [part for spec in own for part in _load(manager, spec)]
    return HarnessTasks(harness, manager, loaded)


def _is_file(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz"))


def _harness() -> Any:  # noqa: ANN401 - the module
    try:
        harness = import_module("lm_eval")
    except ModuleNotFoundError as error:
        raise BadInput("--harness needs lm-eval; pip install 'care-mla[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return harness


@contextmanager
def _no_code_from_hubs() -> Generator[None]:
    """A metric that the harness has not is one that it would fetch from a hub as code and run."""
    library: Any = import_module("evaluate")
    load, library.load = library.load, None
    try:
        yield
    finally:
        library.load = load


def _load(manager: Any, spec: str | Mapping[str, Any]) -> list[Any]:  # noqa: ANN401
    """Tasks and groups of one name or config."""
    name = spec if isinstance(spec, str) else spec["task"]
    try:
        found = manager.load([spec])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise BadInput(f"task {name} cannot be loaded ({first_line(error)}); give its rows as a .jsonl file") from error
    for task in found["tasks"].values():
        if task.OUTPUT_TYPE not in ANSWERED_BY:
            raise BadInput(f"task {task.task_name} is {task.OUTPUT_TYPE}; --harness runs {' and '.join(ANSWERED_BY)}")
    inner = {child for children in found.get("group_map", {}).values() for child in children}
    tops = {**found.get("groups", {}), **found["tasks"]}
    return [part for part_name, part in tops.items() if part_name not in inner]


def _task_of_file(path: Path) -> dict[str, Any]:
    """A task's config as the harness has them in YAML, with the rows in it."""
    rows = load_task(path)
    kinds = {row.normalized for row in rows}
    if len(kinds) > 1:
        raise BadInput(f"{path} mixes rows with several choices and rows with several contexts; use two files")
    (normalized,) = kinds
    kind = _several_choices(rows) if normalized else _several_contexts(rows)
    metrics = ("acc", "acc_norm") if normalized else ("acc",)
    return {
        "task": path.name,
        "custom_dataset": _data_set(kind.pop("rows")),
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1.0},
        **kind,
    }


def _several_choices(rows: Sequence[Row]) -> dict[str, Any]:
    records = [
        {"ctx": row.options[0][0], "choices": [choice[1:] for _, choice in row.options], "gold": row.gold}
        for row in rows
    ]
    return {"rows": records, "doc_to_text": "ctx", "doc_to_choice": "choices", "doc_to_target": "gold"}


def _several_contexts(rows: Sequence[Row]) -> dict[str, Any]:
    """As the harness has WinoGrande: a text that is a number says which of the contexts is right."""
    records = [
        {"contexts": [ctx for ctx, _ in row.options], "continuation": row.options[0][1][1:], "gold": row.gold}
        for row in rows
    ]
    return {"rows": records, "doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}


def _data_set(records: Sequence[Mapping[str, Any]]) -> Callable[..., Any]:
    """What the harness calls, with metadata that is not needed, to get a task's data by split."""
    made = {"test": import_module("datasets").Dataset.from_list(list(records))}
    return lambda **_metadata: made


def run_harness(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    tasks: HarnessTasks,
    *,
    rows: int | None = None,
    track: Track = silent,
    label: str = "",
) -> dict[str, Any]:
    """The harness' own result on the first `rows` of each task, samples included."""
    vocabulary = model.config.get_text_config().vocab_size
    batch = min(max(HELD_LOGITS // (TYPICAL_TOKENS * vocabulary), 1), LARGEST_BATCH)
    hflm = import_module("lm_eval.models.huggingface").HFLM
    lm = hflm(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    answer = lm.loglikelihood

    def loglikelihood(requests: Sequence[Any]) -> Any:  # noqa: ANN401
        lm.set_cache_hook(_Steps(track(range(len(requests)), label=label or "answering", total=len(requests))))
        answers = answer(requests, disable_tqdm=True)
        lm.cache_hook.close()
        return answers

    lm.loglikelihood = loglikelihood
    return tasks.harness.simple_evaluate(model=lm, tasks=list(tasks.loaded), limit=rows, task_manager=tasks.manager)


class _Steps:
    """Where the harness leaves each answer for its cache: a step of the progress bar."""

    def __init__(self, steps: Any) -> None:  # noqa: ANN401
        self._steps: Iterator[Any] = iter(steps)

    def add_partial(self, *_answer: object) -> None:
        """One request is answered."""
        next(self._steps, None)

    def close(self) -> None:
        """All are."""
        for _ in self._steps:
            pass


def harness_scores(result: Mapping[str, Any]) -> dict[str, HarnessScore]:
    """A result by task and group."""
    return {name: _score(result, name) for name in result["results"]}


def _score(result: Mapping[str, Any], name: str) -> HarnessScore:
    found, values, errors = result["results"][name], dict[str, float](), dict[str, float | None]()
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            named = metric if kind == "none" else key
            values[named] = float(value)
            error = found.get(f"{metric}_stderr,{kind}")
            errors[named] = float(error) if isinstance(error, float) else None
    version = result["versions"].get(name)
    return HarnessScore(
        _rows(result, name), None if version is None else str(version), result["n-shot"].get(name), values, errors
    )


def _rows(result: Mapping[str, Any], name: str) -> int:
    """Of a group, those of all its tasks."""
    if name in result["n-samples"]:
        return result["n-samples"][name]["effective"]
    return sum(_rows(result, child) for child in result["group_subtasks"].get(name, ()))
