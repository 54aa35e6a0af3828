"""The program: its commands, and what becomes of an error."""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from flexmerge_cli.cli import eval as eval_command
from flexmerge_cli.cli import export, inspect, merge, methods, plan
from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.version import VERSION

app = typer.Typer(
    name="flexmerge",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.plan,
    "merge": merge.merge,
    "inspect": inspect.inspect,
    "export": export.export,
    "eval": eval_command.evaluate,
    "methods": methods.methods,
}
for name, command in COMMANDS.items():
    app.command(name=name)(command)


@app.callback(invoke_without_command=True)
def program(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
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
    """Exit code of one run. Errors go to stderr, and as JSON to stdout where --json was asked for."""
    if arguments == ["--version"]:  # typer imports pydantic before it runs anything: half of the time of this one
        print(VERSION)
        return 0
    as_json, debug = "--json" in arguments, "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        result = app(arguments, prog_name="flexmerge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except FlexmergeError as error:
        failure = error
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        failure = FlexmergeError("out of memory", hint="--max-memory limits what a run takes, --threads 1 halves it")
    except OSError as error:
        failure = FlexmergeError(f"{error.filename or 'I/O'}: {error.strerror or error}", hint="check path and disk")
    except Exception as error:
        if not hasattr(error, "format_message"):
            if debug:
                raise
            failure = FlexmergeError(
                f"{type(error).__name__}: {error}",
                hint="this is a defect of flexmerge: report it, with --debug's output",
            )
        else:  # the parser's own errors: unknown option, missing value
            command = f"{arguments[0]} " if arguments[0] in COMMANDS else ""
            failure = FlexmergeError(error.format_message(), hint=f"flexmerge {command}--help")
            failure.exit_code = 2
    if debug:
        traceback.print_exc()
    if as_json:
        value = {"message": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
        print(json.dumps({"error": value} | (failure.document or {}), indent=2 if failure.document else None))
    print(f"error: {failure.message}", file=sys.stderr)
    if failure.hint:
        print(f"hint: {failure.hint}", file=sys.stderr)
    return failure.exit_code
