"""Layers from the shards, one at a time, against the whole model in memory: not a bit may differ."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from care.calibration import DecoderLayers, Stream, WholeModel
from care.calibration.layers import HEAD
from care.conversion import convert
from care.modeling.loading import checkpoint_layout
from care.modeling.streaming import StreamedWeights
from care.plan import plan_conversion
from care.recipe import load_recipe
from care.source import Source, open_source
from care.statistics import CalibrationRequest, calibrate
from tiny import NUM_WINDOWS, TINY, WINDOW, TinyModels, collected, random_tokens, save_tokenizer

SEED = 11


def whole(source: Source) -> DecoderLayers:
    """The layers of a model that transformers loaded."""
    return DecoderLayers(source.model, source.layer_paths, WholeModel())


def streamed(source: Source) -> tuple[StreamedWeights, DecoderLayers]:
    """The layers from the shards, and what loads them."""
    weights = StreamedWeights(source.location, source.reader, source.layer_paths, "cpu")
    return weights, DecoderLayers(weights.model, source.layer_paths, weights)


@pytest.mark.parametrize("name", list(TINY))
def test_statistics_are_those_of_the_whole_model(tiny: TinyModels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, over more than one batch."""
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 40)
    source, tokens = tiny.source(name), random_tokens(16, batch=5)
    runs = [
        collected(replace(source.observed, layers=layers), tokens, random_tokens(24, batch=3), seed=SEED)
        for layers in (streamed(source)[1], whole(source))
    ]
    for one, other in zip(*runs, strict=True):
        for field in fields(one):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), field.name


@pytest.mark.parametrize("name", list(TINY))
def test_logits_and_gradients_are_those_of_one_pass(tiny: TinyModels, name: str) -> None:
    """Forward and backward through layers that are run again, against transformers and autograd."""
    source, tokens = tiny.source(name), random_tokens(20, batch=3)
    model, (_, layers) = tiny.source_model(name), streamed(source)
    entering: list[torch.Tensor] = []
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, output: entering.append(output.requires_grad_())
    )
    logits_BTV = model(input_ids=tokens, use_cache=False).logits
    embedded.remove()
    weights_BTV = torch.randn_like(logits_BTV)
    expected_BTD = torch.autograd.grad((logits_BTV * weights_BTV).sum(), entering)[0]

    hidden = [next(layers.embed([tokens]))]
    for index in range(len(layers)):
        with layers.holding(index):
            hidden.append(layers.run(index, hidden[-1]))
    last_BTD = hidden[-1].requires_grad_()
    with layers.head():
        found_BTV = layers.logits(last_BTD)
        gradient_BTD = torch.autograd.grad((found_BTV * weights_BTV).sum(), last_BTD)[0]
    assert torch.equal(found_BTV, logits_BTV)
    for index in reversed(range(len(layers))):
        with layers.holding(index):
            gradient_BTD = layers.pulled_back(index, hidden[index], gradient_BTD)
    assert torch.equal(gradient_BTD, expected_BTD)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-moe", "gemma3-local"])
def test_only_what_is_used_is_in_memory(tiny: TinyModels, name: str) -> None:
    source = tiny.source(name)
    weights, layers = streamed(source)

    def held() -> set[str]:
        return {path for path, parameter in weights.model.named_parameters() if not parameter.is_meta}

    assert held() == set()
    with layers.holding(1):
        assert held() == {path for path in source.model.state_dict() if path.startswith("model.layers.1.")}
    with pytest.raises(ZeroDivisionError), layers.holding(2):
        raise ZeroDivisionError
    with weights.holding(HEAD):
        tied = source.config["tie_word_embeddings"]
        assert held() == {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}
    assert held() == set()


@pytest.mark.parametrize("wide", ["", "gate.weight", "norm.weight"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-moe"])
def test_stored_types_become_fp32_without_loss(tiny: TinyModels, name: str, wide: str, tmp_path: Path) -> None:
    """bf16, and beside it tensors in fp32 that bf16 cannot hold."""
    state = {
        key: tensor.clone() if wide and key.endswith(wide) else tensor.bfloat16()
        for key, tensor in checkpoint_layout(tiny.source_model(name), tiny.source_model(name).state_dict()).items()
    }
    tiny.source_model(name).config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    save_tokenizer(tmp_path)
    source = open_source(str(tmp_path))
    expected = source.model.state_dict()
    weights, layers = streamed(source)
    with layers.holding(1):
        found = {path: p for path, p in weights.model.named_parameters() if not p.is_meta}
        assert len(found) > 5
        for path, parameter in found.items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[path]), path


@pytest.mark.parametrize("recipe", ["best", "best-rebuild", "transmla"])
def test_conversion_is_that_of_the_whole_model(tiny: TinyModels, recipe: str, tmp_path: Path) -> None:
    """From a checkpoint in many shards: statistics, folding, and the refit's two streams."""
    tiny.source_model("llama3-rope").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    save_tokenizer(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    for out in ("streamed", "whole"):
        source = open_source(str(tmp_path / "source"))
        if out == "whole":
            source.__dict__["layers"] = whole(source)
        request = CalibrationRequest(str(tiny.text_file), NUM_WINDOWS, WINDOW, context=2 * WINDOW)
        chosen = load_recipe(recipe, format="native")
        calibration = calibrate(source, request, chosen.needs)
        convert(plan_conversion(source, chosen, 0.5, calibration), tmp_path / out)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.name != "conversion.json"}
        for out in ("streamed", "whole")
    ]
    assert files[0] == files[1]


def test_streams_give_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 12)
    hidden_BTD = torch.randn(7, 5, 3)
    stream = Stream(tmp_path, "hidden", (7, 5, 3)).at(2)
    assert not stream.exists
    stream.write(hidden_BTD.split(2))
    assert stream.exists
    assert [len(batch_BTD) for batch_BTD in stream.batches()] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(list(stream.batches())), hidden_BTD)
    assert [p.name for p in tmp_path.iterdir()] == ["hidden-00002.fp32"]
    stream.remove()
    assert not stream.exists


def test_a_stream_is_cut_to_its_first_windows(tmp_path: Path) -> None:
    hidden_BTD = torch.randn(4, 5, 3)
    stream = Stream(tmp_path, "hidden", (4, 5, 3))
    stream.write([hidden_BTD])
    stream.cut(2)
    assert not stream.exists
    assert stream.path.stat().st_size == 4 * 2 * 5 * 3
    assert torch.equal(torch.cat(list(stream.first(2).batches())), hidden_BTD[:2])
    stream.cut(0)
    assert not stream.path.exists()


def test_a_stream_that_stops_is_not_there(tmp_path: Path) -> None:
    stream = Stream(tmp_path, "hidden", (2, 5, 3))

    def batches():
        yield torch.randn(1, 5, 3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream.write(batches())
    assert not stream.exists
    assert not stream.path.exists()
