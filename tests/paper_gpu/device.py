"""A CUDA GPU on paper: torch and the libraries find one, of a chosen generation. Import it before torch.

`stand_in.cpp` gives torch a device without kernels, which must be there when torch is imported. Tensors on it are fake
(fake.py): they have a device, a dtype, a shape and a size, and no content.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _load_stand_in() -> None:
    """Compile it, once for each torch, and load it."""
    source, torch = (HERE / "stand_in.cpp").read_text(), Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256((source + (torch / "version.py").read_text()).encode()).hexdigest()[:16]
    library = HERE / "__pycache__" / f"stand_in-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        folders = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
        command = [COMPILER, "-O0", "-std=c++20", "-shared", "-fPIC", HERE / "stand_in.cpp", "-o", part, *folders]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"], check=True)
        part.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load_stand_in()
import torch  # noqa: E402

CARDS = {"turing": (7, 5, 15), "ampere": (8, 6, 24), "hopper": (9, 0, 80)}
"""Generation -> compute capability, and GiB."""
card = SimpleNamespace(name="ampere")


def capability(*_) -> tuple[int, int]:
    return CARDS[card.name][:2]


class _Stream:
    """A stream or event, on which nothing has to be waited for."""

    def __init__(self, *_, **__): ...

    def __getattr__(self, name):
        return lambda *_, **__: _Stream()

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def _properties(*_) -> SimpleNamespace:
    major, minor, gib = CARDS[card.name]
    return SimpleNamespace(
        name=card.name, major=major, minor=minor, total_memory=gib * 2**30, multi_processor_count=40, warp_size=32,
        is_integrated=False,
    )  # fmt: skip


def _install() -> None:
    """Before transformers and bitsandbytes are imported: they ask while they are."""
    cuda = torch.cuda
    # torch.tensor(data, device="cuda") is made on the CPU and then moved.
    torch._C._set_only_lift_cpu_tensors(True)
    for name, answer in {
        "is_available": True, "is_initialized": True, "_is_compiled": True, "device_count": 1, "current_device": 0,
        "memory_reserved": 0, "memory_allocated": 0, "max_memory_allocated": 0, "max_memory_reserved": 0,
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "_lazy_init", "_lazy_call", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats",
        "manual_seed", "manual_seed_all",
    ):  # fmt: skip
        setattr(cuda, name, lambda *_, **__: None)
    cuda.get_device_name = lambda *_: f"{card.name} on paper"
    cuda.get_device_capability, cuda.get_device_properties = capability, _properties
    cuda.mem_get_info = lambda *_: (CARDS[card.name][2] * 2**30,) * 2
    cuda.is_bf16_supported = lambda including_emulation=True: capability() >= (8, 0) or including_emulation
    cuda.device = cuda.device_of = cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _Stream
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch._C._accelerator_setAllocatorSettings = lambda *_: None
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")


_install()
