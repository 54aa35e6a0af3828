"""The table of forms in which tensors are stored. A new form is a line of it; no other module knows which there are."""

from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.stored.adapted import ADAPTED
from flexmerge_cli.stored.coded import CODED, MIXTURE
from flexmerge_cli.stored.decoding import Described, RouteParts, Stored
from flexmerge_cli.stored.dense import COPY, MERGED, DenseTensor
from flexmerge_cli.stored.form import Form, GroupForm
from flexmerge_cli.stored.joined import JOINED
from flexmerge_cli.stored.masked import MASKED, SUPERPOSED
from flexmerge_cli.stored.split import SPLIT

_FORMS = (COPY, MERGED, MASKED, SUPERPOSED, CODED, MIXTURE, ADAPTED, JOINED, SPLIT)
FORMS: dict[str, Form] = {form.word: form for form in _FORMS}
"""Maps the word for a form to the form."""


def group_forms() -> dict[str, GroupForm]:
    """Return the forms that a group can have, by the manifest's words."""
    return {word: form for word, form in FORMS.items() if isinstance(form, GroupForm)}


def form_of(call: Call) -> GroupForm:
    """Return how a group is stored under a method."""
    return group_forms()[call.method.form]


def known_form(word: str) -> str:
    """Return the word, or raise ValueError if no group can have such a form."""
    if word not in group_forms():
        raise ValueError(f"no form `{word}`; one of {', '.join(group_forms())}")
    return word


def stored_as(described: Described, parts: RouteParts) -> Stored:
    """Return how a tensor is decoded. Raises DataError if the manifest is unsound about it, or a part is missing."""
    form, dense = FORMS[described.form], described.dense
    if isinstance(form, GroupForm) and dense is not None:
        return DenseTensor(part=dense, dtype=described.dtype, shape=described.shape)
    if form.decoder is None:
        name, task = described.tensor, described.task
        raise DataError(f"{parts.path}: `{name}` is in no file of `{task}`", hint="fetch the bundle again")
    return form.decoder(described, parts)
