"""TransformerEngine's real Python sources without its native code: enough to build layers and recipes, not to run them.

The wheel `transformer_engine` is pure Python; its kernels and the torch extension are other packages, which need CUDA.
`install()` puts a stand-in where the extension would be, so that the Python classes (modules, recipes, autocast) are
the real ones and any kernel call fails. It changes the process for good: call it in a process of its own.
"""

import enum
import importlib
import importlib.util
import itertools
import os
import sys
import types
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[1] / ".venv-te"
"""Where the Makefile puts the sources, one folder a version; never on the path of the package itself."""

_numbers = itertools.count(100)


class _Name(type):
    """Stands for any name of the extension: it has every attribute, and a number, since some name enum members."""

    def __int__(cls):
        return cls.number

    __index__ = __int__

    @property
    def __members__(cls) -> dict:  # TransformerEngine compares its enums with the extension's
        return {name: value for name, value in vars(cls).items() if isinstance(value, _Name)}

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _name(f"{cls.__name__}.{name}")
        setattr(cls, name, value)
        return value


def _name(name: str) -> _Name:
    def call(self, *args, **kwargs):
        raise RuntimeError(f"{name} is native code, which is not here")

    return _Name(name, (), {"number": next(_numbers), "__init__": call})


class _Names(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _name(name)
        setattr(self, name, value)
        return value


def install(capability: tuple[int, int], cuda: str) -> None:
    """Make `transformer_engine` (on sys.path already) importable, as if on a GPU of this compute capability.

    Args:
        cuda: torch.version.cuda that it sees.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no shared library
    sys.modules["transformer_engine_torch"] = _extension()
    # Only for export to ONNX; the real one needs onnx and onnxscript.
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _Names("onnx_extensions")

    package = _bare_package()
    common = package.common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")
    _build_without_cuda()

    torch.version.cuda = cuda
    torch.cuda.get_device_capability = lambda *_, **__: capability
    torch.cuda.get_device_properties = lambda *_, **__: types.SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, name="none"
    )


def _build_without_cuda() -> None:
    # Every layer's constructor asks for CUDA first; only there is it pretended, since the actor asks the same question.
    layer = importlib.import_module("transformer_engine.pytorch.module.base").TransformerEngineBaseModule
    build = layer.__init__

    def __init__(self, *args, **kwargs):
        with mock.patch("torch.cuda.is_available", return_value=True):
            build(self, *args, **kwargs)

    layer.__init__ = __init__


def _bare_package() -> types.ModuleType:
    # The package's own __init__ imports .pytorch before load_framework_extension can be replaced.
    spec = importlib.util.find_spec("transformer_engine")
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    package.__version__ = metadata.version("transformer_engine")
    return package


def _extension() -> types.ModuleType:
    extension = _Names("transformer_engine_torch")
    extension.DType = enum.IntEnum(
        "DType",
        {
            "kByte": 0,
            "kInt32": 2,
            "kFloat32": 4,
            "kFloat16": 5,
            "kBFloat16": 6,
            "kFloat8E4M3": 7,
            "kFloat8E5M2": 8,
            "kFloat4E2M1": 10,
        },
    )
    gemms = ("GEMM1", "GEMM2", "GEMM3")
    forward = [f"{g}_{t}" for g in gemms for t in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"{t}{i}" for i in (1, 2, 3) for t in ("GRAD_OUTPUT", "GRAD_INPUT")]
    extension.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", forward, start=0)
    extension.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", backward, start=0)
    extension.get_cudnn_version = lambda: 91900
    extension.get_cublasLt_version = lambda: 130100
    extension.get_num_cublas_streams = lambda: 4
    return extension
