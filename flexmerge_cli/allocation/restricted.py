"""Restricts a layout to what some of its parts need: what is left to compute."""

from collections.abc import Collection
from dataclasses import replace

from flexmerge_cli.allocation.allocation import Tasks, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup


def restricted(
    layout: BundleLayout, wanted: Collection[Part], groups: Collection[tuple[str, Tasks]] = ()
) -> BundleLayout:
    """Return the layout with only those groups that make a wanted part. It keeps all its files and units.

    groups: (unit, tasks) of further groups under a method that stay.

    What a group stores does not depend on other groups. A group under a method stays in every tensor of its unit, since
    it may measure all of them; for copies, the tasks whose part is wanted stay. Tensors without wanted parts have
    neither groups nor parts. Groups that stay may also make parts that are not wanted.
    """
    wanted = set(wanted)
    chosen: dict[str, set[Tasks]] = {}
    for unit in layout.allocation.units:
        stay = {tasks for name, tasks in groups if name == unit.name}
        chosen |= dict.fromkeys(unit.tensors, stay | _methods_of(layout, unit, wanted))
    storages = {name: _narrowed(storage, chosen.get(name, set()), wanted) for name, storage in layout.storages.items()}
    return replace(layout, storages=storages)


def _methods_of(layout: BundleLayout, unit: Unit, wanted: set[Part]) -> set[Tasks]:
    """Return the tasks of those groups under a method that make a wanted part of a unit."""
    of_unit = {part.task for part in wanted if part.of_unit and part.tensor == unit.name}
    groups = [group for name in unit.tensors for group in layout.storages[name].groups if group.method is not None]
    return {
        group.tasks
        for group in groups
        if not of_unit.isdisjoint(group.tasks)
        or any(part in wanted and part.array.role != "base" and makes(group, part) for part in group.parts)
    }


def _narrowed(storage: Storage, chosen: set[Tasks], wanted: set[Part]) -> Storage:
    groups = []
    for group in storage.groups:
        if group.method is not None:
            groups += [group] if group.tasks in chosen else []
            continue
        parts = tuple(part for part in group.parts if part in wanted and makes(group, part))
        readers = {task for part in parts for task in part.readers}
        if parts:
            groups.append(replace(group, tasks=tuple(task for task in group.tasks if task in readers), parts=parts))
    needed = {part for group in groups for part in group.parts} | wanted
    return replace(storage, groups=tuple(groups), parts=tuple(part for part in storage.parts if part in needed))


def makes(group: StoredGroup, part: Part) -> bool:
    """Return whether a part of the group is written with it: a copy is written with the group of its first reader."""
    return not group.has_copy(part) or part.readers[0] in group.tasks
