"""Every call that writes, failed once with each error and killed once: `python -m tests.faults [COMMAND ...]`.

A command is run in a forked child to count its calls: opening for writing, write, pwrite, fsync, rename, link, symlink,
unlink, mkdir, rmdir and the reserving of blocks, through Python's os module and its files, and renameat2. Then it is
run anew for each call with ENOSPC, EIO, EMFILE, ENOMEM and SIGKILL in its place, and each time it is checked that

- the exit code is 1, or what it is without, and that nothing is called a bug in flexmerge,
- the old output is there, or the new one, whole; an error that comes after the new one is there says so,
- the same command then succeeds and makes what it always makes (exit 2 where the new one is there already),
- and nothing is left beside.
"""

import builtins
import contextlib
import ctypes
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .evaluation import tiny
from .families import plain, write_family
from .program import Child, flexmerge, tree

ERRORS = ("ENOSPC", "EIO", "EMFILE", "ENOMEM")
CALLS = (
    "write", "pwrite", "fsync", "rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "posix_fallocate",
    "ftruncate",
)  # fmt: skip


@dataclass(kw_only=True)
class Fault:
    """The call of a number fails, or the process is killed in its place; number 0 only counts."""

    number: int = 0
    kind: str = ""
    log: int = -1
    """Descriptor to which the names of calls are written, a line each."""
    seen: int = field(default=0)

    def meet(self, name: str) -> None:
        self.seen += 1
        if self.log >= 0:
            real_write(self.log, f"{name}\n".encode())
        if self.seen == self.number:
            if self.kind == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))


real_write = os.write


class Written(io.FileIO):
    """A file of `open` that meets the fault at each write."""

    fault: Fault

    def write(self, data: Any) -> int:
        self.fault.meet("write")
        return super().write(data) or 0


def install(fault: Fault) -> None:
    """Patch a child that is run once: nothing is put back."""

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not (name == "write" and arguments[0] <= 2):
                fault.meet(name)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, faulty(name, getattr(os, name)))
    real_open, real_os_open, real_dll = io.open, os.open, ctypes.CDLL

    def os_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            fault.meet("open")
        return real_os_open(path, flags, *arguments, **options)

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+") or isinstance(file, int):
            return real_open(file, mode, *arguments, **options)
        fault.meet("open")
        if "+" in mode:
            return real_open(file, mode, *arguments, **options)
        raw = Written(file, mode.replace("b", "").replace("t", ""))
        raw.fault = fault
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def dll(name: Any, *arguments: Any, **options: Any) -> Any:
        found = real_dll(name, *arguments, **options)
        if name is None:
            real = found.renameat2

            def renameat2(*values: Any) -> int:
                try:
                    fault.meet("renameat2")
                except OSError as error:
                    ctypes.set_errno(error.errno or 0)
                    return -1
                return int(real(*values))

            found.renameat2 = renameat2
        return found

    os.open, io.open, builtins.open = os_open, opened, opened  # type: ignore[assignment]
    ctypes.CDLL = dll  # type: ignore[assignment,misc]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is run in a folder that holds a plan, and what else `others` makes there."""

    arguments: tuple[str, ...]
    """`{place}` stands for the folder, `{shared}` for the one with family, plan and bundle."""
    output: str
    """A file or folder that is made."""
    parts: tuple[str, ...] = ()
    """Subfolders of the output, if not the whole but each of these appears whole or not at all."""
    has_old: bool = False
    """Whether something lies there before, in which case --force is among the arguments."""
    code: int = 0
    """Exit code where nothing fails."""
    again: int = 2
    """Exit code of the same command once the new output is there."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.output}/{part}" for part in self.parts) or (self.output,)


COMMANDS = {
    "merge": Command(arguments=("merge", "{shared}/plan.json", "-o", "{place}/b", "--threads", "1"), output="b"),
    "merge --force": Command(
        arguments=("merge", "{shared}/plan.json", "-o", "{place}/b", "--threads", "1", "--force"),
        output="b",
        has_old=True,
        again=0,
    ),
    "merge --sizes": Command(
        arguments=(
            "merge", "{shared}/plan.json", "--method", "average", "--sizes", "1x,2x", "-o", "{place}/b",
            "--threads", "1",
        ),
        output="b",
        parts=("1x", "2x"),
        again=0,
    ),
    "update": Command(
        arguments=("update", "{shared}/bundle", "--plan", "{shared}/more.json", "-o", "{place}/b", "--threads", "1"),
        output="b",
    ),
    "update --force": Command(
        arguments=(
            "update", "{place}/b", "--plan", "{shared}/more.json", "-o", "{place}/b", "--threads", "1", "--force",
        ),
        output="b",
        has_old=True,
        again=0,
    ),
    "export --all": Command(arguments=("export", "{shared}/bundle", "--all", "-o", "{place}/out"), output="out"),
    "export --link --force": Command(
        arguments=("export", "{shared}/bundle", "--all", "--link", "-o", "{place}/out", "--force"),
        output="out",
        has_old=True,
        again=0,
    ),
    "plan": Command(
        arguments=("plan", "--base", "{shared}/base", "--tasks", "{shared}/tasks", "-o", "{place}/p.json"),
        output="p.json",
    ),
    "plan --force": Command(
        arguments=("plan", "--base", "{shared}/base", "--tasks", "{shared}/tasks", "-o", "{place}/p.json", "--force"),
        output="p.json",
        has_old=True,
        again=0,
    ),
    "calibrate": Command(
        arguments=(
            "calibrate", "{shared}/models.json", "--spec", "{shared}/calib.yaml", "-o", "{place}/c",
            "--statistics", "inputs,outputs",  # a process that has used autograd cannot fork others that use it
        ),
        output="c",
    ),
    "tune --bundle": Command(
        arguments=(
            "tune", "{shared}/models.json", "--spec", "{shared}/calib.yaml", "--bundle", "{shared}/models",
            "--method", "surgery:rank=1,steps=2", "-o", "{place}/b",
        ),
        output="b",
    ),
    "route": Command(
        arguments=("route", "{shared}/models", "--spec", "{shared}/calib.yaml", "-o", "{place}/b"),
        output="b",
    ),
    "eval --init": Command(arguments=("eval", "--init", "{shared}/bundle", "-o", "{place}/e.yaml"), output="e.yaml"),
    "eval with a gate": Command(
        arguments=(
            "eval", "{shared}/bundle", "--spec", "{shared}/spec.yaml", "--plan", "{shared}/plan.json", "--allow-exec",
            "--max-drop", "1pt", "--csv", "{place}/s.csv",
        ),
        output="s.csv",
        code=6,  # undecided: a number that a command prints has no bound
    ),
}  # fmt: skip
Content = tuple[dict[str, bytes] | bytes | None, ...]


class Bench:
    """The commands' inputs, made once, and what each command makes where nothing fails."""

    def __init__(self, root: Path) -> None:
        self._root, self._shared = root, root / "shared"
        self._number = 0
        write_family(self._shared, plain(num_tasks=2, layers=1))
        at = str(self._shared)
        self._run("plan", "--base", f"{at}/base", "--tasks", f"{at}/tasks", "-o", f"{at}/plan.json")
        self._run("plan", f"{at}/plan.json", "--add", f"task2={at}/tasks/task1", "-o", f"{at}/more.json")
        self._run("merge", f"{at}/plan.json", "--method", "average", "-o", f"{at}/bundle")
        self._models()
        self._old, self._new = self._olds(), {}
        (self._shared / "score.json").write_text('{"value": 0.9, "n": 100}')
        told = f'{{kind: command, command: [sh, -c, "cat {self._shared}/score.json", "{{checkpoint}}"]}}'
        (self._shared / "spec.yaml").write_text(f"version: 1\ntasks: {{task0: {told}, task1: {told}}}\n")

    def _olds(self) -> dict[str, Path]:
        """What lies at an output before it is forced: other than what is made there, and of its kind."""
        old = {"b": self._shared / "bundle", "out": self._shared / "old-out", "p.json": self._shared / "old.json"}
        self._run("plan", f"{self._shared}/plan.json", "--blocks", "layer", "-o", f"{old['p.json']}")
        self._run("export", f"{self._shared}/bundle", "--all", "-o", f"{old['out']}")
        return old

    def _models(self) -> None:
        """Two models that run, their plan and bundle, and a spec with examples."""
        at, tasks = self._shared, {}
        for seed, name in enumerate(("one", "two"), 1):
            tiny.tuned_bert(at / "bert", name, seed)
            tiny.rows(at / f"{name}.jsonl", text=tiny.sentences(8, seed), label=["no", "yes"] * 4)
            tasks[name] = f"{{kind: text-classification, data: {name}.jsonl}}"
        words = ", ".join(f"{name}: {told}" for name, told in tasks.items())
        (at / "calib.yaml").write_text(f"version: 1\ntasks: {{{words}}}\n")
        self._run("plan", "--base", f"{at}/bert/base", "--tasks", f"{at}/bert/tasks", "-o", f"{at}/models.json")
        self._run("merge", f"{at}/models.json", "-o", f"{at}/models")

    def calls(self, name: str) -> list[str]:
        """Names of the calls of a run in which nothing fails, which also tells what it makes."""
        command = COMMANDS[name]
        with self._place(command) as place:  # here first: what a child imports, each later one would import anew
            assert flexmerge(*self._arguments(command, place)).code == command.code
        with self._place(command) as place:
            log = self._root / "log"
            with log.open("wb", buffering=0) as file:
                code, printed = self._child(command, place, Fault(log=file.fileno()))
            assert code == command.code, printed
            self._new[name] = _content(place, command)
            assert None not in self._new[name] and not _beside(place, command)
        return log.read_text().split()

    def problems(self, name: str, number: int, kind: str) -> list[str]:
        """What does not hold if the call of this number fails with `kind`, or is killed. calls(name) comes first."""
        command, found = COMMANDS[name], []
        with self._place(command) as place:
            old, new = _content(place, command), self._new[name]
            code, printed = self._child(command, place, Fault(number=number, kind=kind))
            there = _content(place, command)
            if any(found not in whole for found, whole in zip(there, zip(old, new))):
                found.append("neither the old nor the new one is there")
            if "Traceback" in printed or "bug in flexmerge" in printed:
                found.append(f"says {printed!r}")
            if code not in ((-signal.SIGKILL, command.code) if kind == "SIGKILL" else (command.code, 1)):
                found.append(f"exit {code}")
            if code == command.code and there != new:
                found.append(f"exit {code}, and the new one is not there")
            if code == 1 and there == new and "in its place" not in printed:
                found.append(f"the new one is there, and the error does not say so: {printed!r}")
            again = flexmerge(*self._arguments(command, place))
            if again.code != (command.again if there == new else command.code):
                found.append(f"the same command: exit {again.code}, {again.err!r}")
            if _content(place, command) != new:
                found.append("the same command made something else")
            left = _beside(place, command)
            left += [path.name for path in (self._root / "cache").rglob("*.partial")]
            if left:
                found.append(f"left: {left}")
        return found

    def _child(self, command: Command, place: Path, fault: Fault) -> tuple[int, str]:
        def before() -> None:
            tempfile.tempdir = str(self._root)  # models of an eval, which a killed one leaves there
            install(fault)

        return Child(*self._arguments(command, place), before=before).wait()

    def _arguments(self, command: Command, place: Path) -> list[str]:
        return [argument.format(place=place, shared=self._shared) for argument in command.arguments]

    @contextlib.contextmanager
    def _place(self, command: Command) -> Iterator[Path]:
        self._number += 1
        place, cache = self._root / str(self._number), self._root / "cache"
        place.mkdir()
        shutil.rmtree(cache, ignore_errors=True)
        os.environ["XDG_CACHE_HOME"] = str(cache)  # of scores
        if command.has_old:
            old = self._old[command.output]
            (shutil.copytree if old.is_dir() else shutil.copyfile)(old, place / command.output)
        yield place
        shutil.rmtree(place)

    def _run(self, *arguments: str) -> None:
        result = flexmerge(*arguments)
        assert result.code == 0, result.err


def _content(place: Path, command: Command) -> Content:
    """What lies at each of a command's outputs, or None."""
    paths = [place / output for output in command.outputs]
    return tuple(tree(path) if path.is_dir() else path.read_bytes() if path.exists() else None for path in paths)


def _beside(place: Path, command: Command) -> list[str]:
    """Names of what lies beside a command's outputs."""
    folders = {(place / output).parent for output in command.outputs}
    ours = {place / command.output, *(place / output for output in command.outputs)}
    return sorted(path.name for folder in folders | {place} if folder.exists() for path in set(folder.iterdir()) - ours)


def main(names: list[str]) -> int:
    bad = 0
    torch.set_num_threads(1)  # a child that is forked has no others
    with tempfile.TemporaryDirectory(prefix="flexmerge-faults-") as root:
        bench = Bench(Path(root))
        for name in names or COMMANDS:
            calls = bench.calls(name)
            counts = Counter(calls)
            print(
                f"{name}: {len(calls)} calls ({', '.join(f'{count} {call}' for call, count in counts.most_common())})"
            )
            runs = 0
            for number, call in enumerate(calls, 1):
                for kind in (*ERRORS, "SIGKILL"):
                    runs += 1
                    problems = bench.problems(name, number, kind)
                    bad += bool(problems)
                    for problem in problems:
                        print(f"   {kind} at call {number}, {call}: {problem}")
            print(f"   {runs} runs, {bad} with problems so far", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
