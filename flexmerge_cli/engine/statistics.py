"""Passes over the weights for what a method must know before its first element: exact, out of core.

The engine does not know what is measured. A job is one statistic over one domain (the model, a block, a tensor) and one
set of tasks; all jobs that want a range of a tensor measure it in the same visit. Domains are visited one after
another, and each is finished at its end, so that memory does not grow with their number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexmerge_cli.engine.pool import ordered_map
from flexmerge_cli.engine.spans import Span
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Statistic, Where

Tasks = tuple[int, ...]
Key = tuple[str, Tasks]
"""A domain and tasks."""
ReadDeltas = Callable[[Span, Tasks], Tensor]
"""Returns float32 [k, n], the task vectors of these tasks."""


def run_statistics(
    first: Statistic,
    wanted: Mapping[str, Sequence[Tasks]],
    spans: Sequence[Span],
    domain_of: Callable[[str, str], str],
    read: ReadDeltas,
    where: Callable[[Span, Tasks], Where],
    *,
    threads: int,
    device: "torch.device | None" = None,
    on_pass: Callable[[int], None] = lambda _number: None,
) -> dict[Key, Any]:
    """Return the finished value of each (domain, tasks). wanted: domain -> sets of tasks. spans: tensors by name, then
    by element; they are visited in this order, but domain by domain.

    domain_of: (scope, tensor) -> the domain it belongs to. device: where the threads measure.
    """
    jobs: dict[Key, Any] = {(domain, tasks): first for domain, sets in wanted.items() for tasks in sets}
    number = 0
    while any(isinstance(job, Statistic) for job in jobs.values()):
        number += 1
        on_pass(number)
        jobs |= _one_pass(jobs, first.scope, wanted, spans, domain_of, read, where, threads, device)
    return jobs


def _one_pass(
    jobs: Mapping[Key, Any],
    scope: str,
    wanted: Mapping[str, Sequence[Tasks]],
    spans: Sequence[Span],
    domain_of: Callable[[str, str], str],
    read: ReadDeltas,
    where: Callable[[Span, Tasks], Where],
    threads: int,
    device: "torch.device | None",
) -> dict[Key, Any]:
    def keys(span: Span) -> list[Key]:
        domain = domain_of(scope, span.tensor)
        return [(domain, tasks) for tasks in wanted.get(domain, ()) if isinstance(jobs[domain, tasks], Statistic)]

    visits = [(span, found) for span in spans if (found := keys(span))]
    visits.sort(key=lambda visit: visit[1][0][0])

    def work(visit: tuple[Span, list[Key]]) -> list[Any]:
        span, found = visit
        needed = tuple(sorted({task for _, tasks in found for task in tasks}))
        deltas = read(span, needed)
        row = {task: index for index, task in enumerate(needed)}
        return [
            jobs[key].measure(
                deltas if key[1] == needed else deltas[[row[task] for task in key[1]]], where(span, key[1])
            )
            for key in found
        ]

    totals: dict[Key, Any] = {}
    finished: dict[Key, Any] = {}
    domain = ""
    with ordered_map(visits, work, threads=threads, device=device) as measured:
        for (_, found), parts in zip(visits, measured):
            if found[0][0] != domain:
                finished |= _finished(jobs, totals)
                domain = found[0][0]
            for key in found:
                part = parts.pop(0)
                totals[key] = jobs[key].combine(totals[key], part) if key in totals else part
                del part  # it may be large, and the loop now waits for the next range
    return finished | _finished(jobs, totals)


def _finished(jobs: Mapping[Key, Any], totals: dict[Key, Any]) -> dict[Key, Any]:
    """Finish the totals, which are consumed, as values or next passes."""
    return {key: jobs[key].finish(totals.pop(key)) for key in list(totals)}
