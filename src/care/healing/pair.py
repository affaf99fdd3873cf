"""Student and teacher, found to fit one another."""

from dataclasses import dataclass

from ..errors import BadInput, InvalidRecipe
from ..modeling.loading import Location, load_config, load_tokenizer, locate


@dataclass(frozen=True)
class Pair:
    """Where student and teacher lie, found to fit one another."""

    student: Location
    teacher: Location

    @property
    def one_shape(self) -> bool:
        """Whether they have the same layers, so that hidden states can be compared."""
        return body_size(self.student) == body_size(self.teacher)


def open_pair(model: str, teacher: str, *, compared: bool) -> Pair:
    """Refuse a teacher with another tokenizer, or a smaller one, before any weights are read.

    Where hidden states are to be compared, any of another shape.
    """
    pair = Pair(locate(model), locate(teacher))
    if pair.student.gguf_file is not None:
        raise BadInput(f"{model} is a GGUF file; heal the directory that care convert wrote")
    vocabularies = [load_tokenizer(location).get_vocab() for location in (pair.student, pair.teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise InvalidRecipe(f"{teacher} has another tokenizer than {model}; a teacher must share the student's tokens")
    ours, theirs = (body_size(location) for location in (pair.student, pair.teacher))
    if theirs["layers"] < ours["layers"] or theirs["width"] < ours["width"]:
        raise InvalidRecipe(
            f"{teacher} ({theirs['layers']} layers of width {theirs['width']}) is smaller than {model} "
            f"({ours['layers']} of {ours['width']}); a teacher must be at least as large"
        )
    if compared and not pair.one_shape:
        raise InvalidRecipe(
            "--hidden compares layer by layer and needs a teacher of the model's own shape; leave it out"
        )
    return pair


def body_size(location: Location) -> dict[str, int]:
    """Layers and hidden size, which conversion does not change."""
    config = load_config(location)
    return {"layers": config["num_hidden_layers"], "width": config["hidden_size"]}
