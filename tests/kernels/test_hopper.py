"""Plans of the Hopper kernel, and that it compiles as they say: no GPU is needed for either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernel needs Triton: make test-kernels")
hopper = pytest.importorskip("care.kernels.hopper", reason="this Triton has no Gluon that the kernel knows")

PROCESS = Path(__file__).parents[1] / "hopper_process.py"
H200 = 232_448
"""Bytes of shared memory that one program may have there."""

PLANS = {
    # Heads, chunks of latents and of entries: shapes timed on an H200 with the plan that was fastest, and two more.
    (32, 8, 9): hopper.Plan(heads=32, warps=4, slots=23, per_core=1),
    (9, 3, 4): hopper.Plan(heads=16, warps=4, slots=8, per_core=2),
    (32, 10, 11): hopper.Plan(heads=32, warps=8, slots=22, per_core=1),
    (32, 14, 16): hopper.Plan(heads=32, warps=8, slots=19, per_core=1),
    (64, 8, 9): hopper.Plan(heads=64, warps=8, slots=18, per_core=1),
    (20, 17, 18): hopper.Plan(heads=16, warps=8, slots=23, per_core=1),
    (1, 1, 1): hopper.Plan(heads=16, warps=4, slots=2, per_core=2),
}


@pytest.mark.parametrize("size", PLANS, ids=str)
def test_plan(size: tuple[int, int, int]) -> None:
    assert hopper.plan_within(H200, *size) == PLANS[size]


def test_what_does_not_fit_has_no_plan() -> None:
    """More sums than registers hold, or an entry that is wider than shared memory."""
    assert hopper.plan_within(H200, 32, 29, 30) is None
    assert hopper.plan_within(64 * 1024, 32, 8, 9) is None


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("size", PLANS, ids=str)
def test_compiles_within_its_plan(size: tuple[int, int, int], page: int) -> None:
    """Shared memory is enough; a tile has four products for each chunk of keys and of values."""
    _, latents, chunks = size
    plan = PLANS[size]
    arguments = [latents, chunks - latents, plan.slots, plan.heads, plan.warps, page]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    outcome = subprocess.run(
        [sys.executable, PROCESS, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    found = json.loads(outcome.stdout.strip().splitlines()[-1])
    assert found["shared"] <= H200 // plan.per_core
    assert found["products"] == 4 * (chunks + latents)
    assert found["copies"] == plan.slots + chunks
