"""Checks that a plan is consistent in itself, beyond the types of its records."""

from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES
from flexmerge_cli.checkpoint.rows import are_runs, num_rows
from flexmerge_cli.checkpoint.safetensors import is_shape
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import MAX_TASKS, ROWS_SUFFIX, are_task_names
from flexmerge_cli.family.split import check_splits
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.record import Shape

if TYPE_CHECKING:
    from flexmerge_cli.formats.plan_file import Plan


def check_plan(plan: "Plan") -> None:
    """Raise ValueError unless the plan is consistent. A sound sha256 does not make it so."""
    count = len(plan.tasks)
    names = [tensor.name for tensor in plan.stored]
    in_order = list(plan.task_names) == sorted(set(plan.task_names)) and list(plan.kept_names) == sorted(
        set(plan.kept_names)
    )
    if len(set(names)) < len(names) or not in_order or not plan.readers:
        raise ValueError("tensors or tasks are not unique, or out of order")
    if len(plan.reader_names) > MAX_TASKS:
        raise ValueError(f"{len(plan.reader_names):,} tasks, more than the {MAX_TASKS:,} that can be compared")
    if not are_task_names(plan.reader_names):
        raise ValueError("a task has a name that cannot be a task's")  # the name becomes a folder
    in_blocks = [name for block in plan.blocks for name in block.tensors]
    mergeable = {tensor.name for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE}
    if sorted(in_blocks) != sorted(mergeable) or len({block.name for block in plan.blocks}) < len(plan.blocks):
        raise ValueError("blocks do not hold every mergeable tensor exactly once")
    if not all(block.tensors for block in plan.blocks):
        raise ValueError("a block is empty")
    for tensor in plan.stored:
        _check_lengths(tensor, count)
    _check_vocabularies(plan, count)
    check_splits(
        plan.splits,
        {t.name: {task: (t.dtype_of(task), t.shape_of(task)) for task in t.present} for t in plan.stored},
    )
    if any(t.class_ not in (TensorClass.MERGEABLE, TensorClass.CONSTANT) for t in plan.stored if plan.split(t.name)):
        raise ValueError("a part of a split tensor neither merges nor is constant")
    for tensor in plan.stored:
        _check_tensor(plan, tensor, count)
        if plan.adapters and tensor.base_dtype is not None and tensor.base_digest is None:
            raise ValueError(f"tensor `{tensor.name}` lacks the digest of the base's tensor, which adapters need")
        taken = plan.settings.statistics == "all" and tensor.class_ is TensorClass.MERGEABLE
        if (tensor.coding is not None) != taken:
            raise ValueError(f"tensor `{tensor.name}` has coding errors although the plan has none, or lacks them")
        try:
            _ = tensor.coding_error
        except (KeyError, ValueError):
            raise ValueError(f"the coding errors of tensor `{tensor.name}` are not sound") from None
    for task, record in enumerate(plan.tasks):
        own = [
            record.names.get(tensor.name, tensor.name) for tensor in plan.tensors if tensor.digests[task] is not None
        ]
        if len(set(own)) < len(own):
            raise ValueError(f"two tensors of task `{record.name}` have one name")
    in_base = {tensor.name: tensor.base_form for tensor in plan.tensors if tensor.base_form is not None}
    for adapter in plan.adapters:
        adapter.check(in_base)
    groups: dict[str, set[tuple[int, ...]]] = {block.name: {(task,) for task in range(count)} for block in plan.blocks}
    for merge in plan.order:
        block = groups.get(merge.block)
        if block is None or not {merge.left, merge.right} <= block or merge.left == merge.right:
            raise ValueError(f"a merge of block `{merge.block}` does not follow from those before it")
        block -= {merge.left, merge.right}
        block.add(tuple(sorted(merge.left + merge.right)))
    unmerged = next((name for name, left in groups.items() if len(left) > 1), None)
    if unmerged is not None:
        raise ValueError(f"the order does not merge all tasks of block `{unmerged}`")


def _check_vocabularies(plan: "Plan", count: int) -> None:
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    names = [name for vocabulary in plan.vocabularies for name in vocabulary.tensors]
    if len(set(names)) < len(names) or not set(names) <= set(by_name):
        raise ValueError("vocabularies hold unknown tensors, or one tensor twice")
    expected: set[tuple[str, int, Shape]] = set()
    for vocabulary in plan.vocabularies:
        for rows in (vocabulary.base, *vocabulary.tasks):
            if not are_runs(rows.common, rows.rows) or len(vocabulary.tasks) != count:
                raise ValueError("the rows of a vocabulary are not sound")
        for tensor in map(by_name.__getitem__, vocabulary.tensors):
            shape = tensor.shape
            if not shape or tensor.shapes or {num_rows(r.common) for r in vocabulary.tasks} != {shape[0]}:
                raise ValueError(f"tensor `{tensor.name}` does not have the rows of its vocabulary")
            if tensor.class_ is TensorClass.MERGEABLE and num_rows(vocabulary.base.common) != shape[0]:
                raise ValueError(f"tensor `{tensor.name}` does not have the base's rows of its vocabulary")
            if tensor.class_ is not TensorClass.TIED:
                more = {task: rows.rows - shape[0] for task, rows in enumerate(vocabulary.tasks)}
                expected |= {(f"{tensor.name}{ROWS_SUFFIX}", k, (n, *shape[1:])) for k, n in more.items() if n}
    found = {(tensor.name, task, tensor.shape_of(task)) for tensor in plan.rows for task in tensor.present}
    if found != expected or any(t.class_ in (TensorClass.TIED, TensorClass.MERGEABLE) for t in plan.rows):
        raise ValueError("the rows of vocabularies are not those that are stored")


def _check_lengths(tensor: PlanTensor, count: int) -> None:
    lists: list[tuple[object, ...]] = [tensor.digests, tensor.same, tensor.is_base]
    lists += [value for value in (tensor.dtypes, tensor.shapes, tensor.gram, tensor.agreement) if value is not None]
    rows = [row for matrix in (tensor.gram, tensor.agreement) if matrix is not None for row in matrix]
    if any(len(value) != count for value in [*lists, *rows]):
        raise ValueError(f"tensor `{tensor.name}` does not have one value per task")


def _check_tensor(plan: "Plan", tensor: PlanTensor, count: int) -> None:
    for matrix in (tensor.gram, tensor.agreement):
        if matrix is not None and (list(zip(*matrix)) != list(matrix) or any(matrix[k][k] < 0 for k in range(count))):
            raise ValueError(f"tensor `{tensor.name}` has a `gram` or `agreement` that is not symmetric")
    dtypes = {tensor.dtype, *(tensor.dtypes or ()), tensor.base_dtype} - {None}
    shapes = [tensor.shape, *(shape for shape in tensor.shapes or () if shape is not None)]
    if not dtypes <= set(ITEM_BYTES) or not all(map(is_shape, shapes)):
        raise ValueError(f"tensor `{tensor.name}` has an unknown dtype, or too many axes or elements")
    for task in tensor.present:
        first = tensor.same[task]
        if (
            first > task
            or tensor.same[first] != first
            or (tensor.digests[first], tensor.dtype_of(first), tensor.shape_of(first))
            != (tensor.digests[task], tensor.dtype_of(task), tensor.shape_of(task))
        ):
            raise ValueError(f"tensor `{tensor.name}` has a wrong `same`")
    if tensor.class_ is TensorClass.TIED and plan.vocabulary(tensor.name) is not plan.vocabulary(tensor.reason):
        raise ValueError(f"tensor `{tensor.name}` has other rows than what it is tied to")
    if (tensor.class_ is TensorClass.BASE_ONLY) == bool(tensor.present):
        raise ValueError(f"tensor `{tensor.name}` is in no task, or is not `base-only`")
    if tensor.class_ is TensorClass.MERGEABLE and (
        tensor.gram is None
        or tensor.shapes
        or tensor.base_dtype is None
        or not dtypes <= set(FLOATING)
        or None in tensor.digests
    ):
        raise ValueError(f"tensor `{tensor.name}` cannot be mergeable")
    if tensor.class_ is TensorClass.TIED and not _is_tied(plan, tensor):
        raise ValueError(f"tensor `{tensor.name}` is not tied to a tensor of its form")


def _is_tied(plan: "Plan", tensor: PlanTensor) -> bool:
    target = plan.find(tensor.reason)
    return (
        target is not None
        and target.class_ is not TensorClass.TIED
        and set(tensor.present) <= set(target.present)
        and all(
            (target.dtype_of(task), target.shape_of(task)) == (tensor.dtype_of(task), tensor.shape_of(task))
            for task in tensor.present
        )
    )
