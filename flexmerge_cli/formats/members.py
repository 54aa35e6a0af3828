"""Defines the members of a family as a plan records them: each kind answers the same questions about itself. Pure.

Layout, manifest, prices and checks ask these questions of every member alike, and know no kind.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.libraries import LibraryName
from flexmerge_cli.checkpoint.peft import CONFIG_NAME, AdapterKind
from flexmerge_cli.family.adapters import Adapters, KeptAdapter
from flexmerge_cli.formats.adapter_changes import ChangeRecord
from flexmerge_cli.formats.plan_records import License, Parts, PlanTensor, SideFile
from flexmerge_cli.record import NO_DIGEST, Count, Digest, Named, Record, Shape


class GivenTensor(NamedTuple):
    """The form in which a member has a tensor."""

    dtype: str
    shape: Shape
    digest: str | None
    """The digest of the tensor; None if it depends on what is merged."""


class Member(Record):
    """A task that reads a bundle."""

    name: str
    source: str
    fingerprint: Digest
    """The digest of every tensor's digest; for a kept adapter, of its files and of the base."""
    bytes: Count
    """The bytes of the model's tensors; for a kept adapter, of the model that it makes."""
    files: Named[SideFile]
    names: Named[str]
    """Aligned name -> own name, where they differ."""
    parts: Parts = Field(default_factory=dict)
    """For each subfolder with weights of its own, the stem of their file names; omitted if there is none."""
    license: License | None = None
    """The licence that the source's card names; omitted if unknown."""

    @model_serializer(mode="wrap")
    def _without_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        usual: dict[str, Any] = {"parts": {}, "library": "transformers", "license": None}
        return {name: value for name, value in fields.items() if name not in usual or value != usual[name]}

    @property
    def adapter_kind(self) -> AdapterKind | None:
        """The kind of adapter that its source is; None for a whole model."""
        return None

    @property
    def source_bytes(self) -> int:
        """The bytes of the tensors in its source."""
        return self.bytes

    def needed_files(self, adapters: Adapters) -> tuple[list[str], list[str]]:
        """Return the files and subfolders that are needed of its source, and of the base, beside the weights. adapters:
        the plan's setting."""
        folders = [f"{part}/" for part in self.parts]
        return [*self.files, *folders], folders

    @property
    def own_bytes(self) -> int:
        """The bytes of the tensors that are stored in a weight file beside the bundle's."""
        return 0

    @property
    def own_file_bytes(self) -> int:
        """The bytes of that file, which is one of `files`."""
        return 0

    @property
    def own_names(self) -> tuple[str, ...]:
        """The aligned names of the tensors that it holds whole in that file, sorted."""
        return ()

    @property
    def own_factors(self) -> tuple[int, int]:
        """The largest rank of the low-rank matrices in that file, and their bytes."""
        return 0, 0

    def not_low_rank(self) -> Iterator[tuple[str, str]]:
        """Yield each tensor that differs from the base's by more than matrices in that file, and why."""
        yield from ()

    @abstractmethod
    def given(self, name: str, tensor: PlanTensor | None, place: int) -> GivenTensor | None:
        """Return the form in which it has a tensor, or None. tensor: the plan's record, if there is one. place: its own
        number."""

    def needs_base(self, name: str) -> bool:
        """Return whether it reads the base's own tensor of this name, if there is one."""
        return False

    def computes(self, name: str) -> bool:
        """Return whether its tensor is computed from the base's when it is loaded."""
        return False

    def entry(self, adapters: Adapters) -> dict[str, Any]:
        """Return what the manifest records about it beyond what it records about every task. adapters: the plan's
        setting."""
        return {}


class LowRankRecord(Record):
    """A fine-tune that is the base plus low-rank matrices. A sketch finds it, so nothing relies on it."""

    rank: Count
    matrices: Count
    """The number of matrices that differ from the base."""
    bytes: Count
    """The bytes of these matrices as they are."""
    residual_bytes: Count
    """The bytes of these matrices as residuals of this rank over the base."""


class PlanTask(Member):
    """A task that merges: a whole model, the model that an adapter makes of the base, or an adapter of a pool."""

    config_base: str | None
    """The model that its config names as its origin."""
    adapter: AdapterKind | None = None
    """The kind of adapter, for a task that was merged into the base as an adapter, or that is in a pool."""
    low_rank: LowRankRecord | None = None
    """Present if a full fine-tune differs from the base by low-rank matrices, like a merged LoRA."""
    library: LibraryName = "transformers"
    """The library that loads the model; omitted if it is transformers, or unknown."""

    @property
    def adapter_kind(self) -> AdapterKind | None:
        return self.adapter

    def needed_files(self, adapters: Adapters) -> tuple[list[str], list[str]]:
        own, of_base = super().needed_files(adapters)
        is_merged = self.adapter is not None and adapters == "merge"  # its model has the files of the base
        return ([CONFIG_NAME], [*of_base, *self.files]) if is_merged else (own, of_base)

    def loaded_by(self, adapters: Adapters) -> LibraryName:
        """Return the library that loads it. adapters: the plan's setting."""
        return "peft" if adapters == "pool" else self.library

    def given(self, name: str, tensor: PlanTensor | None, place: int) -> GivenTensor | None:
        if tensor is None or tensor.digests[place] is None:
            return None
        return GivenTensor(tensor.dtype_of(place), tensor.shape_of(place), None)

    def entry(self, adapters: Adapters) -> dict[str, Any]:
        return {"pooled": self.adapter} if adapters == "pool" else {}


class PlanAdapter(Member):
    """A task that is kept as an adapter of the base: it is in no group."""

    kind: AdapterKind
    """The kind of adapter."""
    tensor_bytes: Count
    """The bytes of its own tensors."""
    weights: str
    """Its weight file, which is one of `files`."""
    changes: Named[ChangeRecord]

    def is_of(self, kept: KeptAdapter) -> bool:
        """Return whether it records this adapter, as far as headers tell."""
        digests = {name: change.digest for name, change in self.changes.items()}
        names = {name: self.names.get(name, name) for name in kept.names}
        return (_changes(kept, digests), kept.names) == (self.changes, names)

    @property
    def adapter_kind(self) -> AdapterKind:
        return self.kind

    @property
    def source_bytes(self) -> int:
        return self.tensor_bytes

    @property
    def own_bytes(self) -> int:
        return self.tensor_bytes

    @property
    def own_file_bytes(self) -> int:
        return self.files[self.weights].bytes

    @property
    def own_names(self) -> tuple[str, ...]:
        """The aligned names of modules_to_save, resized embeddings and biases."""
        return tuple(sorted(name for name, change in self.changes.items() if change.value is not None))

    @property
    def own_factors(self) -> tuple[int, int]:
        pairs = [(change.left, change.right) for change in self.changes.values()]
        factors = [factor for pair in pairs for factor in pair if factor is not None]
        rank = max((left.shape[1] for left, _ in pairs if left is not None), default=0)
        return rank, sum(ITEM_BYTES[factor.dtype] * math.prod(factor.shape) for factor in factors)

    def not_low_rank(self) -> Iterator[tuple[str, str]]:
        for name, change in self.changes.items():
            if change.value is not None:
                yield name, "is saved whole by an adapter"
            elif change.vector is not None:
                yield name, "is multiplied by an adapter"

    def given(self, name: str, tensor: PlanTensor | None, place: int) -> GivenTensor | None:
        change = self.changes.get(name)
        if change is not None and change.value is not None:
            return GivenTensor(change.value.dtype, change.value.shape, change.digest)
        if tensor is None or tensor.base_form is None:
            return None
        return GivenTensor(*tensor.base_form, str(tensor.base_digest if change is None else change.digest))

    def needs_base(self, name: str) -> bool:
        change = self.changes.get(name)
        return change is None or change.value is None

    def computes(self, name: str) -> bool:
        return name in self.changes

    def entry(self, adapters: Adapters) -> dict[str, Any]:
        changes = {name: change.dump() for name, change in self.changes.items()}
        return {"adapter": {"kind": self.kind, "weights": self.weights, "changes": changes}}

    def check(self, in_base: Mapping[str, tuple[str, Shape]]) -> None:
        """Raise ValueError if it is not sound. in_base: name -> dtype and shape of the base's tensors."""
        if self.weights not in self.files:
            raise ValueError(f"adapter `{self.name}` has no weights")
        for name, change in self.changes.items():
            form = in_base.get(name) if change.value is None else (change.value.dtype, change.value.shape)
            if form is None:
                raise ValueError(f"adapter `{self.name}` changes `{name}`, which the base lacks")
            change.check(*form, self.own_file_bytes)
        own = [self.names.get(name, name) for name in {*in_base, *self.changes}]
        if len(set(own)) < len(own):
            raise ValueError(f"two tensors of adapter `{self.name}` have one name")


def kept_record(kept: KeptAdapter, digests: Mapping[str, str], **measured: Any) -> PlanAdapter:
    """Record a kept adapter. digests: of the tensors that it makes, by aligned name; none for a plan from headers.
    measured: the source as the plan writes it, the files and the fingerprint."""
    return PlanAdapter(
        name=kept.name,
        kind=kept.adapter.kind,
        bytes=kept.model.num_bytes,
        tensor_bytes=kept.checkpoint.num_bytes,
        weights=kept.weights.name,
        names={aligned: own for aligned, own in kept.names.items() if aligned != own},
        changes=_changes(kept, digests),
        parts=kept.model.parts,
        license=kept.checkpoint.license,
        **measured,
    )


def _changes(kept: KeptAdapter, digests: Mapping[str, str]) -> dict[str, ChangeRecord]:
    return {
        name: ChangeRecord.of(tensor, kept.weights, digests.get(name, NO_DIGEST))
        for name, tensor in kept.changed().items()
    }
