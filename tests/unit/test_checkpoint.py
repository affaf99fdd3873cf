"""Reading what is whole, refusing what is not, and writing all or nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from care.checkpoint import INDEX_NAME, SINGLE_NAME, SafetensorsReader, StateReader, check_finite, read_json
from care.errors import BadInput
from care.output import CheckpointWriter, DirectoryWriter, check_output_free, check_space

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor([1, 2])}
SHARDS = {"model-00001-of-00002.safetensors": ("a",), "model-00002-of-00002.safetensors": ("b", "c")}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards with an index."""
    directory = tmp_path / "model"
    directory.mkdir()
    for shard, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in SHARDS.items() for name in names}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_shards_are_read_as_they_were_written(sharded: Path) -> None:
    reader = SafetensorsReader(sharded)
    assert reader.names() == ("a", "b", "c")
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    assert reader.num_bytes() == sum((sharded / shard).stat().st_size for shard in SHARDS)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    assert set(SafetensorsReader(tmp_path).names()) == set(TENSORS)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"lacks model-00002-of-00002\.safetensors.*fetch the missing shard"):
        SafetensorsReader(sharded)


def test_tensor_missing_in_its_shard(sharded: Path) -> None:
    save_file({"b": TENSORS["b"]}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(BadInput, match=r"tensor c is in .* but not in model-00002"):
        SafetensorsReader(sharded)


@pytest.mark.parametrize("index", ["{", "[]", "{}"])
def test_damaged_index(sharded: Path, index: str) -> None:
    (sharded / INDEX_NAME).write_text(index)
    with pytest.raises(BadInput, match=INDEX_NAME):
        SafetensorsReader(sharded)


@pytest.mark.parametrize("size", [0, 4, 50, -1])
def test_truncated_shard(sharded: Path, size: int) -> None:
    """Cut in the length, in the header and in the data."""
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(BadInput, match=r"model-00001-of-00002\.safetensors is truncated or not a safetensors file"):
        SafetensorsReader(sharded)


def test_corrupt_header(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:16] = b"\xff" * 8
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="not a safetensors file"):
        SafetensorsReader(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"would not even parse")
    with pytest.raises(BadInput, match="only pickled weights, which can run code"):
        SafetensorsReader(tmp_path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no safetensors weights"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    bad = torch.zeros(3, 2)
    bad[1, 1] = value
    save_file({"good": torch.zeros(2), "bad": bad}, tmp_path / SINGLE_NAME)
    reader = SafetensorsReader(tmp_path)
    reader.read("good")
    with pytest.raises(BadInput, match="tensor bad holds NaN or Inf"):
        reader.read("bad")
    with pytest.raises(BadInput, match="tensor bad"):
        StateReader({"bad": bad}).read("bad")


def test_integers_are_finite() -> None:
    assert check_finite("c", TENSORS["c"]) is TENSORS["c"]


def test_state_reader_is_a_reader() -> None:
    reader = StateReader(TENSORS)
    assert reader.names() == tuple(TENSORS)
    assert reader.shape("a") == (2, 3)
    assert reader.read("a") is not None
    assert torch.equal(reader.read("a"), TENSORS["a"])
    assert reader.num_bytes() == 6 * 4 + 4 * 2 + 2 * 8


@pytest.mark.parametrize("content", [None, "{", "[1]", "\xff"])
def test_unreadable_json_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=r"config\.json"):
        read_json(file)


def test_writer_leaves_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out, 2) as writer:
        writer.write_shard(1, {"a": TENSORS["a"]})
        assert not out.exists()
        writer.write_shard(2, {"b": TENSORS["b"]})
        writer.finish({"model_type": "x"}, {"seconds": 1.0})
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    reader = SafetensorsReader(out)
    assert {name: reader.read(name).tolist() for name in reader.names()} == {
        name: TENSORS[name].tolist() for name in ("a", "b")
    }
    assert json.loads((out / INDEX_NAME).read_text())["metadata"]["total_size"] == 6 * 4 + 4 * 2
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"}
    assert json.loads((out / "conversion.json").read_text()) == {"seconds": 1.0}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path / "out", 2) as writer:
            writer.write_shard(1, {"a": TENSORS["a"]})
            assert any((tmp_path / "out.partial").iterdir())
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_view_is_written_whole(tmp_path: Path) -> None:
    """safetensors refuses tensors that are not contiguous."""
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.write_tensors("t.safetensors", {"a": TENSORS["a"].T}, {})
    assert torch.equal(load_file(tmp_path / "out" / "t.safetensors")["a"], TENSORS["a"].T)


def test_an_occupied_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(BadInput, match="is not empty"):
            check_output_free(taken)
        with pytest.raises(BadInput, match="is not empty"), DirectoryWriter(taken):
            raise AssertionError("entered")
    check_output_free(tmp_path / "new")
    assert (tmp_path / "mine").read_text() == "x"


def test_space_is_asked_of_the_first_parent_that_exists(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(BadInput, match=f"{tmp_path} has .* GB free, the output needs 1000000000.0 GB"):
        check_space(tmp_path / "not" / "yet", 10**18)
