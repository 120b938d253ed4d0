"""What stock SGLang needs on a machine without CUDA, by name. ``python -m megatron_vespo.platform.sglang_cpu FLAGS``
serves, with SGLang's own flags.

SGLang imports a few CUDA-only packages whether or not it uses them. Stand-ins go in at the top level of this module
when it is the main module: SGLang starts its workers by multiprocessing's spawn, which imports the parent's main module
again in each of them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

SGLANG_VERSION = "0.5.21"


class _Stub(types.ModuleType):
    """A module of any name: attributes are stub modules, capitalised ones empty classes, calls act as decorators."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__
        self.__spec__ = importlib.machinery.ModuleSpec(name, _LOADER, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = (
            type(name, (_StubClass,), {}) if name[0].isupper() else importlib.import_module(f"{self.__name__}.{name}")
        )
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bare_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if bare_decorator else lambda function: function


class _StubMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StubClass(metaclass=_StubMeta):
    """Of an enumeration, the members are strings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class _StubLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_LOADER = _StubLoader()


class _StubFinder(importlib.abc.MetaPathFinder):
    """``import package[.anything]`` gives stubs."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == self.package or name.startswith(f"{self.package}."):
            return importlib.machinery.ModuleSpec(name, _LOADER, is_package=True)
        return None


def _stub_triton() -> None:
    """Decorators and types for GPU kernels that are defined on import and never launched."""
    sys.meta_path.insert(0, _StubFinder("triton"))
    triton: Any = importlib.import_module("triton")
    # What SGLang computes with when it imports.
    triton.__version__ = "3.0.0"
    triton.cdiv = lambda a, b: -(a // -b)
    triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()


def _stub_torchvision() -> None:
    """Image transforms for models that see.

    Its wheel on the package index is a CUDA build that fails to import beside a CPU torch, and takes every model of
    transformers with it, the trainer's too: so it is not installed, and stubbed here only.
    """
    sys.meta_path.insert(0, _StubFinder("torchvision"))
    torchvision: Any = importlib.import_module("torchvision")
    torchvision.__version__ = "0.28.0"


def _stub_sgl_kernel() -> None:
    """Compiled kernels of SGLang for CUDA: every name imports, none can be called."""

    def missing(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} is CUDA-only")

        refuse.__name__ = name
        return refuse

    kernel: Any = types.ModuleType("sgl_kernel")
    kernel.__version__ = "0"
    kernel.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    kernel.__getattr__ = missing
    sys.modules["sgl_kernel"] = kernel


def _allocate_host_buffers_unpinned() -> None:
    """Pinned memory (of the routed experts' buffers) exists only with CUDA."""
    common = importlib.import_module("sglang.srt.mem_cache.pool_host.common")

    def allocate(
        dims: Sequence[int], dtype: Any, device: str, pin_memory: bool, allocator: Any, *_: Any, **__: Any
    ) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def install() -> None:
    """Put every stand-in in place. Raises RuntimeError for another SGLang, or where CUDA is present."""
    import torch

    if "transformers" in sys.modules:
        raise RuntimeError("the CPU stand-ins go in before transformers is imported, which looks for torchvision once")
    found = importlib.metadata.version("sglang")
    if found != SGLANG_VERSION:
        raise RuntimeError(f"the CPU stand-ins know SGLang {SGLANG_VERSION}, {found} is installed")
    if torch.cuda.is_available():
        raise RuntimeError(
            "CUDA is present: run sglang.launch_server itself, the CPU stand-ins would disable its kernels"
        )
    stand_ins = {"triton": _stub_triton, "torchvision": _stub_torchvision, "sgl_kernel": _stub_sgl_kernel}
    for package, stand_in in stand_ins.items():
        if importlib.util.find_spec(package) is None:  # the real one, where it is installed, stays
            stand_in()
    _allocate_host_buffers_unpinned()


if __name__ in ("__main__", "__mp_main__"):
    install()
if __name__ == "__main__":
    from megatron_vespo.platform.sglang_server import main

    main()
