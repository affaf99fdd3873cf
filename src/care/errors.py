"""The exceptions that care raises; each message is one line that names the thing and the remedy."""


class CareError(Exception):
    """Base of every error that a user can cause and mend."""


class UnsupportedModel(CareError):
    """The source model has a part that care does not know."""


class InvalidRecipe(CareError):
    """A recipe, a budget or an option that cannot be carried out."""


class BadInput(CareError):
    """A path, a file, a tensor or a text that cannot be used."""


class DiskFull(BadInput):
    """The disk took no more; what was written so far is kept."""


class OtherFailed(CareError):
    """Another of several processes failed; what was done so far is kept."""


class Interrupted(CareError):
    """Work that a person stopped, and that can be continued."""


class Diverged(CareError):
    """Training met a loss that is not a number; what was good before it is kept."""


def first_line(error: Exception) -> str:
    """What another library's error says, as part of one line; its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
