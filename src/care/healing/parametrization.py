"""The student's weights in a form that one learning rate suits, and back into its format.

A latent's basis is free: for any invertible A, (up A^-1)(A down) is the same map. Conversion leaves a basis in which
directions differ by orders of magnitude, and deepseek scales the whole latent to 1e-12. Adam moves every entry by the
learning rate whatever its size, so a rate that is right for one direction is noise or ruin for another. Before
training each latent gets the balanced basis: with up down = U S V^T, up is U S^1/2 and down is S^1/2 V^T. Nothing
is inverted, so directions that a factorization left empty do no harm. What is left is one scale per matrix, and a
matrix's rate is its rms times the rate of the run: a rate is a relative step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.deepseek import LATENT_NORM_EPS, latent_scale
from ..modeling.attention import LatentAttentionModule
from ..modeling.shape import LatentShape

LEAST_RMS = 1e-3
"""Scale of a tensor of zeros, such as an untrained bias."""


def balanced(down_RX: Tensor, up_ER: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up down with its singular values shared out evenly, in fp64: (R, X) and (E, R)."""
    q_ER, r_RR = torch.linalg.qr(up_ER.double())
    p_XR, s_RR = torch.linalg.qr(down_RX.double().T)
    u_RR, values_R, v_RR = torch.linalg.svd(r_RR @ s_RR.T, full_matrices=False)
    root_R = values_R.sqrt()
    return root_R[:, None] * (v_RR @ p_XR.T), (q_ER @ u_RR) * root_R


@dataclass(frozen=True)
class Segment:
    """Latent rows [first, last) and what reads them: each reader is an up-projection and the columns it has of them."""

    first: int
    last: int
    readers: tuple[tuple[nn.Linear, slice], ...]


def rebalance(kv_down: nn.Linear, num_latent: int, segments: Sequence[Segment]) -> None:
    """Balance every segment of a layer's latent; its scale becomes that of the rotary key's rows beside it."""
    weight = kv_down.weight.detach()
    rope = weight[num_latent:]
    scale = rms(rope) if len(rope) else weight.shape[1] ** -0.5
    bias = getattr(kv_down, "bias", None)
    down = weight if bias is None else torch.cat((weight, bias.detach()[:, None]), 1)
    with torch.no_grad():
        for segment in segments:
            rows = slice(segment.first, segment.last)
            ups = [up.weight[:, columns] for up, columns in segment.readers]
            new_RX, new_ER = _fitted_shapes(down[rows], torch.cat(ups))
            factor = scale / max(rms(new_RX), torch.finfo(torch.float32).tiny)
            kv_down.weight[rows] = (new_RX[:, : weight.shape[1]] * factor).to(weight)
            if bias is not None:
                bias[rows] = (new_RX[:, -1] * factor).to(weight)
            parts = (new_ER / factor).split([len(up) for up in ups])
            for (up, columns), part in zip(segment.readers, parts, strict=True):
                up.weight[:, columns] = part.to(up.weight)


def _fitted_shapes(down_RX: Tensor, up_ER: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced, with rows and columns of zeros where the product has fewer dimensions than the latent."""
    R = len(down_RX)
    new_RX, new_ER = balanced(down_RX, up_ER)
    lacking = R - len(new_RX)
    if lacking:
        new_RX = torch.cat((new_RX, new_RX.new_zeros(lacking, new_RX.shape[1])))
        new_ER = torch.cat((new_ER, new_ER.new_zeros(len(new_ER), lacking)), 1)
    return new_RX, new_ER


def native_segments(module: LatentAttentionModule) -> list[Segment]:
    """The parts of a native latent that keys and values read alike."""
    s: LatentShape = module.shape
    first_value = s.kv_lora_rank - s.value_rank
    cuts = sorted({0, first_value, s.key_rank, s.kv_lora_rank})
    segments = []
    for first, last in pairwise(cuts):
        readers = []
        if last <= s.key_rank:
            readers.append((module.k_b_proj, slice(first, last)))
        if first >= first_value:
            readers.append((module.v_b_proj, slice(first - first_value, last - first_value)))
        segments.append(Segment(first, last, tuple(readers)))
    return segments


def open_native(model: nn.Module) -> None:
    """Balance the latents of a native model in place."""
    for _, module in native_layers(model):
        rebalance(module.kv_a_proj_with_mqa, module.shape.kv_lora_rank, native_segments(module))


def native_layers(model: nn.Module) -> Iterator[tuple[str, LatentAttentionModule]]:
    """Latent attention of every layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, LatentAttentionModule):
            yield path, module


def deepseek_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attention modules of transformers' DeepSeek classes with their paths."""
    for path, module in model.named_modules():
        if path.endswith(".self_attn"):
            yield path, module


def open_deepseek(model: nn.Module) -> None:
    """Undo the scaling of the latent and take its norm out, which is a linear map here; then balance, in place."""
    for _, module in deepseek_layers(model):
        R = module.kv_lora_rank
        with torch.no_grad():
            weight_R = module.kv_a_layernorm.weight.double() / LATENT_NORM_EPS**0.5
            down = module.kv_a_proj_with_mqa.weight
            down[:R] = (weight_R[:, None] * down[:R].double()).to(down)
        module.kv_a_layernorm = nn.Identity()
        rebalance(module.kv_a_proj_with_mqa, R, [Segment(0, R, ((module.kv_b_proj, slice(None)),))])


def close_deepseek(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A layer's trained tensors by name, with the latent scaled down again and the norm's weight that undoes it."""
    down = tensors["kv_a_proj_with_mqa.weight"].double()
    shrink, norm_weight = latent_scale(down[:rank])
    return {
        **tensors,
        "kv_a_proj_with_mqa.weight": torch.cat((down[:rank] * shrink, down[rank:])),
        "kv_a_layernorm.weight": torch.full((rank,), norm_weight, dtype=torch.float64),
    }


def rms(tensor: Tensor) -> float:
    """Root of the mean square."""
    return float(tensor.detach().double().square().mean().sqrt())


def relative_rate(parameter: Tensor) -> float:
    """What the rate of the run is multiplied by for a parameter."""
    return max(rms(parameter), LEAST_RMS)
