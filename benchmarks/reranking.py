"""Ranks chosen again on a trained latent model: the least used directions of all layers go, and the model is smaller.

With C the second moment of a layer's latent and F that of the gradients at the keys and values that are read from it,
directions of F^(1/2) up C^(1/2) are weighed in nats, as at conversion (care.factorization.two_sided), but of the
trained model itself. One threshold over all layers says which of them stay; rope slots stay as they are.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from care.allocation.threshold import Threshold
from care.factorization import Problem, TwoSided
from care.healing.parametrization import native_layers
from care.linalg import shrink
from care.modeling.loading import load_model, locate
from care.output import partial_of


class _Moments:
    """Sums over tokens of c c^T and g g^T of one layer, by hooks."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a latent attention module
        self._module, self._num_tokens = module, 0
        self._latent: Tensor | float = 0.0
        self._output: Tensor | float = 0.0
        self._gradients: dict[str, Tensor] = {}
        module.v_b_proj.register_forward_hook(self._read)
        for name in readers(module):
            module.get_submodule(name).register_full_backward_hook(
                lambda _module, _inputs, outputs, name=name: self._gradients.__setitem__(name, outputs[0])
            )

    def _read(self, _module: object, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        rows = inputs[0].detach().flatten(0, -2)
        self._latent = self._latent + (rows.T @ rows).double()
        self._num_tokens += len(rows)

    def take(self) -> None:
        """Add the gradients of the last backward pass."""
        rows = torch.cat([self._gradients[name] for name in readers(self._module)], -1).flatten(0, -2)
        self._output = self._output + (rows.T @ rows).double()

    def problem(self) -> Problem:
        """The up-projections, keys above values, in the metrics of the latent and of what is read from it."""
        assert isinstance(self._latent, Tensor)
        assert isinstance(self._output, Tensor)
        method = TwoSided()
        ups = [self._module.get_submodule(name).weight.detach().double() for name in readers(self._module)]
        return Problem(
            torch.cat(ups),
            shrink(self._latent / self._num_tokens, method.shrinkage),
            method.shrunk_gradients(self._output / self._num_tokens, [len(up) for up in ups]),
        )


def readers(module: Any) -> list[str]:  # noqa: ANN401
    """The up-projections that a layer has."""
    return ["k_b_proj", "v_b_proj"] if module.shape.key_rank else ["v_b_proj"]


def weigh(model: Any, windows_BT: Tensor, seed: int) -> dict[str, Problem]:  # noqa: ANN401
    """Every layer of a model whose keys and values share a latent, on labels drawn from the model itself."""
    model.requires_grad_(requires_grad=False)
    model.get_input_embeddings().requires_grad_()  # so that gradients are asked for at all
    layers = dict(native_layers(model))
    moments = {path: _Moments(module) for path, module in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    for window_T in windows_BT:
        logp_TV = model(input_ids=window_T[None], use_cache=False).logits[0].log_softmax(-1)
        labels_T1 = torch.multinomial(logp_TV.detach().exp(), 1, generator=generator)
        (-logp_TV.gather(1, labels_T1).sum()).backward()
        for layer in moments.values():
            layer.take()
    return {path: layer.problem() for path, layer in moments.items()}


def choose_again(directory: Path, windows_BT: Tensor, widths: int, out: Path, *, seed: int = 0) -> list[int]:
    """Write the model in `directory` to `out` with layers that cache `widths` values in all; the new ranks."""
    model = load_model(locate(str(directory)), dtype=torch.float32)
    layers = dict(native_layers(model))
    problems = weigh(model, windows_BT, seed)
    choices = [{layers[path].shape.rope_dim // 2: (0.0, problem.energies())} for path, problem in problems.items()]
    ranks = [rank for _, rank in Threshold().choose(choices, widths)]
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for (path, problem), rank in zip(problems.items(), ranks, strict=True):
        tensors |= _cut_tensors(path, layers[path], problem, rank)
    _write(directory, out, {name: tensor.contiguous() for name, tensor in tensors.items()}, ranks)
    return ranks


def _cut_tensors(path: str, module: Any, problem: Problem, rank: int) -> dict[str, Tensor]:  # noqa: ANN401
    """A layer's tensors that change."""
    assert {module.shape.key_rank or module.shape.value_rank, module.shape.value_rank} == {module.shape.kv_lora_rank}
    assert module.kv_a_proj_with_mqa.bias is None
    solved = problem.solve(rank)
    down = module.kv_a_proj_with_mqa.weight.detach()
    latent, rope = down[: module.shape.kv_lora_rank], down[module.shape.kv_lora_rank :]
    names = readers(module)
    ups = solved.up_MR.split([len(module.get_submodule(name).weight) for name in names])
    return {
        f"{path}.kv_a_proj_with_mqa.weight": torch.cat(((solved.down_RX @ latent.double()).to(down), rope)),
        **{f"{path}.{name}.weight": up.to(down) for name, up in zip(names, ups, strict=True)},
    }


def _write(directory: Path, out: Path, tensors: dict[str, Tensor], ranks: Sequence[int]) -> None:
    """A checkpoint like the one in `directory`, but for these tensors and ranks."""
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, partial / name)
    config = json.loads((directory / "config.json").read_text())
    table = config["latent_attention"]
    table["key_rank"] = [rank if old else 0 for old, rank in zip(table["key_rank"], ranks, strict=True)]
    table["kv_lora_rank"] = table["value_rank"] = list(ranks)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    partial.rename(out)
