"""`python -m flexmerge_cli`."""

from flexmerge_cli.cli import main

if __name__ == "__main__":
    main()
