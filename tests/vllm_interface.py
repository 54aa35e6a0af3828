"""vLLM's interface to loaders: a stand-in for tests, and that of a wheel (`python -m tests.vllm_interface FOLDER`).

FOLDER is where a wheel of vLLM was unpacked. Its own files that load weights are imported, and stubs stand for the rest
of vLLM, which needs a GPU. The command compares the stand-in with them, loads tasks through them, and has vLLM's own
reader of adapters read an export of `--as-lora`.
"""

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flexmerge_cli import open_bundle

from .program import ROOT

GROUP = "vllm.general_plugins"
LOADERS = "vllm.model_executor.model_loader"
OWN = {
    "vllm.plugins": (),
    LOADERS: ("base_loader", "default_loader", "weight_utils"),
    "vllm.lora": ("lora_model", "lora_weights", "peft_helper", "utils"),
}
"""Modules, and those below them, that are vLLM's own."""


class Model(nn.Module):
    """A model that loads weights as those of vLLM do: it takes pairs, and returns the names that it took."""

    def __init__(self, forms: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.names = {}
        for number, (name, tensor) in enumerate(forms):
            self.register_parameter(f"p{number}", nn.Parameter(torch.full_like(tensor, 7), requires_grad=False))
            self.names[name] = f"p{number}"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            getattr(self, self.names[name]).copy_(tensor)
            loaded.add(self.names[name])
        return loaded


def model_config(folder: Path) -> Any:
    """What loaders ask of vLLM's ModelConfig."""
    asked = {"revision": None, "quantization": None, "is_moe": False, "multimodal_config": None}
    return SimpleNamespace(model=str(folder), **asked)


def load_config(load_format: str) -> Any:
    """What loaders ask of vLLM's LoadConfig."""
    return SimpleNamespace(load_format=load_format, model_loader_extra_config={}, safetensors_load_strategy=None)


def entry_points() -> list[importlib.metadata.EntryPoint]:
    """The plugins that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"][GROUP]
    return [importlib.metadata.EntryPoint(name, value, GROUP) for name, value in named.items()]


# The stand-in.


class DefaultModelLoader:
    """What the plugin takes from vLLM's loader: it gives the model all weights, and checks that none is missing."""

    counter_before_loading_weights: float = 0.0

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    def download_model(self, model_config: Any) -> None:
        raise NotImplementedError

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        loaded = model.load_weights(self.get_all_weights(model_config, model))
        if missing := {name for name, _ in model.named_parameters()} - loaded:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")


_REGISTERED: dict[str, type] = {}


def register_model_loader(load_format: str) -> Any:
    def wrapper(model_loader_cls: type) -> type:
        assert issubclass(model_loader_cls, DefaultModelLoader)
        _REGISTERED[load_format] = model_loader_cls
        return model_loader_cls

    return wrapper


def get_model_loader(load_config: Any) -> Any:
    return _REGISTERED[load_config.load_format](load_config)


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    """Have `import vllm` find the stand-in, and yield the module of loaders."""
    loaders, default = ModuleType(LOADERS), ModuleType(f"{LOADERS}.default_loader")
    for own in (register_model_loader, get_model_loader, DefaultModelLoader):
        setattr(loaders, own.__name__, own)
    default.DefaultModelLoader = DefaultModelLoader  # type: ignore[attr-defined]
    parents = {name: ModuleType(name) for name in ("vllm", "vllm.model_executor")}
    with _modules({**parents, LOADERS: loaders, default.__name__: default}):
        yield loaders


@contextmanager
def _modules(found: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "vllm"}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(before)


# The wheel.


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds vLLM's own loaders in a folder, and stubs for the rest of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] != "vllm":
            return None
        if name in OWN or name.rpartition(".")[2] in OWN.get(name.rpartition(".")[0], ()):
            place = self.folder / name.replace(".", "/")
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            places = [str(place)] if place.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = _Stub(spec.name)
        if spec.name == "vllm.tracing":
            module.instrument = lambda **_given: lambda function: function  # type: ignore[attr-defined]
        if spec.name == "vllm.utils.torch_utils":
            module.PIN_MEMORY = False  # type: ignore[attr-defined]
        if spec.name == "vllm.envs":
            module.VLLM_USE_MODELSCOPE = module.VLLM_PLUGINS = None  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


@contextmanager
def of_wheel(folder: Path) -> Iterator[ModuleType]:
    """Have `import vllm` find the loaders of an unpacked wheel, and yield the module of loaders."""
    finder = _Stubs(folder)
    sys.meta_path.insert(0, finder)
    try:
        with _modules({}):
            yield importlib.import_module(LOADERS)
    finally:
        sys.meta_path.remove(finder)


# Checks.


def check_load(loaders: ModuleType, bundle: Path) -> int:
    """Load every task through a loader that a plugin has registered. Returns how many tensors were compared."""
    opened, count = open_bundle(bundle), 0
    for task in opened.tasks:
        view = opened.view(task)
        folder = bundle / next(p for p in (f"tasks/{task}", f"coded/{task}") if (bundle / p).is_dir())
        loader = loaders.get_model_loader(load_config("flexmerge"))
        model = Model(view.items())
        loader.download_model(model_config(folder))
        loader.load_weights(model, model_config(folder))
        for name, own in model.names.items():
            assert torch.equal(getattr(model, own), view[name]), (task, name)
            count += 1
        larger = Model([*view.items(), ("another", torch.zeros(1))])
        try:
            loader.load_weights(larger, model_config(folder))
        except ValueError as error:
            assert "not initialized" in str(error)
        else:
            raise AssertionError("a missing weight was not noticed")
    return count


def check_interface(loaders: ModuleType) -> None:
    """Compare the stand-in with the interface of a wheel."""
    pairs = [(register_model_loader, loaders.register_model_loader), (get_model_loader, loaders.get_model_loader)]
    for name in ("__init__", "download_model", "get_all_weights", "load_weights"):
        pairs.append((getattr(DefaultModelLoader, name), getattr(loaders.DefaultModelLoader, name)))
    for own, theirs in pairs:
        mine, found = ([*inspect.signature(one).parameters] for one in (own, theirs))
        assert mine == found, f"{own.__qualname__} takes {found} in vLLM, and {mine} in the stand-in"
    assert hasattr(loaders.DefaultModelLoader, "counter_before_loading_weights")
    assert dataclasses.is_dataclass(loaders.DefaultModelLoader.Source)


def check_adapters(root: Path) -> int:
    """Export fine-tunes as adapters, and read them as vLLM's engine does. Returns how many weights were compared."""
    from .adapters import LORA, make
    from .program import succeeds

    lora, helper = (importlib.import_module(f"vllm.lora.{name}") for name in ("lora_model", "peft_helper"))
    adapted = make(root, "llama", {"a": LORA(r=2, target_modules=["q_proj", "v_proj"])})
    tasks = [f"--task=full{seed}={adapted.full(f'full{seed}', seed)}" for seed in (1, 2)]
    succeeds("plan", "--base", adapted.base, *tasks, f"--task=a={adapted.merged / 'a'}", "-o", root / "plan.json")
    succeeds("merge", root / "plan.json", "--servable", "lora:rank=8", "-o", root / "bundle")
    succeeds("export", root / "bundle", "--as-lora", "-o", root / "out")
    base, opened, count = load_file(root / "out/base/model.safetensors"), open_bundle(root / "bundle"), 0
    linear = {name.split(".")[-2] for name, tensor in base.items() if tensor.ndim == 2} - {"embed_tokens"}
    for task in opened.tasks:
        folder, view = str(root / "out/adapters" / task), opened.view(task)
        config = helper.PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
        config.validate_legal(SimpleNamespace(max_lora_rank=8))
        found = lora.LoRAModel.from_local_checkpoint(folder, linear, config, device="cpu", dtype=torch.float32)
        for name in base:
            own = found.get_lora(name.removesuffix(".weight"))
            change = own.scaling * own.lora_b @ own.lora_a if own is not None else 0
            torch.testing.assert_close(base[name] + change, view[name])
            count += own is not None
    return count


def main(folder: Path) -> None:
    from .bundle.bundles import make

    with tempfile.TemporaryDirectory() as root, of_wheel(folder) as loaders:
        check_interface(loaders)
        plugins = importlib.import_module("vllm.plugins")
        assert plugins.DEFAULT_PLUGINS_GROUP == GROUP
        importlib.metadata.entry_points = lambda *, group: entry_points() if group == GROUP else []  # type: ignore
        plugins.load_general_plugins()
        for place, options in (("exact", ()), ("coded", ("--method", "auto", "--size", "1x"))):
            count = check_load(loaders, make(Path(root) / place, *options, name="plain"))
            print(f"{place}: {count} tensors are equal")
        print(f"adapters: {check_adapters(Path(root) / 'adapters')} matrices are those of the bundle")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
