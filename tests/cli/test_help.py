"""What is shown where no command, a wrong one, or one without its arguments was given."""

import re

import pytest
import typer

from flexmerge_cli.cli.app import COMMANDS, app

from ..program import fails, succeeds


def lines_of(*arguments):
    return [line.strip(" │") for line in succeeds(*arguments).out.splitlines()]


def test_without_arguments_the_help_is_shown():
    shown = succeeds()
    assert shown.out == succeeds("--help").out == succeeds("help").out and "Usage: flexmerge " in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_listed_and_its_examples_are_lines_of_their_own(name):
    assert any(line.startswith(f"{name} ") for line in lines_of("--help"))
    assert any(line.startswith(f"flexmerge {name}") for line in lines_of(name, "--help"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_the_name_of_a_command_is_its_help(name):
    assert succeeds("help", name).out == succeeds(name, "--help").out


def test_the_version_has_a_short_option():
    assert succeeds("-V").out == succeeds("--version").out


def test_no_line_of_help_is_wider_than_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(line) <= 80 for name in COMMANDS for line in succeeds("help", name).out.splitlines())


def test_options_stand_in_panels_and_say_what_they_take():
    shown = succeeds("help", "merge").out
    for panel in ("Sources", "What is stored", "How much is stored", "How it runs", "Output"):
        assert f"─ {panel} ─" in shown
    taken = {"--size": "SIZE", "--output": "FOLDER", "--relocate": "OLD=NEW", "--method-for": "PATTERN=METHOD"}
    for option, metavar in taken.items():
        assert re.search(rf"{option} .*{metavar}", shown), option
    assert "TEXT" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_seems_to_take_a_value(name):
    assert succeeds("help", name).out.count("<bool>") <= 1, "of --help alone, which is not ours"


def test_options_of_one_name_mean_the_same_everywhere():
    """They may differ only where the thing that they concern differs, as with -o."""
    known: dict[str, set[str]] = {}
    for name in COMMANDS:
        for parameter in typer.main.get_command(app).commands[name].params:
            for option in parameter.opts:
                known.setdefault(option, set()).add(parameter.help)
    different = {option for option, helps in known.items() if option.startswith("--") and len(helps) > 1}
    assert different == {
        "--output",
        "--task",
        "--tasks",
        "--method",
        "--plan",
        "--seed",
        "--private",
        "--statistics",
        "--join",
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell, monkeypatch):
    assert "flexmerge" in succeeds("--show-completion", shell).out
    monkeypatch.setenv("_FLEXMERGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "flexmerge me")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert succeeds().out.split() == ["merge", "methods"]


@pytest.mark.parametrize("arguments", [["merge"], ["merge", "--size"], ["merge", "plan.json", "--no-such-option"]])
def test_the_hint_of_what_cannot_be_parsed_is_a_command(arguments):
    assert fails(2, *arguments).err.endswith("\nhint: flexmerge merge --help\n")


def test_the_hint_of_an_unknown_command_is_a_command():
    assert fails(2, "mrege", says="merge").err.endswith("\nhint: flexmerge --help\n")
