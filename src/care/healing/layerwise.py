"""Before any training: output projections refit by ridge, layer by layer, with no backward pass (care.refit).

The streams of teacher and student go through their layers side by side. A projection is fitted so that the student's
residual stream after attention comes out as the teacher's, drift included; then the student's stream moves on with it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..calibration import DecoderLayers, Stream, WholeModel, batches_of
from ..prefix import compared
from ..progress import Track, silent
from ..refit import OutputMoments, Ridge
from .students import stream_scale


def refit_outputs(
    student: Any,  # noqa: ANN401 - transformers models
    teacher: Any,  # noqa: ANN401
    windows_BT: Tensor,
    *,
    post_norm: bool,
    track: Track = silent,
) -> Mapping[str, Tensor]:
    """New output projections by parameter name; the student has them already. Teacher and student are of one shape."""
    paths = [f"model.layers.{index}" for index in range(student.config.num_hidden_layers)]
    scale = stream_scale(student, teacher)
    own, theirs = (DecoderLayers(model, paths, WholeModel(), str(model.device)) for model in (student, teacher))
    found = dict[str, Tensor]()
    with TemporaryDirectory(prefix="care-") as directory:
        shape = (len(windows_BT), windows_BT.shape[1], own.hidden_size)
        streams = [Stream(Path(directory), name, shape) for name in ("student", "teacher")]
        batches = batches_of(windows_BT)
        for stream, layers in zip(streams, (own, theirs), strict=True):
            stream.write(layers.embed(batches))
        for index, path in enumerate(track(paths, label="refitting layers", total=len(paths))):
            projection = student.get_submodule(f"{path}.self_attn.o_proj")
            moments = OutputMoments(projection.weight, projection.bias)
            read = partial(own.input_of, index, f"{path}.self_attn.o_proj")
            entering = (streams[1].at(index), streams[0].at(index))
            left = compared(
                theirs, index, f"{path}.self_attn", entering, read, moments, post_norm=post_norm, scale=scale
            )  # fmt: skip
            streams[1].at(index + 1).write(left)
            with torch.no_grad():
                projection.weight.copy_(Ridge().fitted(moments))
            streams[0].at(index + 1).write(own.run(index, b) for b in streams[0].at(index).batches())
            for stream in streams:
                stream.at(index).remove()
            found[f"{path}.self_attn.o_proj.weight"] = projection.weight.detach().clone()
    return found
