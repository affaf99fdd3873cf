"""A model whose weights are in memory only while they are used: one decoder layer, the embeddings or the head.

The model is built without weights. A part's tensors are read from the checkpoint when it is entered, go through
transformers' own conversion (a mixture's experts, one by one in files, are fused in memory), and are dropped when it
is left.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..calibration.layers import EMBEDDINGS, HEAD
from ..checkpoint import TensorReader
from ..errors import BadInput
from .loading import Location


class StreamedWeights:
    """Holds parts of a model's checkpoint in fp32, one at a time; `model` has everything else."""

    def __init__(self, location: Location, reader: TensorReader, layer_paths: list[str], device: str) -> None:
        self._reader, self._device = reader, device
        config = transformers.AutoConfig.from_pretrained(location.directory)
        with init_empty_weights(include_buffers=False):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model = model.eval()
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        self._names = self._parts(layer_paths)

    def _parts(self, layer_paths: list[str]) -> dict[str, list[str]]:
        """Names of each part's tensors in the checkpoint; a tied head has those of the embeddings."""
        embeddings = self.model.get_input_embeddings()
        path = next(path for path, module in self.model.named_modules() if module is embeddings)
        tied = set(self.model.all_tied_weights_keys)
        parts: dict[str, list[str]] = {EMBEDDINGS: [], HEAD: [], **{path: [] for path in layer_paths}}
        for name in self._reader.names():
            layer = ".".join(name.split(".")[: layer_paths[0].count(".") + 1])
            if layer in parts:
                parts[layer].append(name)
            elif name.startswith(f"{path}."):
                parts[EMBEDDINGS].append(name)
            elif name not in tied:
                parts[HEAD].append(name)
        if tied:
            parts[HEAD] += parts[EMBEDDINGS]
        return parts

    @contextmanager
    def holding(self, part: str) -> Generator[None]:
        """Have a part's weights in memory: a layer by its path, EMBEDDINGS or HEAD."""
        before = {id(p) for p in self.model.parameters() if not p.is_meta}
        self._load(part)
        try:
            yield
        finally:
            for module in self.model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if not parameter.is_meta and id(parameter) not in before:
                        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _load(self, part: str) -> None:
        """Experts are fused in the type that they are stored in, and one tensor after the other becomes fp32."""
        conversion: Any = get_model_conversion_mapping(self.model)
        tensors = {name: self._reader.read(name) for name in self._names[part]}
        stored = {tensor.dtype for tensor in tensors.values()}
        dtype = stored.pop() if len(stored) == 1 else torch.float32
        config = LoadStateDictConfig(dtype=dtype, device_map={"": self._device}, weight_mapping=conversion)
        for parameter in self.model.parameters():
            if parameter.is_meta:  # transformers loads in the type of the parameter
                parameter.data = parameter.data.to(dtype)
        with _no_progress_bar():
            report, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        del tensors
        if report.conversion_errors or report.mismatched_keys or report.unexpected_keys:
            raise BadInput(f"the tensors of {part} do not fit the model of config.json: {report}")
        if part == HEAD:
            self.model.tie_weights()
        for parameter in self.model.parameters():
            parameter.requires_grad = False
            if not parameter.is_meta:
                parameter.data = parameter.data.float()


@contextmanager
def _no_progress_bar() -> Generator[None]:
    """Without transformers' bar for every layer; who runs layers shows progress over all of them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
