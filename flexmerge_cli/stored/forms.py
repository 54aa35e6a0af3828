"""The table of forms in which the tasks of a group are stored."""

from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.stored.coded import CODED
from flexmerge_cli.stored.decoding import Described, RouteParts, Stored
from flexmerge_cli.stored.dense import COPY, MERGED
from flexmerge_cli.stored.form import GroupForm
from flexmerge_cli.stored.masked import MASKED

FORMS = {form.word: form for form in (COPY, MERGED, MASKED, CODED)}
"""Maps the manifest's word for a group's form to the form."""


def form_of(call: Call) -> GroupForm:
    """Return how a group is stored under a method."""
    return FORMS[call.method.form]


def known_form(word: str) -> str:
    """Return the word, or raise ValueError if there is no such form."""
    if word not in FORMS:
        raise ValueError(f"no form `{word}`; one of {', '.join(FORMS)}")
    return word


def stored_as(word: str, described: Described, parts: RouteParts) -> Stored:
    """Return how a tensor without a dense part is decoded. Raises DataError if the manifest is unsound about it."""
    decoder = FORMS[word].decoder
    if decoder is None:
        name, task = described.tensor, described.task
        raise DataError(f"{parts.path}: `{name}` is in no file of `{task}`", hint="fetch the bundle again")
    return decoder(described, parts)
