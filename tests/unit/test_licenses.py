"""The license in a model's own files, against a YAML library."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from care.licenses import front_matter_license, stated_license

CARDS = {
    "plain": "---\nlibrary_name: transformers\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Model\nlicense: mit\n",
    "quoted": "---\r\nlicense: 'llama3.1'\r\n---\r\ntext",
    "other": "---\nlicense: other\nlicense_name: a-license\nlicense_link: https://a.b/LICENSE\n---\n",
    "list": "---\ntags:\n- x\nlicense:\n- mit\n---\n",
    "nested": "---\nmodel-index:\n- name: a\n  license: mit\n---\n",
    "none": "---\ntags: [a]\n---\nlicense: mit\n",
    "no metadata": "# Model\n\nlicense: mit\n---\nlicense: mit\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_metadata_is_read_as_yaml_reads_it(card: str) -> None:
    text = CARDS[card].replace("\r\n", "\n")
    block: dict[str, Any] = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---") else {}
    stated = {key: block[key] for key in ("license", "license_name", "license_link") if key in block}
    expected = {key: value[0] if isinstance(value, list) else value for key, value in stated.items()}
    assert front_matter_license(CARDS[card]) == (expected or None)


def test_the_card_comes_before_the_config(tmp_path: Path) -> None:
    assert stated_license(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"license": "mit"}))
    assert stated_license(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text(CARDS["none"])
    assert stated_license(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text(CARDS["plain"])
    assert stated_license(tmp_path) == {"license": "apache-2.0"}
