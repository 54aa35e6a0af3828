"""How sources that are not on this disk may be had. No I/O."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flexmerge_cli.checkpoint.stream import StreamPool


def silent(_message: str) -> None:
    """Says nothing; by name, so that it can be sent to another process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a run was asked of its sources, and where it tells what it fetches."""

    offline: bool = False
    """Nothing but what the Hub's cache holds."""
    variant: str | None = None
    """Of weights that lie in several, e.g. `fp16`; taken where a source has it."""
    stream: StreamPool | None = None
    """Read weights that are not on this disk where they are, through this; None: fetch them."""
    on_message: Callable[[str], None] = silent
    """Told before bytes are fetched: how many, and where they will lie."""

    def elsewhere(self) -> "Access":
        """For another process, which fetches nothing and tells nothing."""
        return replace(self, stream=None, on_message=silent)

    def memory_left(self, max_memory: int | None) -> int | None:
        """Of --max-memory, beside what is held of streamed files."""
        held = self.stream.max_bytes if self.stream is not None else 0
        return None if max_memory is None else max(0, max_memory - held)


ONLINE = Access()
