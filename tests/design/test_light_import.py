"""`import care` is fast: nothing heavy is loaded until it is used."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "safetensors", "matplotlib", "rich", "click")


def loaded_after(code: str) -> set[str]:
    """Heavy modules in a fresh Python after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split()) & set(HEAVY)


def test_import_care_loads_nothing_heavy() -> None:
    assert loaded_after("import care; care.__version__, care.CareError") == set()


@pytest.mark.parametrize(
    "code",
    [
        "from care import load_recipe; load_recipe('care-u')",
        "import care.types, care.linalg, care.rope, care.attention, care.checkpoint, care.calibration",
        "import care.architectures, care.factorization, care.rope_split, care.allocation, care.formats",
    ],
)
def test_methods_do_not_load_transformers(code: str) -> None:
    """Nor anything that draws or prints."""
    assert loaded_after(code) & {"transformers", "matplotlib", "rich", "click"} == set()


def test_help_does_not_load_torch() -> None:
    """The list of commands comes from names alone."""
    assert "torch" not in loaded_after("import care.cli")
