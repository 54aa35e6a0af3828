"""The command line: each command parses, calls the library and prints. Heavy modules are imported when first used."""

import sys


def main() -> None:
    """Run the console script `flexmerge`."""
    try:
        from flexmerge_cli.cli.terminal import hold_closed_streams

        hold_closed_streams()
        from flexmerge_cli.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # It came before the program was loaded, or as it ended.
        code = 130
    sys.exit(code)
