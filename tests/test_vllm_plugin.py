"""The plugin for vLLM, on a stand-in for vLLM's loaders; `python -m tests.vllm_interface` compares it with a wheel."""

import pytest

from flexmerge_cli import make_plan, merge
from flexmerge_cli.errors import UsageError
from flexmerge_cli.vllm_plugin import task_view

from .families import ODD, write_family
from .vllm_interface import check_load, entry_points, stand_in


def test_the_plugin_gives_vllm_every_tensor_of_a_task_as_it_lies_and_decoded(tmp_path):
    folders = write_family(tmp_path, ODD["two_tasks"]())
    plan = make_plan(folders.base, folders.tasks, statistics="gram")
    with stand_in() as loaders:
        for plugin in entry_points() * 2:  # vLLM may load a plugin more than once in one process
            plugin.load()()
        for method in (None, "low_bit:bits=2,centre=base"):
            bundle = tmp_path / str(method)
            merge(plan, bundle, method=method, card=False)
            assert check_load(loaders, bundle) > 0
            for folder in (tmp_path, bundle, bundle / "weights", bundle / "tasks", bundle / "coded"):
                with pytest.raises(UsageError, match="is no task's folder"):
                    task_view(str(folder))
