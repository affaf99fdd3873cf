"""The model card of a checkpoint: README.md with metadata on top, from the same facts as the report.

It holds nothing that differs from one run of a command to the next, and no path of a machine.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..engines import ENGINES, engine_loading
from ..formats.native import MODEL_TYPE_PREFIX
from ..recipe import load_recipe, recipe_names
from .facts import conversion_command, losses, quantized_rows, saving, source_name

TAGS = ("care", "multi-head-latent-attention", "mla", "kv-cache")

ENGINE_TITLES = {
    "transformers": "transformers >= 5.15, alone",
    "care": "transformers, with care",
    "vllm": "vLLM on GPUs",
    "vllm-cpu": "vLLM on CPUs",
}
"""What a reader calls an engine, where ENGINES has a shorter name."""

HEALING_OPTIONS = (
    ("minutes", "--minutes"), ("tokens", "--tokens"), ("trained", "--train"), ("rate", "--rate"), ("batch", "--batch"),
    ("length", "--length"), ("held_out", "--held-out"), ("refit_tokens", "--refit-tokens"),
    ("precision", "--precision"), ("seed", "--seed"),
)  # fmt: skip
"""Settings of a healing run, and the options that set them."""


def model_card(
    conversion: Mapping[str, Any],
    config: Mapping[str, Any],
    healing: Mapping[str, Any] | None = None,
    *,
    healed_before: bool = False,
) -> str:
    """README.md of a checkpoint, from its conversion.json, config.json and, where it was healed, healing.json.

    A conversion.json of an older version, which lacks facts, or none ({}), gives a card without what follows from them.
    """
    source = source_name(conversion) if "source" in conversion else None
    parts = [_metadata(conversion, config, source), _title(conversion, config, source)]
    if "source_num_kv_heads" in conversion:
        parts += [_cache(conversion), _layers(conversion["layers"]), _given_up(conversion)]
    if healing is not None:
        parts.append(_healing(healing, again=healed_before))
    parts.append(_loading(config))
    if "source_num_kv_heads" in conversion:
        parts.append(_origin(conversion, config))
    return "\n\n".join([*parts, _license(conversion, source)]) + "\n"


def _metadata(conversion: Mapping[str, Any], config: Mapping[str, Any], source: str | None) -> str:
    """What the hub reads; JSON's strings are YAML's too."""
    lines = [f"library_name: {'care' if _is_native(config) else 'transformers'}"]
    lines += [] if source is None else [f"base_model: {json.dumps(source, ensure_ascii=False)}"]
    stated = conversion.get("source_license") or {}
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in stated.items()]
    lines += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in TAGS)]
    return "\n".join(["---", *lines, "---"])


def _is_native(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX)


def _title(conversion: Mapping[str, Any], config: Mapping[str, Any], source: str | None) -> str:
    name = source or str(config.get("model_type"))
    if "recipe" not in conversion:
        return f"# {name}, healed\n\nIt says nothing of a conversion by care."
    recipe = conversion["recipe"]
    said = (
        f"`{name}`, converted to multi-head latent attention by care {conversion['care_version']} with the recipe "
        f"`{recipe['name']}`: {recipe['mode']} mode, format {recipe['format']}."
    )
    if "source_num_kv_heads" not in conversion:
        return f"# {name} with latent attention\n\n{said} That version wrote down no more of the conversion."
    return f"# {name} with latent attention\n\n{said}\n\n{saving(conversion)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the first column is left, the others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cache(conversion: Mapping[str, Any]) -> str:
    """Before and after, per token over all layers."""
    layers, full = conversion["layers"], conversion["source_cache_width"]
    rows = [("values", f"{full * len(layers):,}", f"{sum(layer['width'] for layer in layers):,}")]
    for row in quantized_rows(conversion):
        scales = "" if row["bits"] == 16 else ", with scales"
        rows.append((f"bytes at {row['bits']} bits{scales}", f"{row['source']:,.0f}", f"{row['converted']:,.0f}"))
    return "## Cache of one token, all layers\n\n" + _table(("", "source", "converted"), rows)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Neighbors of one shape share a line."""

    def shape(layer: Mapping[str, Any]) -> tuple[object, ...]:
        kind = "joint" if layer["joint"] else "apart"
        return (layer["rope_dim"], layer["key_rank"], layer["value_rank"], kind, layer["width"])

    rows = []
    for made, group in groupby(range(len(layers)), key=lambda index: shape(layers[index])):
        indices = list(group)
        name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        rows.append((name, *made))
    columns = ("layers", "rotary", "key rank", "value rank", "latents", "cached values")
    return "## What each layer caches\n\n" + _table(columns, rows)


def _given_up(conversion: Mapping[str, Any]) -> str:
    """What the conversion knows of its own losses; nothing of it was measured on a text."""
    layers, lost = conversion["layers"], losses(conversion["layers"])
    errors = [sum(layer[f"{side}_error"] for layer in layers) / len(layers) for side in ("key", "value")]
    lines = [
        f"- Relative error in the metric of the method, mean over layers: keys {errors[0]:.4f}, values {errors[1]:.4f}."
    ]
    if lost:
        lines.append(
            f"- Predicted to second order, before any refit, in nats a token over all layers: rotations "
            f"{lost['rope']:.4f}, keys {lost['key']:.4f}, values {lost['value']:.4f}."
        )
    if conversion["rounding_loss"] is not None:
        lines.append(f"- Of these, ranks in multiples cost {conversion['rounding_loss']:.4f}.")
    if conversion["folding_perplexity"]:
        tried = ", ".join(f"{n}: {value:,.2f}" for n, value in conversion["folding_perplexity"].items())
        lines.append(f"- Perplexity on calibration text by how many neighbors share a rotation: {tried}.")
    lines.append("- Quality on a text is measured by `care eval OUT --against SRC`.")
    return "## What was given up\n\n" + "\n".join(lines)


def _healing(healing: Mapping[str, Any], *, again: bool) -> str:
    """Settings, and what it did on windows that were not trained on."""
    looks, asked = healing["held_out"], healing["request"]
    rows = [
        (when, f"{look['tokens']:,}", f"{look['ce']:.4f}", f"{look['kl']:.4f}")
        for when, look in (("before", looks[0]), ("after", looks[-1]))
    ]
    before = " It had been healed before; of that this card knows nothing." if again else ""
    said = (
        f"Distilled from `{asked['teacher']}` by care {healing['care_version']}: {healing['num_steps']} steps on "
        f"{looks[-1]['tokens']:,} tokens of {_texts(asked['data'])}.{before}"
    )
    table = _table(("held out", "tokens trained on", "CE", "KL to the teacher"), rows)
    command = f"```\n{_healing_command(asked)}\n```"
    note = "Nats a token. What each layer caches is unchanged; what was given up, above, is from before."
    return "\n\n".join(["## Healing", said, table, note, command])


def _texts(data: Sequence[str]) -> str:
    """Texts with their shares, where they differ."""
    names = {name: "what the teacher wrote" if name == "self" else f"`{name}`" for name in data}
    equal = len(names) == len(data)
    return ", ".join(named if equal else f"{named} ({data.count(name)}/{len(data)})" for name, named in names.items())


def _healing_command(asked: Mapping[str, Any]) -> str:
    """With OUT for the converted model, which is what was healed."""
    data = " ".join(f"--data {name}" for name in asked["data"])
    parts = [f"care heal OUT HEALED --teacher {asked['teacher']} {data}"]
    options = [f"{option} {asked[key]}" for key, option in HEALING_OPTIONS if asked.get(key) is not None]
    options += [f"--lora-rank {asked['lora_rank']}"] if asked["trained"] == "lora" else []
    objective = asked["objective"]
    options += [f"--beta {objective['beta']}", f"--temperature {objective['temperature']}"]
    options += [] if objective["ce"] else ["--kl-only"]
    options += [f"--hidden {objective['hidden']}"] if objective["hidden"] else []
    options += ["--together " + str(asked["together"])]
    options += [f"--{name.replace('_', '-')}" for name in ("recompute", "compile", "cuda_graph") if asked[name]]
    parts += [" ".join(options[first : first + 4]) for first in range(0, len(options), 4)]
    return " \\\n    ".join(parts)


def _loading(config: Mapping[str, Any]) -> str:
    native = _is_native(config)
    code = [
        *(["import care"] if native else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *(["care.register()"] if native else []),
        'model = AutoModelForCausalLM.from_pretrained("OUT", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("OUT")',
    ]
    known = engine_loading(config)
    rows = [(ENGINE_TITLES.get(name, name), known[name]) for name in ENGINES]
    lines = ["| engine | takes it |", "| --- | --- |", *(f"| {name} | {said} |" for name, said in rows)]
    return "\n".join(
        ["## Loading", "", "With OUT for the directory of this file:", "", "```python", *code, "```", "", *lines]
    )


def _origin(conversion: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The recipe, the calibration and the command, with the recipe in full where a name does not say all of it."""
    recipe, calibration = conversion["recipe"], conversion["calibration"]
    file = None if _is_packaged(recipe) else f"{recipe['name']}.toml"
    command = conversion_command(conversion, file, public=True)
    if dtype := config.get("dtype"):
        command += f" \\\n    --dtype {str(dtype).removeprefix('torch.')}"
    lines = ["## How it was made", "", f"Recipe `{recipe['name']}` ({recipe['paper'] or 'no paper named'})."]
    if calibration:
        lines[-1] += (
            f" Calibrated on {calibration['num_windows']} windows of {calibration['window']} tokens. "
            "A text is named here without its directory."
        )
    lines += ["", "```", command, "```"]
    if file:
        lines += ["", f"`{file}`, with every choice that was made:", "", "```toml", *_toml(recipe), "```"]
    return "\n".join(lines)


def _is_packaged(recipe: Mapping[str, Any]) -> bool:
    """Whether the name, with mode and format, says the whole recipe in this version."""
    if recipe["name"] not in recipe_names():
        return False
    return load_recipe(recipe["name"], mode=recipe["mode"], format=recipe["format"]).describe() == recipe


def _toml(recipe: Mapping[str, Any]) -> list[str]:
    """A recipe as a file that load_recipe reads. JSON's plain values are TOML's too."""
    values = {key: value for key, value in recipe.items() if key != "name"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for section, table in values.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return lines


def _license(conversion: Mapping[str, Any], source: str | None) -> str:
    stated = conversion.get("source_license")
    of = "its source" if source is None else f"`{source}`"
    lines = ["## License", "", "A converted model keeps the license of its source."]
    if stated:
        name = stated.get("license_name") or stated["license"]
        link = f" ({stated['license_link']})" if stated.get("license_link") else ""
        lines.append(f"{of} states: {name}{link}.")
    else:
        lines.append(f"{of} states none that could be read when this was made, so none is named above; look it up.")
    return "\n".join([*lines, "Files LICENSE and NOTICE lie beside this one where the source's directory had them."])
