"""eval.yaml, `flexmerge.eval-spec/1`: what to score each task on; paths relative to the file. Nothing of it is run.

version  1
tasks    {name: {kind, data, checkpoint, limit}}
kind     image-classification
data     .npz with `images` [n, channels, height, width] and `labels` [n], int
checkpoint  the fine-tuned model, scored beside the bundle's; MAY be left out
limit    first n examples only
batch_size  examples at a time
dtype    float32, bfloat16 or float16: what models compute in; by default what they are stored in
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from flexmerge_cli.allocation.plan_file import Record
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.yaml_file import read_yaml


class TaskSpec(Record):
    kind: Literal["image-classification"]
    data: str
    checkpoint: str | None = None
    limit: int | None = Field(default=None, ge=1)


class EvalSpec(Record):
    """A checked spec."""

    version: Literal[1]
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    batch_size: int = Field(default=256, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    folder: Path = Field(default_factory=Path, exclude=True)

    def data_path(self, task: str) -> Path:
        return self.folder / self.tasks[task].data

    def checkpoint_path(self, task: str) -> Path | None:
        found = self.tasks[task].checkpoint
        return None if found is None else self.folder / found


def read_spec(path: Path, tasks: tuple[str, ...]) -> EvalSpec:
    """Check it before any weight is read: its form, that its tasks are the bundle's, that its files are there."""
    spec = read_yaml(path, EvalSpec, "spec").model_copy(update={"folder": path.absolute().parent})
    unknown = [name for name in spec.tasks if name not in tasks]
    if unknown:
        raise UsageError(
            f"{path} scores tasks that the bundle has not: {', '.join(unknown)}", hint=f"it has: {', '.join(tasks)}"
        )
    for name, task in spec.tasks.items():
        if not spec.data_path(name).is_file():
            raise SourceError(f"{path}, task `{name}`: no data at {spec.data_path(name)}", hint="check `data`")
        if task.checkpoint is not None and not (spec.folder / task.checkpoint).is_dir():
            raise SourceError(
                f"{path}, task `{name}`: no checkpoint at {spec.folder / task.checkpoint}", hint="check it"
            )
    return spec
