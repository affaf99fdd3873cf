"""Statistics on disk: a round trip, and refusing what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from care.calibration import Calibration, is_calibration, load_calibration
from care.errors import BadInput
from care.statistics import STATISTICS, CalibrationRequest, calibrate, describe_run
from tiny import NUM_WINDOWS, WINDOW, TinyModels, random_text
from tolerances import assert_close


@pytest.fixture
def saved(tiny: TinyModels, tmp_path: Path) -> tuple[Calibration, Path]:
    """Statistics and where they were saved."""
    request = CalibrationRequest(str(tiny.text_file), NUM_WINDOWS, WINDOW, seed=1, context=WINDOW)
    calibration = calibrate(tiny.source("llama-gqa"), request, STATISTICS, directory=tmp_path / "stats")
    return replace(calibration, layers=list(calibration.layers)), tmp_path / "stats"


def test_round_trip_is_bit_identical(saved: tuple[Calibration, Path]) -> None:
    before, directory = saved
    after = load_calibration(directory)
    assert is_calibration(directory)
    assert after.info == before.info
    assert torch.equal(after.windows_BT, before.windows_BT)
    assert len(after.layers) == len(before.layers) == 3
    for one, other in zip(before.layers, after.layers, strict=True):
        assert one.num_tokens == other.num_tokens
        assert torch.equal(one.input_moment_XX, other.input_moment_XX)
        assert torch.equal(one.input_magnitude_X, other.input_magnitude_X)


def test_layers_are_a_sequence(saved: tuple[Calibration, Path]) -> None:
    layers = load_calibration(saved[1]).layers
    assert [s.num_tokens for s in layers[1:]] == [layers[1].num_tokens, layers[2].num_tokens]
    with pytest.raises(IndexError):
        _ = layers[3]


def test_saved_statistics_are_used_by_their_source(tiny: TinyModels, saved: tuple[Calibration, Path]) -> None:
    again = calibrate(tiny.source("llama-gqa"), CalibrationRequest(str(saved[1])))
    assert again.info == saved[0].info


def test_several_texts_are_mixed_in_equal_shares(tiny: TinyModels, tmp_path: Path) -> None:
    """Moments are means over tokens, so those of a mix are the mean of those of its texts."""
    names = [str(tmp_path / name) for name in ("one.txt", "other.txt")]
    for seed, name in enumerate(names):
        Path(name).write_text(random_text(2000, seed))
    source = tiny.source("llama-gqa")
    alone = [calibrate(source, CalibrationRequest(name, 4, WINDOW, seed=1)).layers for name in names]
    request = CalibrationRequest(names[0], 8, WINDOW, seed=1, context=WINDOW, also=(names[1],))
    both = calibrate(source, request, STATISTICS)
    assert (both.info.text, both.info.also, both.info.num_windows) == (names[0], (names[1],), 8)
    assert both.info.gradient_windows == 2
    for index, mixed in enumerate(both.layers):
        for field in ("input_moment_XX", "input_magnitude_X"):
            one, other = (getattr(layers[index], field) for layers in alone)
            assert_close(getattr(mixed, field), (one + other) / 2, "fp32 moments")
    before = describe_run(source, request)
    Path(names[1]).write_text(random_text(2000, 7))
    assert describe_run(source, request)["text"][0] == before["text"][0]
    assert describe_run(source, request)["text"][1] != before["text"][1]


def test_texts_that_cannot_be_mixed_are_named(
    tiny: TinyModels, saved: tuple[Calibration, Path], tmp_path: Path
) -> None:
    source, text, short = tiny.source("llama-gqa"), str(tiny.text_file), tmp_path / "short.txt"
    short.write_text("too short")
    for request, words in (
        (CalibrationRequest(text, also=(str(saved[1]),)), "saved statistics cannot be mixed"),
        (CalibrationRequest(text, 8, WINDOW, also=(text,)), "the same text is given twice"),
        (CalibrationRequest(text, 1, WINDOW, also=(str(short),)), "1 windows cannot be taken of 2 texts"),
        (CalibrationRequest(text, 8, WINDOW, also=(str(short),)), "short.txt has 9 tokens, less than one window of 32"),
    ):
        with pytest.raises(BadInput, match=words):
            calibrate(source, request)


@pytest.mark.parametrize("other", ["llama-mha", "llama3-rope", "mistral"])
def test_statistics_of_another_source_are_refused(
    tiny: TinyModels, saved: tuple[Calibration, Path], other: str
) -> None:
    """Also of one with the same shapes."""
    with pytest.raises(BadInput, match=r"was calibrated on .*llama-gqa, not on .*" + other):
        calibrate(tiny.source(other), CalibrationRequest(str(saved[1])))


def test_the_same_weights_elsewhere_are_the_same_source(
    tiny: TinyModels, saved: tuple[Calibration, Path], tmp_path: Path
) -> None:
    from care.source import open_source

    moved = shutil.copytree(tiny.directory("llama-gqa"), tmp_path / "moved")
    assert calibrate(open_source(str(moved)), CalibrationRequest(str(saved[1]))).info == saved[0].info


def test_a_missing_layer_is_named(saved: tuple[Calibration, Path]) -> None:
    (saved[1] / "layer-00001.safetensors").unlink()
    layers = load_calibration(saved[1]).layers
    _ = layers[0]
    with pytest.raises(BadInput, match=r"layer-00001\.safetensors is missing or damaged.*calibrate again"):
        _ = layers[1]


def test_damaged_tokens_are_named(saved: tuple[Calibration, Path]) -> None:
    (saved[1] / "tokens.safetensors").write_bytes(b"1")
    with pytest.raises(BadInput, match=r"tokens\.safetensors is missing or damaged"):
        load_calibration(saved[1])


def test_another_versions_explanation_is_refused(saved: tuple[Calibration, Path]) -> None:
    file = saved[1] / "calibration.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_key": 1}))
    with pytest.raises(BadInput, match="not of this version of care; calibrate again"):
        load_calibration(saved[1])


def test_nothing_but_statistics_is_left(saved: tuple[Calibration, Path]) -> None:
    """No hidden states."""
    layers = [f"layer-{index:05d}.safetensors" for index in range(3)]
    assert sorted(p.name for p in saved[1].iterdir()) == ["calibration.json", *layers, "tokens.safetensors"]


def test_other_directories_are_no_statistics(tiny: TinyModels, tmp_path: Path) -> None:
    assert not is_calibration(tmp_path)
    assert not is_calibration(tmp_path / "absent")
    assert not is_calibration(tiny.text_file)
