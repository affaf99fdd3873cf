"""A model to be healed: opened in balanced factors, with the weights that are trained, and back in its format."""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import BadInput
from ..formats.deepseek import MODEL_TYPE as DEEPSEEK_TYPE
from ..formats.native import MODEL_TYPE_PREFIX
from ..modeling.loading import Location, checkpoint_layout, load_config, load_model
from .parametrization import close_deepseek, deepseek_layers, open_deepseek, open_native, relative_rate

Trained = Literal["attention", "all", "lora"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
"""Attention alone, every weight, or low-rank additions to the matrices of attention."""

ATTENTION = ".self_attn."
LORA = re.compile(r"\.lora_[AB]\.")


def open_student(location: Location, trained: Trained, lora_rank: int, seed: int, changed: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """The model in fp32 and balanced factors, trained weights requiring gradients; the same on every call.

    `changed` are parameters that differ from the checkpoint's.
    """
    model = load_model(location, dtype=torch.float32)
    model.load_state_dict(changed, strict=False)
    model_type = load_config(location)["model_type"]
    if model_type == DEEPSEEK_TYPE:
        open_deepseek(model)
    elif model_type.startswith(MODEL_TYPE_PREFIX):
        open_native(model)
    model.requires_grad_(requires_grad=False)
    if trained == "lora":
        _add_lora(model, lora_rank, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, trained))
    return model.train()


def _is_trained(name: str, trained: Trained) -> bool:
    if trained == "lora":
        return bool(LORA.search(name))
    return trained == "all" or ATTENTION in name


def _add_lora(model: Any, rank: int, seed: int) -> None:  # noqa: ANN401
    """Low-rank additions to every matrix of attention, zero at the start."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise BadInput("--train lora needs peft; pip install 'care-mla[heal]'") from error
    torch.manual_seed(seed)
    target = r".*\.self_attn\.\w+_proj(_with_mqa)?"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=target), model)


def recompute_activations(model: Any) -> None:  # noqa: ANN401
    """Keep what enters each layer and compute the rest again in the backward pass."""
    # transformers 5.24 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def stream_scale(student: Any, teacher: Any) -> float:  # noqa: ANN401 - transformers models
    """How many times larger the student's hidden states are: deepseek scales them (docs/formats.md)."""
    return (student.config.rms_norm_eps / teacher.config.rms_norm_eps) ** 0.5


def rates(model: Any) -> dict[str, float]:  # noqa: ANN401
    """What the rate of the run is multiplied by, for each trained parameter.

    Its rms; for the second factor of a low-rank addition, which starts at zero, what moves the sum of both as far.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found[name] = relative_rate(parameter)
        if ".lora_B." in name:
            base = model.get_parameter(name.split(".lora_B.")[0] + ".base_layer.weight")
            first = model.get_parameter(name.replace(".lora_B.", ".lora_A."))
            found[name] = relative_rate(base) / (relative_rate(first) * len(first) ** 0.5)
    return found


def checkpoint_tensors(model: Any, trained: Trained) -> dict[str, Tensor]:  # noqa: ANN401
    """What training may have changed, by its names in the model's checkpoint, in fp32 or fp64."""
    if trained == "lora":
        _merge_lora(model)
    tied = set(model.all_tied_weights_keys)
    state: Mapping[str, Tensor] = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and not LORA.search(name)
    }
    tensors = dict(state if trained != "all" else checkpoint_layout(model, dict(state)))
    if trained != "all":
        tensors = {name: tensor for name, tensor in tensors.items() if ATTENTION in name}
    if model.config.model_type == DEEPSEEK_TYPE:
        for path, module in deepseek_layers(model):
            prefix = f"{path}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            tensors |= {prefix + name: t for name, t in close_deepseek(own, module.kv_lora_rank).items()}
    return tensors


def _merge_lora(model: Any) -> None:  # noqa: ANN401
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - an optional dependency

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
