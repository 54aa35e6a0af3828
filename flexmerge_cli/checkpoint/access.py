"""Says how a run may reach sources that are not on this disk. No I/O."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flexmerge_cli.checkpoint.stream import StreamPool


def silent(_message: str) -> None:
    """Discard a message. A named function, so that it can be pickled for another process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a run may reach its sources, and where it reports what it downloads."""

    offline: bool = False
    """Use only what the Hub's cache holds."""
    variant: str | None = None
    """The preferred variant of the weights, e.g. `fp16`; used where a source has it."""
    ignore: tuple[str, ...] = ()
    """Patterns of files and folders of a source that are left out."""
    with_code: bool = False
    """Carry the Python files beside the weights."""
    follow_links: bool = False
    """Read what a link leads to outside its source, such as the store of DVC or git-annex."""
    stream: StreamPool | None = None
    """The pool through which remote weights are read in place. None: download them."""
    on_message: Callable[[str], None] = silent
    """Called with what a user should know: the bytes and target of a download before it begins, and which files are not
    carried."""

    def for_process(self) -> "Access":
        """Return the same access for another process, which reports nothing and streams through a pool of its own."""
        return replace(self, on_message=silent)

    def memory_left(self, max_memory: int | None) -> int | None:
        """Return what remains of --max-memory after the buffers of streamed files."""
        held = self.stream.max_bytes if self.stream is not None else 0
        return None if max_memory is None else max(0, max_memory - held)


ONLINE = Access()
