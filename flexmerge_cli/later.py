"""Provides torch to modules that also declare and price, and that are imported even if nothing is computed.

`from flexmerge_cli.later import Tensor, torch` imports nothing: torch is imported when one of its attributes is first
used. So a method's arguments can stand in one file with its arithmetic, and `methods`, dry runs and errors still start
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
        """Imports torch with the first attribute that is used."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # so that the next use does not come here
            return value

    torch = _Torch()

    class _TensorType(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """Stands for torch.Tensor in annotations."""
