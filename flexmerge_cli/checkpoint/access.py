"""How sources that are not on this disk may be had. No I/O."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a run was asked of its sources, and where it tells what it fetches."""

    offline: bool = False
    """Nothing but what the Hub's cache holds."""
    on_message: Callable[[str], None] = lambda _message: None
    """Told before bytes are fetched: how many, and where they will lie."""


ONLINE = Access()
