"""Servers of tiny bundles, in this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from flexmerge_cli import open_bundle
from flexmerge_cli.server.app import make_app
from flexmerge_cli.server.run import ServerSettings, make_service

from .bundles import MADE


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A name of MADE -> that bundle, made once. Read only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MADE[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def client_of(bundle_of: Callable[[str], Path]) -> Iterator[Callable[..., TestClient]]:
    """A name of MADE and settings -> a client of a server of it, which runs until the test ends."""
    with ExitStack() as stack:

        def get(name: str, **settings: Any) -> TestClient:
            bundle = open_bundle(bundle_of(name))._bundle
            service = make_service(bundle, ServerSettings(**settings))
            return stack.enter_context(TestClient(make_app(service)))

        yield get
