"""Passes over the weights for what a method must know before its first element: exact, out of core.

A statistic is a task's own, so one pass serves every group. The engine knows nothing of what is measured.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexmerge_cli.engine.pool import ordered_map
from flexmerge_cli.methods.method import Statistic, Where

Span = tuple[str, int, int]
"""Tensor, first element, end."""
ReadDeltas = Callable[[Span], tuple[Tensor, Where]]
"""All M tasks' deltas of a span, [M, n] float32."""


@dataclass(frozen=True, slots=True)
class Domains:
    """Where each tensor belongs, per scope of a statistic."""

    block_of: dict[str, str]

    def of(self, scope: str, tensor: str) -> str:
        return {"model": "", "block": self.block_of[tensor], "tensor": tensor}[scope]


def run_statistics(
    first: Statistic,
    spans: Sequence[Span],
    domains: Domains,
    read: ReadDeltas,
    *,
    threads: int,
    on_pass: Callable[[int], None] = lambda _number: None,
) -> dict[str, Any]:
    """Domain -> finished value. spans: of all mergeable tensors, tensors by name, then in order of elements."""
    current: dict[str, Any] = {domains.of(first.scope, tensor): first for tensor, _, _ in spans}
    number = 0
    while any(hasattr(value, "measure") for value in current.values()):
        number += 1
        on_pass(number)
        current |= {
            domain: current[domain].finish(total)
            for domain, total in _pass(current, spans, domains, first.scope, read, threads)
        }
    return current


def _pass(
    current: dict[str, Any],
    spans: Sequence[Span],
    domains: Domains,
    scope: str,
    read: ReadDeltas,
    threads: int,
) -> Iterator[tuple[str, Any]]:
    open_spans = [span for span in spans if hasattr(current[domains.of(scope, span[0])], "measure")]

    def work(span: Span) -> Any:
        deltas, where = read(span)
        return current[domains.of(scope, span[0])].measure(deltas, where)

    totals: dict[str, Any] = {}
    for span, part in zip(open_spans, ordered_map(open_spans, work, threads=threads)):
        domain = domains.of(scope, span[0])
        totals[domain] = current[domain].combine(totals[domain], part) if domain in totals else part
    yield from totals.items()
