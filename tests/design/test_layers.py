"""Imports point down: parsed, not executed, so that imports inside functions count too."""

import ast
from pathlib import Path

import care

PACKAGE = Path(care.__file__).parent

LAYERS = (
    {"errors", "carried", "types", "progress", "version"},
    {"linalg", "rope", "attention", "checkpoint", "licenses", "output", "ranks", "kernels"},
    {"architectures", "calibration", "factorization", "rope_split", "allocation", "formats", "refit"},
    {
        "prefix",
        "decisions",
        "estimate",
        "statistics",
        "recipe",
        "source",
        "plan",
        "conversion",
        "comparison",
        "sweep",
        "pareto",
        "folding",
        "modeling",
        "evaluation",
        "export",
        "report",
        "engines",
        "serving",
        "healing",
    },
    {"cli", "commands"},
    {"__init__", "__main__"},
)
"""Modules and packages from the bottom to the top."""

SIBLINGS = LAYERS[2]
"""These never import one another."""

RUNS_MODELS = {"transformers", "huggingface_hub", "tokenizers", "accelerate", "peft"}
HOMES = {"modeling": RUNS_MODELS - {"peft"}, "healing": {"accelerate", "peft"}}
"""Which packages may import what: models run in modeling and are trained in healing."""


def layer_of(part: str) -> int:
    """Index in LAYERS."""
    return next(i for i, names in enumerate(LAYERS) if part in names)


def modules() -> dict[str, Path]:
    """Dotted name within care to file."""
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(PACKAGE.rglob("*.py"))
    }


def imported(module: str, path: Path) -> set[str]:
    """Dotted names that a module imports; those of care start with 'care.'."""
    package = ["care", *module.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    elif module == "__init__":
        package = ["care"]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*target, alias.name]) for alias in node.names}
    return found


def edges() -> dict[str, set[str]]:
    """Module to the care modules that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imported(module, path):
            if name.startswith("care."):
                inner = name.removeprefix("care.")
                graph[module].add(inner if inner in known else inner.rpartition(".")[0] or "__init__")
    return graph


def test_every_module_has_a_layer() -> None:
    parts = {module.split(".")[0] for module in modules()}
    assert parts == set().union(*LAYERS)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in edges().items()
        for target in targets
        if layer_of(module.split(".")[0]) < layer_of(target.split(".")[0])
    ]
    assert wrong == []


def test_siblings_do_not_import_one_another() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in edges().items()
        for target in targets
        if {module.split(".")[0], target.split(".")[0]} <= SIBLINGS and module.split(".")[0] != target.split(".")[0]
    ]
    assert wrong == []


def test_no_cycles() -> None:
    """Take away modules without open imports until nothing is left. The shop window is not imported by others."""
    graph = {module: targets - {module} for module, targets in edges().items()}
    while graph:
        free = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in free}


def test_libraries_that_run_models_stay_at_home() -> None:
    for module, path in modules().items():
        libraries = {name.split(".")[0] for name in imported(module, path)}
        assert libraries & RUNS_MODELS <= HOMES.get(module.split(".")[0], set()), module


def test_the_graph_is_seen() -> None:
    """The tests above would pass for an empty graph."""
    graph = edges()
    assert "types" in graph["linalg"] or "linalg" in graph["factorization.base"]
    assert {"checkpoint", "errors", "types"} <= graph["calibration.store"]
    assert any("transformers" in name for name in imported("modeling.native", PACKAGE / "modeling" / "native.py"))
    assert sum(map(len, graph.values())) > 100
