"""Finds the writer of each stored form, and writes what all groups of a tensor store together."""

from collections.abc import Mapping, Sequence
from importlib import import_module

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.engine.chain import Chain
from flexmerge_cli.engine.encode import Encoder, Piece
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.spans import widest
from flexmerge_cli.engine.work import Raw, cast
from flexmerge_cli.engine.writers.writer import Writer
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Scope


def writer_of(group: StoredGroup) -> Writer:
    """Return what writes the group's form."""
    module, _, name = group.form.writer.partition(":")
    found: Writer = getattr(import_module(module), name)
    return found


def encode(encoder: Encoder, storage: Storage, raw: Raw, values: Mapping[Tasks, Tensor] | None = None) -> Piece:
    """Write all that one range of a tensor stores. values: what methods of scope `block` made of it, by group."""
    piece, span = Piece(sources=raw.digests), raw.span
    for group in storage.groups:
        writer_of(group).write(encoder, storage, group, raw, piece, (values or {}).get(group.tasks))
    for base in (part for part in storage.parts if part.array.role == "base"):
        # Copied, because the next item reuses the buffer, and the hash is taken later.
        encoder.emit(base, span.start, cast(raw.bits[BASE], base.array.dtype).clone(), piece)
    return piece


def visit_scope(chains: Sequence[Chain], storage: Storage) -> Scope:
    """Return what one visit must see of a tensor, for all its groups."""
    tensor, scopes = storage.tensor, list[Scope]()
    for group in storage.groups:
        if group.method is not None:
            chain = chains[group.method]
            scopes += [chain.scope_of(tensor.name, tensor.shape), writer_of(group).scope(chain, storage, group)]
    return widest(scopes)
