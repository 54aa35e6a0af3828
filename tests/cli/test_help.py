"""What is shown where no command, a wrong one, or one without its arguments was given."""

import pytest

from flexmerge_cli.cli.app import COMMANDS

from ..program import fails, succeeds


def test_without_arguments_the_help_is_shown():
    shown = succeeds()
    assert shown.out == succeeds("--help").out and shown.out.startswith("Usage: flexmerge ")
    assert shown.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_told_in_one_whole_line_and_its_examples_are_lines_of_their_own(name):
    (line,) = [line for line in succeeds("--help").out.splitlines() if line.startswith(f"  {name} ")]
    assert not line.endswith("...")
    lines = succeeds(name, "--help").out.splitlines()
    assert any(line.startswith(f"  flexmerge {name} ") for line in lines)


@pytest.mark.parametrize("arguments", [["merge"], ["merge", "--size"], ["merge", "plan.json", "--no-such-option"]])
def test_the_hint_of_what_cannot_be_parsed_is_a_command(arguments):
    assert fails(2, *arguments).err.endswith("\nhint: flexmerge merge --help\n")


def test_the_hint_of_an_unknown_command_is_a_command():
    assert fails(2, "mrege", says="merge").err.endswith("\nhint: flexmerge --help\n")
