"""Work for processes of test_processes.py: a module of its own, because they import it anew."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flexmerge_cli.errors import DataError

prepared: list[int] = []


def prepare(folder: Path) -> Callable[[str], object]:
    prepared.append(os.getpid())
    return partial(work, folder)


def work(folder: Path, job: str) -> object:
    import torch

    if job == "fail":
        wait_for(folder / "begun")
        raise DataError("job fails", hint="do something")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "sleep":
        try:
            (folder / "begun").touch()
            time.sleep(60)
        finally:
            (folder / "cleaned").touch()
    return job, prepared, torch.get_num_threads()


def unprepared() -> Callable[[str], object]:
    raise DataError("nothing is prepared")


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
