"""The command line: each command parses, calls the library and shows. Nothing heavy is imported before it is used."""

import sys


def main() -> None:
    """Console script `flexmerge`."""
    from flexmerge_cli.cli.app import run

    sys.exit(run(sys.argv[1:]))
