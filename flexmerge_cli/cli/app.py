"""Defines the program: its commands, and how it reports errors."""

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from flexmerge_cli.cli import (
    cache,
    calibrate,
    curve,
    diff,
    export,
    inspect,
    merge,
    methods,
    plan,
    push,
    route,
    serve,
    tune,
    update,
)
from flexmerge_cli.cli import eval as eval_command
from flexmerge_cli.cli.failures import Interruption, failure_of
from flexmerge_cli.cli.output import note, tell
from flexmerge_cli.cli.signals import Signals, interrupting_signals
from flexmerge_cli.cli.terminal import OutputLost, TerminalStream, shown_streams
from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.version import VERSION

app = typer.Typer(
    name="flexmerge",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.plan,
    "calibrate": calibrate.calibrate,
    "tune": tune.tune,
    "merge": merge.merge,
    "update": update.update,
    "inspect": inspect.inspect,
    "diff": diff.diff,
    "export": export.export,
    "eval": eval_command.evaluate,
    "curve": curve.curve,
    "route": route.route,
    "push": push.push,
    "serve": serve.serve,
    "methods": methods.methods,
    "cache": cache.cache,
}

PARSERS = {
    "eval": eval_command.EvalCommand,
    "merge": merge.MergeCommand,
    "plan": plan.PlanCommand,
    "serve": plan.PlanCommand,
}


class _Carried(Exception):
    """Carries an exception past the argument parser, which would handle some exceptions itself."""


def _carrying(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def carried(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (KeyboardInterrupt, SystemExit, OSError) as error:
            raise _Carried from error

    return carried


for name, command in COMMANDS.items():
    app.command(name=name, cls=PARSERS.get(name))(_carrying(command))


@app.callback(invoke_without_command=True)
def program(
    version: Annotated[
        bool, typer.Option("-V", "--version", metavar=" ", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Pack many fine-tuned models of one base into a bundle of any size between one model and all of them.

    \b
    flexmerge plan --base base/ --tasks finetuned/ -o plan.json
    flexmerge merge plan.json --method auto --size 1x -o bundle/
    flexmerge eval bundle/ --spec eval.yaml
    """
    if version:
        print(VERSION)
        raise typer.Exit


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Errors go to stderr and, with --json, as JSON to stdout."""
    with interrupting_signals() as signals, shown_streams() as stdout, shown_warnings():
        try:
            return _ended(arguments, stdout, signals)
        except KeyboardInterrupt as error:  # while an earlier error was being reported
            return failure_of(error).exit_code


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print Python's warnings like our own, but not those of libraries about their arithmetic and their future.

    Results are checked, and odd values in a stranger's file must not print lines of our code. -W shows everything.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (RuntimeWarning, FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda message, *_where, **_more: note(f"warning: {message}")
        yield


def _ended(arguments: list[str], stdout: TerminalStream, signals: Signals) -> int:
    """Run the command, report its outcome and return the exit code."""
    failure: FlexmergeError | None = None
    code = 0
    try:
        code = _code_of(arguments)
    except BaseException as error:
        signals.is_over = isinstance(error, KeyboardInterrupt)
        failure = _failure(error, arguments)
        code = failure.exit_code
    try:
        if failure is not None and "--json" in arguments and not stdout.is_used:
            value = {"message": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
            print(json.dumps({"error": value} | (failure.document or {}), indent=2 if failure.document else None))
        stdout.flush()
    except OutputLost as lost:
        failure = failure or lost
        code = code or lost.exit_code  # the earlier failure says more
    if isinstance(failure, Interruption):
        note(failure.message)
    elif failure is not None and not (isinstance(failure, OutputLost) and failure.unread):
        tell(failure)
    return code


def _code_of(arguments: list[str]) -> int:
    """Return the exit code of a run without errors. Raises whatever goes wrong."""
    if arguments in (
        ["--version"],
        ["-V"],
    ):  # typer would import pydantic first, which doubles the time
        print(VERSION)
        return 0
    try:
        result = _parser()(_without_debug(arguments), prog_name="flexmerge", standalone_mode=False)
    except _Carried as carried:
        assert carried.__cause__ is not None
        raise carried.__cause__ from None
    except SystemExit as done:  # the parser's own, after completing words for a shell
        result = done.code
    return result if isinstance(result, int) else 0


@functools.cache
def _parser() -> Callable[..., Any]:
    """Return the parser of all commands. Making it takes 25 ms, more than some commands."""
    return typer.main.get_command(app)


def _failure(error: BaseException, arguments: list[str]) -> FlexmergeError:
    if "--debug" in arguments:
        traceback.print_exception(error)
    command = _without_debug(arguments)[0]
    return failure_of(error, command if command in COMMANDS else "")


def _without_debug(arguments: list[str]) -> list[str]:
    """Return the arguments for the parser: `help COMMAND` becomes `COMMAND --help`."""
    words = [argument for argument in arguments if argument != "--debug"]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    return words or ["--help"]
