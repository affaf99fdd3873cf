"""Windows to train on and held out, what the teacher writes, and the journal of a run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from care.commands.heal import read_too_often
from care.errors import BadInput, InvalidRecipe
from care.healing import HealingRequest, HeldOut, Objective, Step
from care.healing.curve import running_mean
from care.healing.data import Windows, split_windows, write_text
from care.healing.journal import Journal
from tiny import TinyModels
from tolerances import assert_numbers

LENGTH = 8


def numbered(first: int, count: int) -> torch.Tensor:
    """A text whose tokens tell where they stood."""
    return torch.arange(first, first + count)


def test_the_end_of_each_text_is_held_out() -> None:
    windows = split_windows([numbered(0, 800), numbered(10_000, 400)], LENGTH, 4)
    assert [len(text) for text in windows.train] == [98, 48]
    assert windows.held_out_BT[:, 0].tolist() == [784, 10_384, 792, 10_392]
    assert not set(windows.held_out_BT.flatten().tolist()) & set(torch.cat(windows.train).flatten().tolist())


def test_no_more_than_a_share_is_held_out() -> None:
    windows = split_windows([numbered(0, 800)], LENGTH, 1000)
    assert len(windows.held_out_BT) == 5


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(BadInput, match=r"a text has 9 tokens.*smaller --length"):
        split_windows([numbered(0, 9)], LENGTH, 1)


def test_texts_take_turns_and_every_window_is_seen_once_an_epoch() -> None:
    windows = split_windows([numbered(0, 168), numbered(10_000, 88)], LENGTH, 2)
    long, short = (len(text) for text in windows.train)
    assert (long, short) == (20, 10)
    firsts = windows.batch(0, 2 * long, seed=1)[:, 0].tolist()
    assert sorted(firsts[::2]) == list(range(0, 160, LENGTH))
    epochs = firsts[1::2][:short], firsts[1::2][short:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10_000, 10_080, LENGTH))
    assert epochs[0] != epochs[1]


def test_any_part_of_the_stream_can_be_asked_for() -> None:
    windows = split_windows([numbered(0, 400), numbered(1000, 240)], LENGTH, 2)
    whole = windows.batch(0, 60, seed=3)
    assert torch.equal(windows.batch(17, 20, seed=3), whole[17:37])
    assert not torch.equal(windows.batch(0, 60, seed=4), whole)


def test_how_often_texts_are_read() -> None:
    windows = Windows((torch.zeros(2, 4), torch.zeros(8, 4)), torch.zeros(1, 4))
    assert windows.rounds(16) == [4.0, 1.0]


@pytest.mark.parametrize(
    ("rounds", "held_out", "wanted"), [(6.0, 0.285, True), (0.9, 0.285, False), (6.0, 0.23, False)]
)
def test_more_text_is_advised_where_it_lacks(rounds: float, held_out: float, wanted: bool) -> None:
    found = {"train_kl": 0.220, "held_out_kl": held_out}
    assert read_too_often({"rounds": {"long": 0.1, "short": rounds}, "overfitting": found}) == wanted
    assert not read_too_often({"rounds": {"short": rounds}, "overfitting": None})


def test_the_teacher_writes_likely_text(tiny: TinyModels) -> None:
    """All of it, the same for the same seed, and likelier than random tokens."""
    teacher = tiny.source_model("llama-gqa")
    text = write_text(teacher, 256, 16, 70, seed=1)
    assert text.shape == (70 * 16,)
    assert torch.equal(text, write_text(teacher, 256, 16, 70, seed=1))
    assert not torch.equal(text, write_text(teacher, 256, 16, 70, seed=2))
    written = text.view(70, 16)
    start = torch.full((70, 1), 256)
    random = torch.randint(0, 256, written.shape)
    losses = [teacher(input_ids=tokens, labels=tokens).loss.item() for tokens in (
        torch.cat((start, written), 1), torch.cat((start, random), 1))]  # fmt: skip
    assert losses[0] < losses[1] - 1


def test_the_teacher_stops_writing_when_told(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes ten seconds with every look at it: a batch begins at 0, 30 and 60, not at 90."""
    teacher = tiny.source_model("llama-gqa")
    assert len(write_text(teacher, 256, 4, 200, seed=1, deadline=time.monotonic())) == 4 * 64
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    assert len(write_text(teacher, 256, 4, 1000, seed=1, deadline=75.0)) == 4 * 64 * 3


def test_the_teacher_writes_less_at_once_where_memory_is_short(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny.source_model("llama-gqa")
    sizes, generate = list[int](), teacher.generate

    def short_of_memory(**asked: Any) -> Tensor:
        sizes.append(len(asked["input_ids"]))
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError
        return generate(**asked)

    monkeypatch.setattr(teacher, "generate", short_of_memory)
    assert len(write_text(teacher, 256, 4, 40, seed=1)) == 4 * 40
    assert sizes == [40, 32, 16, 16, 8]


def step(number: int, loss: float = 1.0) -> Step:
    return Step(number, number / 10, float(number), 100 * (number + 1), loss, loss, loss, 0.1, 1.0)


def test_a_journal_is_read_again_up_to_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for entry in (HeldOut(0, 0, 2.0, 1.0), step(0), step(1), step(1, loss=0.5)):
        journal.write(entry)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 2, "fraction": 0.2})[:-5])
    again = Journal(path)
    again.write(step(2))
    again = Journal(path)
    assert again.steps == {0: step(0), 1: step(1, loss=0.5), 2: step(2)}
    assert again.held_out == {0: HeldOut(0, 0, 2.0, 1.0)}
    assert again.seconds == 2.0
    again.cut(1)
    assert again.steps == {0: step(0)}


def test_the_running_mean_has_no_start_bias() -> None:
    assert_numbers(running_mean([3.0, 3.0, 3.0]), [3.0, 3.0, 3.0], "fp64")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "either --minutes or --tokens"),
        ({"tokens": 1, "minutes": 1.0}, "either --minutes or --tokens"),
        ({"tokens": -1}, "must not be negative"),
        ({"tokens": 1, "trained": "mlp"}, "attention, all, lora"),
        ({"tokens": 1, "precision": "float16"}, "float32, bfloat16"),
        ({"tokens": 1, "rate": 0.0}, "--rate and --temperature must be positive"),
        ({"tokens": 1, "objective": Objective(beta=0.0, ce=False)}, "nor 0 without cross-entropy"),
        ({"tokens": 1, "objective": Objective(hidden=-1.0)}, "--hidden must not be negative"),
        ({"tokens": 1, "length": 1}, "--length at least 2"),
        ({"tokens": 1, "cuda_graph": True, "batch": 5, "together": 2}, "--batch that --together divides"),
        ({"tokens": 1, "cuda_graph": True, "recompute": True}, "goes without --recompute"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRecipe, match=said):
        HealingRequest("model", "teacher", ("text",), **wrong)  # type: ignore[arg-type]


def test_windows_are_plain_data() -> None:
    assert Windows((torch.zeros(1, 2),), torch.zeros(1, 2)).batch(0, 1, 0).shape == (1, 2)
