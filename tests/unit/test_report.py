"""The report's figures, against arithmetic by hand; its page, as far as it can be read without a browser."""

from html.parser import HTMLParser
from typing import Any

import pytest

from care.errors import BadInput
from care.report import render
from care.report.facts import cache_rows, quantized_rows

pytest.importorskip("matplotlib")
LAYERS = [
    {
        "rope_dim": 8, "key_rank": 24, "value_rank": 24, "joint": True, "width": 32,
        "key_error": 0.2, "value_error": 0.3,
        "rope_loss": 0.01, "key_loss": 0.02, "value_loss": 0.03, "num_directions": [56], "left_out": [[1.0, 0.5, 0.0]],
        "rope_slots": 16, "rope_left_out": [1.0, 0.2, 0.0],
    },
    {
        "rope_dim": 0, "key_rank": 16, "value_rank": 16, "joint": True, "width": 16,
        "key_error": 0.1, "value_error": 0.1,
        "rope_loss": 0.0, "key_loss": 0.01, "value_loss": 0.01, "num_directions": [64], "left_out": [[1.0, 0.1, 0.0]],
        "rope_slots": 16, "rope_left_out": [1.0, 0.0, 0.0],
    },
]  # fmt: skip
CONVERSION: dict[str, Any] = {
    "care_version": "1", "source": "a <model> & more", "kv_budget": 0.375, "kept_share": 0.375,
    "source_cache_width": 64,
    "source_num_kv_heads": 2, "source_head_dim": 16, "mean_cache_width": 24.0, "seconds": 3.0, "layers": LAYERS,
    "recipe": {"name": "best", "paper": "a paper", "mode": "absorbed", "format": "native"},
    "calibration": {"text": "wiki.txt", "num_windows": 4, "window": 32, "seed": 42, "context": 64},
}  # fmt: skip


def numbers(perplexity: float, nll: float, kl: float) -> dict[str, Any]:
    """One model's record, as the commands write it."""
    return {
        "perplexity": perplexity, "nll": nll, "nll_standard_error": 0.01, "kl": kl, "top1_agreement": 0.9,
        "cache_bytes_per_token": 96.0,
    }  # fmt: skip


COMPARED = {
    "texts": {
        "dir/test.txt": {
            "source": numbers(10.0, 2.0, 0.0),
            "rows": [
                {"recipe": "best", "mode": "absorbed", "kv_budget": 0.375, **numbers(12.0, 2.5, 0.1)},
                {"recipe": "care-u", "mode": "rebuild", "kv_budget": 0.375, **numbers(15.0, 3.0, 0.4)},
                {"recipe": "transmla", "mode": "absorbed", "kv_budget": 0.375, "refused": "for a reason"},
            ],
        }
    }
}
EVALUATED = {"text": "c4.txt", "models": {"src": numbers(20.0, 3.0, 0.0), "x/out": numbers(21.0, 3.05, 0.1)}}
WRITTEN: dict[str, Any] = {
    "models": ["hub/src", "x/out"], "against": "hub/src", "max_new_tokens": 48, "chat": False, "dtype": "bfloat16",
    "decoding": "greedy",
    "generations": [
        {
            "prompt": "2 < 3\nand", "same_tokens": 5, "tokens": {"hub/src": 48, "x/out": 12},
            "texts": {"hub/src": " <b>so</b>\n  on & on", "x/out": " <b>so</b>\n  off"},
        },
        {
            "prompt": "Again", "same_tokens": 9, "tokens": {"hub/src": 9, "x/out": 9},
            "texts": {"hub/src": " the same", "x/out": " the same"},
        },
    ],
}  # fmt: skip
OTHER_KIND = "is not the JSON of care eval --against, care compare or care generate --against"


class Page(HTMLParser):
    """Texts of a page, and what it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [value for name in ("src", "href") if (value := found.get(name)) and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_heads_are_split_over_gpus_and_latents_are_not() -> None:
    rows = {row["gpus"]: row for row in cache_rows(CONVERSION)}
    assert rows[1]["values"] == (2 * 2 * 16 * 2, 48)
    assert rows[2]["values"] == (2 * 16 * 2, 48)
    assert rows[8]["values"] == (2 * 16 * 2, 48)
    assert rows[1]["gib"][4096] == (128 * 2 * 4096 / 2**30, 48 * 2 * 4096 / 2**30)


def test_quantized_sizes_count_their_scales() -> None:
    """64 values and 4 vectors a layer in the source; 48 values and one vector a layer here; two layers."""
    sixteen, eight, four = quantized_rows(CONVERSION)
    assert (sixteen["source"], sixteen["converted"]) == (256, 96)
    assert (eight["source"], eight["converted"]) == (128 + 2 * 8, 48 + 2 * 2)
    assert (four["source"], four["converted"]) == (64 + 2 * 8, 24 + 2 * 2)


def test_the_verdict_is_of_this_conversion_on_every_text() -> None:
    _, said = render(CONVERSION, [("compare.json", COMPARED), ("eval.json", EVALUATED)])
    saves, costs = said["verdict"]
    assert saves.startswith("Keeps 37.5% of the cache: 24 of 64")
    assert costs == "Perplexity 7.28 to 12.00 (+64.9%) on test.txt; perplexity 19.98 to 21.00 (+5.1%) on c4.txt."
    assert [row["name"] for row in said["measured"] if row["ours"]] == ["best", "out"]
    assert "transmla" not in {row["name"] for row in said["measured"]}


def test_without_measurements_it_says_so() -> None:
    assert "has not been measured" in render(CONVERSION)[1]["verdict"][1]


def test_the_page_needs_no_network_and_escapes_names() -> None:
    html, said = render(CONVERSION, [("compare.json", COMPARED)], {"vllm": "no (a < b)"})
    page = Page(html)
    assert page.fetched == []
    assert "a <model> & more, converted by best" in page.texts
    assert "no (a < b)" in page.texts
    assert html.count("<svg") == 3
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert said["losses"] == {"rope": 0.01, "key": 0.03, "value": 0.04}
    assert said["command"].startswith("care convert a <model> & more OUT --recipe best --kv-budget 0.375")


def test_texts_are_cut_where_they_part() -> None:
    (run,) = render(CONVERSION, [("texts.json", WRITTEN)])[1]["generations"]
    parted, same = run.pop("prompts")
    assert run == {"source": "src", "converted": "out", "max_new_tokens": 48, "chat": False, "dtype": "bfloat16"}
    assert parted == {
        "prompt": "2 < 3\nand", "same_tokens": 5, "num_tokens": 48, "common": " <b>so</b>\n  o",
        "source_rest": "n & on", "converted_rest": "ff",
    }  # fmt: skip
    assert (same["common"], same["source_rest"], same["converted_rest"]) == (" the same", "", "")
    assert render(CONVERSION, [("compare.json", COMPARED)])[1]["generations"] == []


def test_the_current_directory_has_a_name_on_the_page() -> None:
    here = {**WRITTEN, "models": ["..", "."], "against": "..", "generations": []}
    (run,) = render(CONVERSION, [("texts.json", here)])[1]["generations"]
    assert (run["source"], run["converted"]) == ("source", "converted")


def test_the_page_shows_texts_side_by_side_and_escaped() -> None:
    html, _ = render(CONVERSION, [("texts.json", WRITTEN), ("again.json", {**WRITTEN, "chat": True})])
    assert html.count("What they write") == 1
    first = html[html.index("What they write") : html.index("<h2>Cache")]
    assert '<p class="prompt">2 &lt; 3\nand</p>' in first
    common = " &lt;b&gt;so&lt;/b&gt;\n  o"
    assert f'<td>{common}<span class="parted">n &amp; on</span></td><td>{common}<span class="parted">ff</span>' in first
    assert "<b>" not in first
    assert ".pair td, .prompt { white-space: pre-wrap; overflow-wrap: anywhere; }" in html
    assert ".parted { text-decoration: underline" in html
    said = [" ".join(text.split()) for text in Page(first).texts]
    assert said.count("same for 5 of 48 tokens") == said.count("same for 9 of 9 tokens") == 2
    assert said.count("source: src") == said.count("converted: out") == 4
    for template in ("with", "without"):
        note = f"Greedy decoding of at most 48 tokens, {template} the chat template, bfloat16."
        assert sum(text.startswith(note) for text in said) == 1
    assert "What they write" not in render(CONVERSION)[0]


def test_texts_of_one_model_are_refused_with_the_remedy() -> None:
    alone = {**WRITTEN, "models": ["x/out"], "against": None}
    with pytest.raises(
        BadInput, match=r"texts\.json has the texts of one model; care generate OUT PROMPT --against SRC"
    ):
        render(CONVERSION, [("texts.json", alone)])


def test_the_page_is_the_same_every_time() -> None:
    assert render(CONVERSION)[0] == render(CONVERSION)[0]


def test_methods_without_nats_show_errors() -> None:
    layers = [{**x, "rope_loss": None, "key_loss": None, "value_loss": None, "rope_left_out": []} for x in LAYERS]
    html, said = render({**CONVERSION, "layers": layers})
    assert said["losses"] is None
    assert "relative errors" in html


@pytest.mark.parametrize(
    "result",
    [
        {}, {"texts": {"a": {}}}, {"models": {"m": {"kl": None}}}, {"texts": 3}, {"generations": 3},
        {**WRITTEN, "models": ["x/out"]}, {**WRITTEN, "generations": [{"prompt": "a", "texts": {"hub/src": "b"}}]},
        {"model": "x/out", "prompt": "of an older version", "text": "of one model"},
    ],
)  # fmt: skip
def test_other_json_is_refused_by_name(result: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=rf"other\.json {OTHER_KIND}"):
        render(CONVERSION, [("other.json", result)])
