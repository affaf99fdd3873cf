"""Every tolerance of the suite, with its reason; no test has a number of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |actual - expected| is absolute + relative * |expected|."""

    absolute: float
    relative: float
    reason: str


TOLERANCES = {
    "exact": Tolerance(0.0, 0.0, "the same arithmetic on the same numbers"),
    "fp64": Tolerance(1e-10, 0.0, "sums of a few hundred products of numbers of size 1-10 in fp64, softmax included"),
    "fp64 sums": Tolerance(1e-12, 1e-12, "a few fp64 sums in another order, of the same terms"),
    "fp64 directions": Tolerance(1e-8, 0.0, "eigenvectors of a Gram matrix: fp64 rounding over gaps of 1e-6 and more"),
    "fp32 moments": Tolerance(1e-6, 1e-5, "products of a batch summed in fp32 before the fp64 sum"),
    "fp32 table": Tolerance(0.0, 1e-6, "fp32 powers and quotients in another order"),
    "fp32 attention": Tolerance(1e-5, 1e-5, "one attention layer in fp32, outputs of size 1-10"),
    "bf16 attention": Tolerance(2e-2, 2e-2, "weights and outputs rounded to bf16, 2^-9 relative, outputs of size 1"),
    "fp32 gradients": Tolerance(1e-4, 1e-4, "a backward pass of three layers in fp32, squares summed over tokens"),
    "fp32 refit": Tolerance(1e-3, 1e-3, "least squares on fp32 products, conditioned like the 100 tokens of the test"),
    "fp32 logits": Tolerance(1e-4, 0.0, "three layers in fp32, logits of size 1-10, weights rounded once to fp32"),
    "fp32 nats": Tolerance(1e-5, 0.0, "means of fp32 log-probabilities of size 1-10"),
    "fp32 answers": Tolerance(
        1e-3, 1e-5, "eight fp32 log-probabilities of logits to 1e-4 each, deepseek ones among them"
    ),
    "deepseek logits": Tolerance(
        2e-4, 1e-5, "fp32 logits, plus a latent norm that is linear up to 5e-7 (half of LATENT_HEADROOM)"
    ),
    "llama.cpp log-probabilities": Tolerance(
        1e-3, 1e-4, "log-probabilities to -20 of logits of size 1-10, softmax summed in fp32, other kernels"
    ),
    "vLLM log-probabilities": Tolerance(
        2e-4, 1e-5, "fp32 or deepseek logits on either side, with other kernels and blocks of prefill"
    ),
    "smollm2 logits": Tolerance(2e-3, 0.0, "30 layers in fp32, logits of size 10-30"),
}

VISIBLE = 1e-2
"""Least difference of numbers of size 1-10 that counts as something lost: 100 times the widest logit tolerance."""


def assert_close(actual: Tensor, expected: Tensor, kind: str) -> None:
    """Compare in the dtype of the wider one with the tolerance of that kind."""
    row = TOLERANCES[kind]
    torch.testing.assert_close(
        actual, expected, atol=row.absolute, rtol=row.relative, check_dtype=False, msg=lambda m: f"{kind}: {m}"
    )


def assert_numbers(actual: Sequence[float] | float, expected: Sequence[float] | float, kind: str) -> None:
    """The same for plain numbers, which are fp64."""
    assert_close(torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), kind)
