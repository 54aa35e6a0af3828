"""Provides torch to modules that are also imported when nothing is computed, to declare options or to compute sizes.

`from flexmerge_cli.later import Tensor, torch` imports nothing: torch is imported when one of its attributes is first
used. So a method's arguments can be in one file with its arithmetic, while `methods`, dry runs and errors still start
at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Torch:
        """Imports torch when one of its attributes is first used."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # The next use finds it without a call.
            return value

    torch = _Torch()

    class _TensorType(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """Stands for torch.Tensor in annotations."""
