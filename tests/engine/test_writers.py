"""Every stored form has a writer."""

from flexmerge_cli.engine.writers.table import WRITERS
from flexmerge_cli.stored.forms import FORMS


def test_every_form_that_a_group_can_have_is_written():
    assert set(WRITERS) == set(FORMS)
