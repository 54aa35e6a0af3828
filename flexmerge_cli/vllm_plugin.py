"""Loads a task of a bundle into vLLM: `vllm serve bundle/tasks/NAME --load-format flexmerge`.

vLLM imports this module, as the entry point `vllm.general_plugins`, and nothing else does. A view gives the tensors one
after another, decoded where they must be; vLLM's own loader puts them into its model and checks that none is missing.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from flexmerge_cli.bundle.manifest_file import is_bundle
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.errors import UsageError

LOAD_FORMAT = "flexmerge"


def register() -> None:
    """Add the load format to vLLM; may be called several times."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class TaskLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not installed where types are checked
        """Gives vLLM the tensors of a view, where its own loader would read files."""

        def download_model(self, model_config: Any) -> None:
            task_view(model_config.model)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
            self.counter_before_loading_weights = time.perf_counter()
            yield from task_view(model_config.model).items()

    register_model_loader(LOAD_FORMAT)(TaskLoader)


def task_view(model: str) -> View:
    """Return the view of the task whose folder of a bundle this is.

    Raises UsageError for any other folder, or a task with mixtures of experts, and DataError or IntegrityError for a
    bundle that is not sound.
    """
    folder = Path(model).resolve()
    for place in (folder, folder.parent):  # older bundles have the config in coded/NAME/files
        root = place.parent.parent
        if is_bundle(root):
            bundle = Bundle.open(root, verify="xxh3")
            for task in bundle.tasks:
                if root / bundle.manifest.side_folder(task) == place:
                    bundle.require_tensors(task)
                    return View(bundle, task)
    raise UsageError(
        f"{model} is no task's folder in a bundle, which --load-format {LOAD_FORMAT} loads",
        hint="vllm serve BUNDLE/tasks/NAME, or BUNDLE/coded/NAME where a task must be decoded",
    )
