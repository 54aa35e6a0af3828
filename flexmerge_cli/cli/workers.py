"""Runs the parts of a plan or a bundle as tasks of a Ray cluster; the command that asks for it joins them.

A task runs the same command with `--part I/N` in a process of its node. If the node dies, Ray runs it again elsewhere,
and a part of a bundle continues where it stopped. No weights go through Ray: all nodes see the same files.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import FlexmergeError, MachineError, SourceError, UsageError
from flexmerge_cli.request.part import Share
from flexmerge_cli.request.plan import PlanRequest
from flexmerge_cli.text import expanded

RETRIES = 3  # of a part whose node died
PARTS_PER_SLOT = 2  # more balance the load of unequal nodes better, but each opens all headers
VALUES = ("--workers", "--html", "--method", "--size", "--merges", "--fit", "--dtype", "--threads", "--device")

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Workers:
    """A cluster, and how its nodes do the parts."""

    ray: Any
    nodes: tuple[dict[str, Any], ...]
    """The nodes that are alive and have processors and, if parts compute on GPUs, a GPU, as Ray describes them."""
    device: str
    """What all parts compute on."""
    threads: int
    """The threads of each part."""

    @staticmethod
    @contextlib.contextmanager
    def of(text: str, *, device: str, threads: int | None) -> Iterator["Workers"]:
        """Connect to the cluster of `ray` or `ray:ADDRESS`. Raises UsageError, MachineError."""
        kind, _, address = text.partition(":")
        if kind != "ray":
            raise UsageError(f"--workers {text} is no cluster", hint="--workers ray, or ray:HOST:6379")
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise UsageError("--workers requires Ray", hint="pip install 'flexmerge-cli[ray]'") from None
        try:
            ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False, logging_level=40)
        except Exception as error:  # no cluster, or one of another version
            raise MachineError(
                f"no Ray cluster at {address or 'this machine'}: {_line(error)}",
                hint="start one with `ray start --head`, or name it: --workers ray:HOST:6379",
            ) from None
        try:
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
            if not nodes:
                raise MachineError("no node of the Ray cluster has a processor", hint="ray status")
            if device == "auto":
                device = "cuda" if all(_gpus(node) for node in nodes) else "cpu"
            if device != "cpu" and not (nodes := [node for node in nodes if _gpus(node)]):
                raise UsageError(f"--device {device}: no node of the Ray cluster has a GPU", hint="--device cpu")
            most = max(int(node["Resources"]["CPU"]) for node in nodes)
            if threads is not None and threads > most:  # Ray would wait for such a node without end.
                raise UsageError(
                    f"--threads {threads}: no node of the Ray cluster has more than {most} processors",
                    hint=f"--threads {most}",
                )
            shared_by = (1 if device == "cpu" else _gpus(node) for node in nodes)
            threads = threads or max(1, min(int(n["Resources"]["CPU"]) // by for n, by in zip(nodes, shared_by)))
            yield Workers(ray, tuple(nodes), device, threads)
        finally:
            ray.shutdown()

    @property
    def count(self) -> int:
        """The number of parts: some for each that can run at the same time."""
        slots = [int(node["Resources"]["CPU"]) // self.threads for node in self.nodes]
        if self.device != "cpu":
            slots = [min(count, _gpus(node)) for count, node in zip(slots, self.nodes)]
        return max(1, PARTS_PER_SLOT * sum(slots))

    def check(self, paths: Sequence[Path]) -> None:
        """Raise SourceError that names a node which does not see one of the paths."""
        on_node: Any = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        names = [str(path.absolute()) for path in (Path.cwd(), *paths)]
        look = self.ray.remote(num_cpus=0)(_missing)
        asked = [
            look.options(scheduling_strategy=on_node(node["NodeID"], soft=False)).remote(names) for node in self.nodes
        ]
        for node, found in zip(self.nodes, self._results(asked, "the paths")):
            if found:
                raise SourceError(
                    f"node {node['NodeManagerAddress']} of the cluster does not see {found[0]}",
                    hint="mount it at the same path on all nodes, or use addresses such as s3://bucket/folder",
                )

    def run(self, words_of: Callable[[Share], list[str]], on_progress: OnProgress) -> None:
        """Run all parts. words_of: the words of a part's command. Raises the error of the first part that fails."""
        options = {"num_cpus": self.threads, "max_retries": RETRIES}
        options |= {"num_gpus": 1} if self.device != "cpu" else {}
        task = self.ray.remote(**options)(_run)
        shares = [Share(number, self.count) for number in range(1, self.count + 1)]
        more = ["--device", self.device, "--threads", str(self.threads), "--quiet"]
        parts = {task.remote([*words_of(share), *more], str(Path.cwd())): share for share in shares}
        on_progress("parts", 0, len(shares))
        left = list(parts)
        while left:
            done, left = self.ray.wait(left, num_returns=1)
            [(code, said)] = self._results(done, f"part {parts[done[0]]}")
            if code:
                raise _failed(parts[done[0]], code, said)
            on_progress("parts", len(shares) - len(left), len(shares))

    def _results(self, asked: Sequence[Any], what: str) -> list[Any]:
        try:
            return list(self.ray.get(list(asked)))
        except Exception as error:  # a node that died too often, or has no flexmerge
            raise MachineError(
                f"the cluster did not finish {what}: {_line(error)}",
                hint="install the same version of flexmerge on all nodes, and run the command again",
            ) from None


def part_words(words: Sequence[str], *, of_plan: bool) -> list[str]:
    """Leave out of a command's words what concerns the join alone."""
    values = VALUES if of_plan else ("--workers", "--html", "--threads", "--device")
    found: list[str] = []
    is_value = False
    for word in words:
        if not is_value and word not in (*values, "--all-methods") and word.partition("=")[0] not in values:
            found.append(word)
        is_value = not is_value and word in values
    return found


def named_paths(words: Sequence[str]) -> list[Path]:
    """Return the paths in a command's words that exist here, also in `--option=PATH`, `PATH#NAME`, `key=@PATH`."""
    parts = {part for word in words for part in (word, *re.split("[=@#,]", word)) if part}
    return [Path(part) for part in sorted(parts) if os.path.lexists(part)]


@contextlib.contextmanager
def plan_parts(
    workers: str, words: Sequence[str], output: Path, request: PlanRequest, *, on_progress: OnProgress, **run: Any
) -> Iterator[list[Path]]:
    """Give the files of all parts of a plan, which are removed at the end.

    words: those of the command. run: `device` and `threads`. Raises the error of a part, SourceError, MachineError.
    """
    sources = [request.relative_to / expanded(s) for s in (request.base, *request.tasks.values()) if not is_remote(s)]
    with shared_folder(output) as folder:

        def words_of(part: Share) -> list[str]:
            place = ["-o", str(folder / f"{part.number}.json"), "--force"]
            return ["plan", *part_words(words, of_plan=True), "--part", str(part), *place]

        with Workers.of(workers, **run) as cluster:
            cluster.check([folder, *sources, *named_paths(words)])
            cluster.run(words_of, on_progress)
            found = [folder / f"{number}.json" for number in range(1, cluster.count + 1)]
        yield found


def merge_parts(
    workers: str, words: Sequence[str], output: str, paths: Sequence[Path], *, on_progress: OnProgress, **run: Any
) -> str:
    """Write all parts of a bundle where the join finds them, and return the device that made them.

    paths: what the parts read besides the paths in `words`; those that are not here lie elsewhere there, too. The rest
    is as in `plan_parts`.
    """
    with contextlib.ExitStack() as stack:
        folder = [] if is_remote(output) else [stack.enter_context(shared_folder(Path(output)))]
        cluster = stack.enter_context(Workers.of(workers, **run))
        cluster.check([*folder, *named_paths(words), *(path for path in paths if path.exists())])
        cluster.run(lambda part: ["merge", *part_words(words, of_plan=False), "--part", str(part)], on_progress)
        return cluster.device


@contextlib.contextmanager
def shared_folder(beside: Path) -> Iterator[Path]:
    """Make a folder beside an output, which every node must see, and remove it at the end."""
    beside.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.parts-", dir=beside.absolute().parent) as folder:
        yield Path(folder)


def _gpus(node: dict[str, Any]) -> int:
    return int(node["Resources"].get("GPU", 0))


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.lexists(path)]


def _run(words: list[str], folder: str) -> tuple[int, str]:
    """Run a command in a node's process. Returns its exit code and what it said of errors."""
    from flexmerge_cli.cli.app import run

    os.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        return run(words), said.getvalue()


def _failed(part: Share, code: int, said: str) -> FlexmergeError:
    message, _, hint = said.rpartition("error: ")[2].partition("\nhint: ")
    error = FlexmergeError(f"part {part}: {message.strip()}", hint=hint.strip() or None)
    error.exit_code = code
    return error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"
