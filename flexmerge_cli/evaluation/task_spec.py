"""What every task of a spec says, whatever its kind. The kinds (kinds/) add their own keys; spec.py reads the file."""

from typing import Literal

from pydantic import Field

from flexmerge_cli.record import Record

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["jsonl", "csv", "parquet", "npz", "safetensors", "imagefolder", "datasets"]


class DataSpec(Record):
    """Where a task's examples are, where a path alone does not say it."""

    path: str
    """Relative to the spec; `hf://org/name[@revision][:config]` for the Hub."""
    format: Format | None = None
    """By default what the path's suffix says; a folder is `datasets` if one was saved there, else `imagefolder`."""
    split: str | None = None
    """Of `datasets`; told in reports for all formats."""


class TaskSpec(Record):
    """One task."""

    kind: str
    data: str | DataSpec | None = None
    checkpoint: str | None = None
    """The fine-tuned model, scored beside the bundle's."""
    metric: str | tuple[str, ...] | None = None
    """The first is what gates, choices and normalised scores go by."""
    limit: int | None = Field(default=None, ge=1)
    """Examples; the first ones, or with `seed` drawn ones."""
    batch_size: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    seed: int | None = Field(default=None, ge=0)
    device: str | None = None

    @property
    def data_spec(self) -> DataSpec | None:
        return DataSpec(path=self.data) if isinstance(self.data, str) else self.data

    @property
    def metrics(self) -> tuple[str, ...]:
        """Asked for, in that order; empty for the kind's own."""
        return () if self.metric is None else (self.metric,) if isinstance(self.metric, str) else self.metric
