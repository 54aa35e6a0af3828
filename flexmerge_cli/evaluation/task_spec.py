"""Defines the keys that tasks of every kind have in a spec. The kinds (kinds/) add theirs; spec.py reads the file."""

from typing import Literal

from pydantic import Field

from flexmerge_cli.record import Record

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["jsonl", "csv", "parquet", "npz", "safetensors", "imagefolder", "datasets"]


class DataSpec(Record):
    """Where a task's examples are, if a path alone does not determine it."""

    path: str
    """The path, relative to the spec; `hf://org/name[@revision][:config]` for the Hub."""
    format: Format | None = None
    """Determined by the path's suffix by default; a folder is `datasets` if one was saved there, else `imagefolder`."""
    split: str | None = None
    """The split, required by `datasets`; reports show it for all formats."""


class TaskSpec(Record):
    """One task."""

    kind: str
    data: str | DataSpec | None = None
    checkpoint: str | None = None
    """The fine-tuned model, scored beside the bundle's."""
    metric: str | tuple[str, ...] | None = None
    """The metrics. Gates, choices and normalised scores use the first."""
    limit: int | None = Field(default=None, ge=1)
    """The number of examples: the first ones or, with `seed`, drawn at random."""
    batch_size: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    seed: int | None = Field(default=None, ge=0)
    device: str | None = None
    head: str | None = None
    """Only under `unseen`: the task whose models are scored on these data."""
    gate: bool | None = None
    """Only under `unseen`: whether a gate counts it."""

    @property
    def data_spec(self) -> DataSpec | None:
        return DataSpec(path=self.data) if isinstance(self.data, str) else self.data

    @property
    def metrics(self) -> tuple[str, ...]:
        """The requested metrics, in order; empty for the kind's default."""
        return () if self.metric is None else (self.metric,) if isinstance(self.metric, str) else self.metric
