"""Which commands take the options that many have, and why the others do not."""

import pytest
import typer

from flexmerge_cli.cli.app import COMMANDS, app

from ..program import fails

NO_WORK = "it does no work on weights"
OF_MODELS = ("calibrate", "tune")
ABSENT = {
    "--verbose": {
        "push": "it tells every repository and its bytes in any case",
        "serve": "its table of figures is /metrics",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--quiet": {"methods": "it prints one thing, which is what was asked for"},
    "--json": {},
    "--max-memory": {
        "calibrate": "it holds one model and half a gigabyte of sums, or one sum that is larger",
        "tune": "it holds all task vectors: the models have to fit",
        "inspect": "it reads headers, and with --verify one piece at a time",
        "diff": NO_WORK,
        "export": "it writes one tensor at a time",
        "push": NO_WORK,
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--stream": {
        "route": "files of a bundle on the Hub are always fetched and compared with their digests",
        "inspect": "it reads headers, wherever they are",
        "diff": "it reads headers, wherever they are",
        "export": "files of a bundle on the Hub are always fetched and compared with their digests",
        "push": "it reads a bundle on this disk",
        "serve": "it loads nothing from the network",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--offline": {
        "serve": "it is always offline",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--fit": {
        **dict.fromkeys((*OF_MODELS, "inspect", "diff", "export", "push", "route", "serve"), "it chooses no size"),
        "update": "it asks what the bundle was asked",
        "eval": "it scores a bundle as it is; `curve` takes --fit",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--cluster": {
        "plan": "a plan prices methods; clusters are priced by `merge --dry-run`",
        **dict.fromkeys((*OF_MODELS, "inspect", "diff", "export", "push", "route", "serve"), "it chooses no size"),
        "update": "it asks what the bundle was asked",
        "eval": "it scores a bundle as it is; `curve` takes --cluster",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--max-distance": {
        "plan": "the distance of a bundle is known once it is merged",
        "eval": "it judges by scores: --max-drop",
        "curve": "it judges by scores: --max-drop",
        **dict.fromkeys((*OF_MODELS, "inspect", "diff", "export", "push", "serve"), "it makes no bundle"),
        "route": "it changes no weights",
        "update": "it asks what the bundle was asked",
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
    "--html": {
        **dict.fromkeys((*OF_MODELS, "diff", "export", "push", "route", "serve", "update"), "it has no page"),
        "methods": NO_WORK,
        "cache": NO_WORK,
    },
}
"""Option -> command that lacks it -> the reason."""


@pytest.mark.parametrize("option", ABSENT)
def test_an_option_stands_on_every_command_where_it_makes_sense(option):
    commands = typer.main.get_command(app).commands
    lacking = {name for name in COMMANDS if option not in {word for own in commands[name].params for word in own.opts}}
    assert lacking == set(ABSENT[option])


@pytest.mark.parametrize("command", ["eval", "curve", "serve"])
def test_max_memory_that_is_no_size_is_refused(command, tmp_path):
    fails(2, command, tmp_path, "--max-memory", "much", says="much")
