"""The texts that papers measure on, by name, from the hub through `datasets`.

How rows become one text differs between papers and moves perplexity. Here, as in the later variants of GPTQ's
evaluation code (arXiv 2210.17323), rows of WikiText-2 are joined by blank lines and those of PTB by spaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..errors import BadInput, first_line

C4_VALID_ROWS = 1100
"""Documents of C4's validation set that are measured on."""

C4_TRAIN_ROWS = 10_000
"""Documents of C4's first training shard; about 5 million tokens to draw calibration windows from."""


@dataclass(frozen=True)
class HubText:
    """A column of a data set's split as one text, rows joined by `joint`; `rows` from its start, None for all."""

    path: str
    column: str
    joint: str
    split: str = "train"
    rows: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def load(self, name: str) -> str:
        """Fetch it into the library's own cache; BadInput without `datasets` or without a way to the hub."""
        try:
            datasets = import_module("datasets")  # an optional dependency
        except ImportError as error:
            raise BadInput(
                f"the text {name} is fetched by datasets; pip install 'care-mla[texts]', or give a file"
            ) from error
        try:
            found = datasets.load_dataset(self.path, split=self.split, **self.more)
        except Exception as error:  # errors of whatever fetches files come through as they are
            raise BadInput(
                f"cannot fetch the text {name} from the hub ({first_line(error)}); give a file instead"
            ) from error
        chosen = found if self.rows is None else found.select(range(min(self.rows, len(found))))
        return self.joint.join(chosen[self.column])


def _wikitext2(split: str) -> HubText:
    return HubText("Salesforce/wikitext", "text", "\n\n", split, more={"name": "wikitext-2-raw-v1"})


def _ptb(split: str) -> HubText:
    """The set itself is a script, which datasets 4 does not run; this is the hub's own conversion of it."""
    file = f"hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"
    return HubText("parquet", "sentence", " ", more={"data_files": file})


def _c4(split: str, file: str, rows: int) -> HubText:
    """One of its files; documents are joined as those of a .jsonl file are, not by spaces."""
    # One file has not the number of rows that the card promises of the whole.
    more = {"data_files": {split: f"en/{file}.json.gz"}, "verification_mode": "no_checks"}
    return HubText("allenai/c4", "text", "\n\n", split, rows, more)


HUB_TEXTS = {
    "wikitext2-train": _wikitext2("train"),
    "wikitext2-valid": _wikitext2("validation"),
    "wikitext2-test": _wikitext2("test"),
    "ptb-train": _ptb("train"),
    "ptb-valid": _ptb("validation"),
    "ptb-test": _ptb("test"),
    "c4-train": _c4("train", "c4-train.00000-of-01024", C4_TRAIN_ROWS),
    "c4-valid": _c4("validation", "c4-validation.00000-of-00008", C4_VALID_ROWS),
}
"""By name. Calibrate on the training sets, measure on the others."""
