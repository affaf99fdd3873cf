"""What healing minimizes: CE + beta tau^2 KL(teacher || student) at temperature tau (arXiv 2603.17946, Eq. 6-8).

Where teacher and student are of one shape, the distance of their hidden states can be added: it tells each layer how
far it strayed, which logits only tell all of them together.

Logits of all tokens at once would be the largest tensor of a step (2048 tokens of a 128k vocabulary: 1 GB, several
times over), so losses and their gradients with respect to hidden states are made a few positions at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import ShortenTraceback
from torch.nn import functional

from ..errors import BadInput, first_line
from .students import stream_scale

CHUNK, GPU_CHUNK = 256, 1024
"""Positions whose logits are held at a time: on a GPU more, as operations on few would wait to be started."""


@dataclass(frozen=True)
class Objective:
    """Weight of the divergence and its temperature, and of hidden states' distance; `ce` false leaves CE out."""

    beta: float = 1.0
    temperature: float = 1.0
    ce: bool = True
    hidden: float = 0.0

    def terms(self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Sums over N positions: what is minimized, CE, KL at the temperature: (3,)."""
        student_NV, teacher_NV = student_NV.float(), teacher_NV.float()
        logp_NV = (student_NV / self.temperature).log_softmax(-1)
        target_NV = (teacher_NV / self.temperature).log_softmax(-1)
        kl = functional.kl_div(logp_NV, target_NV, reduction="sum", log_target=True)
        if self.temperature != 1.0:
            logp_NV = student_NV.log_softmax(-1)
        ce = functional.nll_loss(logp_NV, labels_N, reduction="sum")
        loss = self.beta * self.temperature**2 * kl + (ce if self.ce else 0.0)
        return torch.stack((loss, ce, kl))


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: a projection, then a soft cap where the model has one."""

    weight_VD: Tensor
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":  # noqa: ANN401 - a transformers model
        """The output head of a causal language model; a frozen one in autocast's type, not cast for every chunk."""
        weight_VD = model.get_output_embeddings().weight
        kind = weight_VD.device.type
        if torch.is_autocast_enabled(kind) and not weight_VD.requires_grad:
            weight_VD = weight_VD.to(torch.get_autocast_dtype(kind))
        return cls(weight_VD, getattr(model.config, "final_logit_softcapping", None))

    def logits(self, hidden_ND: Tensor, weight_VD: Tensor, width: int) -> Tensor:
        """Logits (N, width) of the first `width` tokens; what a padded vocabulary has beyond is left out."""
        logits_NV = functional.linear(hidden_ND, weight_VD)[:, :width]
        return logits_NV if self.softcap is None else self.softcap * (logits_NV / self.softcap).tanh()


class _ChunkedTerms(torch.autograd.Function):
    """Terms of hidden states; gradients are taken chunk by chunk in the forward pass and kept instead of logits."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_ND: Tensor,
        weight_VD: Tensor,
        terms_of: Callable[[Tensor, Tensor, slice], Tensor],
    ) -> Tensor:
        terms = torch.zeros(3, device=hidden_ND.device)
        wanted = [tensor.requires_grad for tensor in (hidden_ND, weight_VD)]
        sums: list[Tensor | None] = [None, None]
        if wanted[0]:
            sums[0] = torch.empty_like(hidden_ND, dtype=torch.float32)
        if wanted[1]:
            sums[1] = torch.zeros_like(weight_VD, dtype=torch.float32)
        weight = weight_VD.detach().requires_grad_(wanted[1])
        chunk = GPU_CHUNK if hidden_ND.device.type == "cuda" else CHUNK
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden = hidden_ND[part].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                found = terms_of(hidden, weight, part)
                leaves = [leaf for leaf, want in zip((hidden, weight), wanted, strict=True) if want]
                gradients = iter(torch.autograd.grad(found[0], leaves) if leaves else ())
            terms += found.detach()
            if sums[0] is not None:
                sums[0][part] = next(gradients)
            if sums[1] is not None:
                sums[1] += next(gradients)
        ctx.gradients = sums
        return terms

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Of the first term alone: the others are for the reader."""
        return (*(None if g is None else g * outer[0][0] for g in ctx.gradients), None)


class Distiller(nn.Module):
    """Student and teacher as one module, so that Accelerate wraps and shards both at once."""

    def __init__(self, student: nn.Module, teacher: nn.Module, objective: Objective, *, cached: bool = False) -> None:
        super().__init__()
        self.student, self.terms, self.distance = student, objective.terms, state_distance
        self.cached = cached
        self.hidden = objective.hidden
        self.teacher = teacher.requires_grad_(requires_grad=False)
        # Where Accelerate finds which modules to shard one by one.
        self._no_split_modules: Any = sorted(
            {name for model in (student, teacher) for name in getattr(model, "_no_split_modules", None) or ()}
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Means over all predictions of windows (B, T): what is minimized, CE, KL: (3,). The first has a gradient."""
        labels_N = tokens_BT[:, 1:].flatten()
        with torch.no_grad():
            teacher_ND, teacher_states = self._hidden_states(self.teacher, tokens_BT)
        student_ND, student_states = self._hidden_states(self.student, tokens_BT)
        student, teacher = Head.of(self.student), Head.of(self.teacher)
        width = min(len(student.weight_VD), len(teacher.weight_VD))

        def terms_of(hidden_ND: Tensor, weight_VD: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target_NV = teacher.logits(teacher_ND[part], teacher.weight_VD, width)
            return self.terms(student.logits(hidden_ND, weight_VD, width), target_NV, labels_N[part])

        sums: Any = _ChunkedTerms.apply(student_ND, student.weight_VD, terms_of)
        terms = sums / len(labels_N)
        if self.hidden:
            far = self.distance(student_states, teacher_states, stream_scale(self.student, self.teacher))
            terms = torch.cat((terms[:1] + self.hidden * far, terms[1:]))
        return terms

    def _hidden_states(self, model: Any, tokens_BT: Tensor) -> tuple[Tensor, Sequence[Tensor]]:  # noqa: ANN401
        """What the head reads at every position that has a next token (B * (T - 1), D), and what layers pass on.

        The latter (B, T, D) is of all layers but the last, and only where it is compared. An empty cache changes no
        value: without one transformers looks whether several texts share a window, and a look at values cannot be
        recorded.
        """
        found = model.base_model(input_ids=tokens_BT, use_cache=self.cached, output_hidden_states=bool(self.hidden))
        states = found.hidden_states[1:-1] if self.hidden else ()
        return found.last_hidden_state[:, :-1].flatten(0, 1), states

    def fuse(self) -> None:
        """Compile what all layers have alike, norms and feed-forward networks, and the terms.

        Attention stays as it is: each layer has ranks of its own and would be compiled as often.
        """
        for model in (self.student, self.teacher):
            for layer in model.get_submodule("model.layers").children():
                for name, child in layer.named_children():
                    if name != "self_attn":
                        # By shape, so that a run that goes on has the same sums, whichever shape comes first.
                        child.compile(dynamic=False)
        self.terms = torch.compile(self.terms, dynamic=False)
        self.distance = torch.compile(self.distance, dynamic=False)


def check_compiler(device: str) -> None:
    """BadInput where torch cannot compile for the device: it needs a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except ShortenTraceback as error:
        cause = getattr(error, "inner_exception", error)
        raise BadInput(f"--compile: torch cannot compile here ({first_line(cause)}); leave it out") from error


def state_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], scale: float) -> Tensor:
    """Mean over layers and tokens of |s - c t|^2 / |c t|^2 of hidden states s and t (B, T, D); c is their scale: ().

    By token, as the first one's states can be a hundred times as long as others (SmolLM2, layer 20) and would be all
    that counts.
    """
    distances = []
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        target_BTD = scale * teacher_BTD.float()
        far_BT = (student_BTD.float() - target_BTD).square().sum(-1)
        distances.append((far_BT / target_BTD.square().sum(-1)).mean())
    return torch.stack(distances).mean()
