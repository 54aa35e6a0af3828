"""Defines the schema of manifest.json, `flexmerge.bundle/2`, which manifest_bytes.py writes: canonical JSON, sorted
keys, UTF-8.

id        sha256 of these bytes with its own 64 digits set to 0
base      fingerprint of the base
build     digest of the versions of torch and flexmerge, and, where linear algebra made a value, of its processor:
          with equal ones, equal sources give equal parts. It is 0 where all parts are copies, which depend on none
files     {path: {bytes, sha256, xxh3, tasks}} of every file but this one; a path MUST stay inside the bundle. `xxh3` is
          its digest in the manner of tensors' digests, which finds damage at the speed of the disk; bundles from
          before it was recorded lack it
tasks     {name: {…, names, files, stem}}: `names` maps aligned to own names where they differ; `files` lists the route
          and the task's other files: those under tasks/NAME or, if it must be decoded, coded/NAME/README.md, which says
          so, and those under coded/NAME, with `.aside` after their names. With a `stem`, tasks/NAME also holds links to
          the weight files, which are in no list: their names follow from the stem and the route. `flexmerge.bundle/1`
          has neither: all tasks are under tasks/NAME, and tasks that need no decoding have an index that points to
          ../../weights
units     which tasks share what, how (kind), and each task's distance there; if a group may lose something, `errors`
          are Σ (θ̂ - θ)² of its tasks, in their order, from which distances are computed
tensors   every tensor of every task: class, dtype, shape (`dtypes`, `shapes` per task where they differ) and, for each
          task that has it, the digest of what a reader gets; `of` is the target of a tied one
vocabularies, rows   present if the models do not all have the same rows of some tensors: these are entered with the
          rows that all have; `rows` enters `<tensor>@rows`, the other rows of each task. `common` are runs (first row,
          count) of the task's own tensor, which has `rows` rows: the places of the common rows, in their order; its
          other rows are its `@rows`, ascending. An omitted task has exactly the common rows, in order. `base` gives
          their places in the base
splits    present if tensors are split (family/split.py): `tensors` enters their parts, `<tensor>@part0`, …, which a
          reader joins along `dim`
A task with `adapter` is an adapter of the base and is in no group. Its files under tasks/NAME are the adapter's folder,
bit by bit; `changes` says where the data for each changed tensor lie in its weight file (adapter_changes.py). All other
tensors are the base's own: the plain name on its route or, if other tasks decode with it, `<tensor>@base`. base/ is the
base as a checkpoint: its config and tokenizer, and with `base_stem` links to the weight files on the routes of all kept
adapters. If parts have other names than the base's tensors, base/README.md says that base/ is no checkpoint, and its
config and tokenizer are there with `.aside` after their names.
request   what was asked of `merge`, options by name (recorded.py), with spaces as `padding`; and the `command` that
          asks the same of the plan, here called plan.json, and gives the same id or, if there is a `gate`, the same
          weights without it. Bundles from before it was recorded lack it
gate      present if the bundle had to keep a part of the fine-tuned scores to be published: `max_drop` and
          `max_mean_drop` as they were asked for (each may be absent), sha256 of the spec, the digest of each scored
          task's examples (null if a harness has them), the tasks that the spec left out by name, and the versions of
          the libraries that computed the scores. `data` and `not_scored` together are all tasks. It is written before
          the bundle is scored, and a bundle that does not pass is not published: so a published bundle that has it has
          passed, on the machine that made it. The scores are not in it
calibration  present if a method read a calibration (calibration.py): the sha256 of its index
router    a classifier of tasks (bundle/router.py), whose arrays are in router/router.safetensors: its `kind`, the task
          whose backbone gives its `features`, the `tasks` that it tells apart, in the order of its outputs, the
          `temperature` of these, its `accuracy` on examples that it was not fitted on, and for each task how many
          `examples` it was fitted on and the digest of their `data`. Without a router neither is there
surgery   corrections of what the last layer of tasks' models gets (bundle/surgery.py), whose arrays are in
          surgery/surgery.safetensors: their `rank`, and for each task the own name of the weight of that layer in
          `layers`, how many `examples` it was fitted on and the digest of their `data`
wemoe     routers of mixtures of experts (bundle/wemoe.py), whose arrays are in wemoe/wemoe.safetensors: how many
          `layers` each has, for each unit the aligned name of the weight of the layer that runs `first`, and for each
          task how many `examples` they were fitted on and the digest of their `data`
A part's name is the tensor's plain name (the first reader's own name) if it is dense, otherwise
`<tensor>@<role>[.<task>]`. A tensor whose plain name is on a task's route is dense; otherwise its unit's group says how
to decode it: masked is base + gamma·mask·unified, where gamma is `<unit>@gamma.<task>`, or 1 if that is absent;
superposed is base ± unified, with signs that are drawn with the `seed` of the method (`drawn` in residuals/mask.py).
`bits` of a group gives the bits of each task, if they differ; 0 reads the centre alone, and a task that is stored
exactly has its plain name and is omitted. Such a group is coded like `low_bit:scales=bfloat16,clip=search` of its
centre, whatever `bits` of the method says, with every tensor as rows of its first axis after dropping leading axes of
1. Tasks with equal bits may share one part there, `<tensor>@<role>.<first of them>`: the only such part on the route is
the task's own.
Measured numbers have 12 characters, so that the size is known before the run.
The manifest is written last, so it is the commit point: a folder without it is no bundle. Readers MUST refuse unknown
keys.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from flexmerge_cli.checkpoint.libraries import STEMS, index_name
from flexmerge_cli.family.split import Split
from flexmerge_cli.formats.folders import (
    BASE_FOLDER,
    CODED_README,
    SURGERY_FILE,
    WEIGHTS,
    WEMOE_FILE,
    linked_names,
    side_files,
    side_folder,
)
from flexmerge_cli.formats.manifest_check import FIRST, check_manifest
from flexmerge_cli.formats.manifest_records import (
    AllocationEntry,
    FileEntry,
    GateEntry,
    MethodEntry,
    RouterEntry,
    RowsEntry,
    Stem,
    SurgeryEntry,
    TaskEntry,
    TensorEntry,
    UnitEntry,
    VocabularyEntry,
    WemoeEntry,
)
from flexmerge_cli.formats.recorded import Request
from flexmerge_cli.record import Count, Digest, Items, Named, Record
from flexmerge_cli.stored.coded import MIXTURE

FORMAT = "flexmerge.bundle/2"
FORMATS = (FIRST, FORMAT)


class Manifest(Record):
    format: Literal["flexmerge.bundle/1", "flexmerge.bundle/2"]
    id: str = Field(pattern=r"^[0-9a-f]{64}$")
    generator: str
    build: Digest | None = None
    plan: str
    base: Digest | None = None
    allocation: AllocationEntry
    one_model_bytes: Count
    stored_bytes: Count
    methods: Items[MethodEntry]
    tasks: Named[TaskEntry]
    files: Named[FileEntry]
    units: Items[UnitEntry]
    tensors: Items[TensorEntry]
    rows: Items[TensorEntry] = ()
    vocabularies: Items[VocabularyEntry] = ()
    splits: Items[Split] = ()
    gate: GateEntry | None = None
    router: RouterEntry | None = None
    surgery: SurgeryEntry | None = None
    wemoe: WemoeEntry | None = None
    request: Request | None = None
    calibration: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    base_stem: Stem | None = None
    """Present if the folder of the base of kept adapters holds links to its weight files, named like those of a
    task."""

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """Everything that is stored by itself: tensors, and rows of vocabularies."""
        return self.tensors + self.rows

    def aligned(self, task: str) -> Mapping[str, str]:
        """Map own names to aligned names of the tensors of a task's model, in the order of the base's files.

        A split tensor appears as the whole.
        """
        return self._aligned[task]

    @cached_property
    def _aligned(self) -> dict[str, dict[str, str]]:
        """The result of `aligned` for every task, from one pass over the tensors."""
        wholes = {
            part: (split.tensor, f"@part{place}") for split in self.splits for place, part in enumerate(split.names)
        }
        found: dict[str, dict[str, str]] = {task: {} for task in self.tasks}
        for tensor in self.tensors:
            whole, suffix = wholes.get(tensor.name, (tensor.name, ""))
            for task in tensor.digests:
                own = self.tasks[task].names.get(tensor.name, tensor.name)
                found[task][own.removesuffix(suffix)] = whole
        return found

    def rows_of(self, tensor: str, task: str | None) -> RowsEntry | None:
        """Return where a task, or the base (None), has the rows of a tensor that all models have; None if it has these
        rows alone, in their order."""
        vocabulary = self._vocabulary_of.get(tensor)
        if vocabulary is None:
            return None
        return vocabulary.base if task is None else vocabulary.tasks.get(task)

    @cached_property
    def _vocabulary_of(self) -> dict[str, VocabularyEntry]:
        return {name: vocabulary for vocabulary in self.vocabularies for name in vocabulary.tensors}

    def has_experts(self, task: str) -> bool:
        """Return whether layers of the task's model may be mixtures of experts, which no tensor holds."""
        return any(group.kind == MIXTURE.word and task in group.tasks for unit in self.units for group in unit.groups)

    def added_files(self, task: str) -> tuple[str, ...]:
        """Return the paths of the files that were added to the bundle, and that change what the task's model
        computes."""
        surgery = self.surgery is not None and task in self.surgery.layers
        wemoe = self.wemoe is not None and self.has_experts(task)
        return (SURGERY_FILE,) * surgery + (WEMOE_FILE,) * wemoe

    def own_weights(self, task: str) -> str | None:
        """Return the path of the weight file that is a kept task's own; None for other tasks."""
        own = self.tasks[task].own_weights
        return None if own is None else f"tasks/{task}/{own}"

    def weight_files(self, task: str) -> list[str]:
        """Return the paths of the files that hold a task's tensors."""
        own = self.own_weights(task)
        return [path for path in self.tasks[task].files if path.startswith(WEIGHTS) or path == own]

    def side_folder(self, task: str) -> str:
        """Return where a task's config, tokenizer and other side files lie."""
        return side_folder(task, coded=self.is_coded(task))

    def is_coded(self, task: str) -> bool:
        """Return whether a task must be decoded before a loader can read it."""
        return f"coded/{task}/{CODED_README}" in self.files

    def side_files(self, task: str) -> dict[str, str]:
        """Map what each side file of a task is called in its checkpoint to its path; an index of weights is one."""
        return side_files(self.side_folder(task), self.tasks[task].files, coded=self.is_coded(task))

    def lies_in_place(self, task: str) -> bool:
        """Return whether a folder holds the weights of the task's model as its library reads them, or an index to
        them."""
        indices = {f"tasks/{task}/{index_name(stem)}" for stem in STEMS}
        return self.tasks[task].stem is not None or not indices.isdisjoint(self.tasks[task].files)

    def links(self, task: str) -> dict[str, str]:
        """Map the path of each link in a task's folder to the weight file to which it leads."""
        entry = self.tasks[task]
        return linked_names(f"tasks/{task}", entry.stem, [path for path in entry.files if path.startswith(WEIGHTS)])

    @property
    def kept(self) -> list[str]:
        """The tasks that are kept as they were given."""
        return [name for name, task in self.tasks.items() if task.is_kept]

    @property
    def base_links(self) -> dict[str, str]:
        """Maps the path of each link in the folder of the kept adapters' base to the weight file to which it leads."""
        route = {path for task in self.kept for path in self.tasks[task].files if path.startswith(WEIGHTS)}
        return linked_names(BASE_FOLDER, self.base_stem, route)

    @property
    def is_base_coded(self) -> bool:
        """Whether the base of the kept adapters must be decoded before a loader can read it."""
        return f"{BASE_FOLDER}/{CODED_README}" in self.files

    @property
    def base_files(self) -> dict[str, str]:
        """Maps what each side file of the kept adapters' base is called in its checkpoint to its path."""
        return side_files(BASE_FOLDER, self.files, coded=self.is_base_coded)

    @property
    def all_links(self) -> dict[str, str]:
        """The links of all tasks, and of the base."""
        return self.base_links | {link: path for task in self.tasks for link, path in self.links(task).items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        check_manifest(self)
        return self
