"""Runs what touches the GPU on fake tensors, and counts: bytes alive, kernels of attention, host syncs."""

import gc
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from device import capability
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten, COMPOSITE = torch.ops.aten, torch._C.DispatchKey.CompositeImplicitAutograd
GRANULARITY = 512
"""Bytes that CUDA's allocator rounds up to."""
OWN_CODE = ("/torch/", "/paper_gpu/", "<")


class _FakeTensors(FakeTensorMode):
    # Otherwise it asks torch.cuda.is_available().
    avoid_device_init = True


class PaperGPU(TorchDispatchMode):
    """Operators on "cuda" run on fake tensors, others for real.

    `now` and `peak` are bytes of the storages alive. `host_syncs` counts, by the function that asked, how often Python
    waited for the GPU; `kernels_of_sdpa` counts calls by kernel. `kernels` holds the Python of operators that are
    extensions in C.
    """

    def __init__(self):
        super().__init__()
        self.fake = _FakeTensors(allow_non_fake_inputs=True)
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.host_syncs, self.kernels_of_sdpa = Counter(), Counter()
        self.kernels = {}
        self.answered = 0

    def reset(self) -> None:
        """Count peak, host syncs and kernels anew."""
        gc.collect()
        self.peak = self.now
        self.host_syncs.clear()
        self.kernels_of_sdpa.clear()

    def forget(self) -> None:
        """Count from an empty GPU on: libraries still hold parts of the model before."""
        self.alive.clear()
        self.now = 0

    def take_host_syncs(self) -> dict[str, int]:
        """Those since the last time, by function."""
        found = dict(self.host_syncs)
        self.host_syncs.clear()
        return found

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def _count(self, tensor) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRANULARITY) * GRANULARITY
        if size and key not in self.alive:
            self.alive[key] = size
            weakref.finalize(storage, self._free, key)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _sync(self) -> None:
        """Note the innermost function that is not of torch."""
        frame = sys._getframe(2)
        while any(part in frame.f_code.co_filename for part in OWN_CODE):
            frame = frame.f_back
        self.host_syncs[f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"] += 1

    def _answer(self, tensor) -> bool | int | float:
        """What .item() says: true, a count, or a number that is never the same twice."""
        self.answered += 1
        if tensor.dtype == torch.bool:
            return True
        return 1 + 1e-6 * self.answered if tensor.is_floating_point() else 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        fakes = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, FakeTensor)]
        if func.overloadpacket in (aten.pin_memory, aten._pin_memory):
            return args[0].clone()
        if (
            torch.is_inference_mode_enabled()
            and func.namespace == "aten"
            and func.has_kernel_for_dispatch_key(COMPOSITE)
        ):
            # Such as .to() and .item(), which torch takes apart before they come here, but not in HQQ's inference mode.
            with self:
                return func.decompose(*args, **kwargs)
        if not fakes and target != "cuda":
            return func(*args, **kwargs)
        if target == "cpu":
            kwargs.pop("pin_memory", None)
        if func is aten._local_scalar_dense.default:
            self._sync()
            return self._answer(args[0])
        if func in (aten.equal.default, aten.allclose.default):
            self._sync()
            # RoPE's frequencies are those of the config; equal is asked of positions, and of activations that changed.
            return func is aten.allclose.default or not args[0].is_floating_point()
        if func is aten._to_copy.default and target == "cpu" and not kwargs.get("non_blocking"):
            self._sync()
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            # How many are true is asked of the GPU; taken as all.
            self._sync()
            chosen = args[1][0]
            with self.fake:
                args = args[0].flatten(0, chosen.dim() - 1), [torch.arange(chosen.numel(), device="cuda")]
        if func in self.kernels:
            kernel = self.kernels.pop(func)
            try:
                with self:
                    return kernel(*args, **kwargs)
            finally:
                self.kernels[func] = kernel
        with self.fake:
            out = func(*args, **kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self._count(tensor)
        return out


def attention_kernel(query, key, mask, enable_gqa: bool) -> str:
    """Which kernel torch's CUDA build takes (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), as far as decoders
    go: flash takes no mask and needs an Ampere; the memory-efficient one takes a mask, but no shared keys."""
    new, dtype = capability() >= (8, 0), query.dtype
    if new and mask is None and dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return "flash"
    shares = enable_gqa and query.shape[1] != key.shape[1]
    return "math" if shares or (dtype == torch.bfloat16 and not new) else "efficient"


def choose_attention(gpu: PaperGPU) -> None:
    """Let SDPA choose as on a GPU: a CPU build of torch knows only the math kernel for "cuda"."""
    functional = torch.nn.functional
    real = functional.scaled_dot_product_attention

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda":
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
        kernel = attention_kernel(query, key, attn_mask, enable_gqa)
        gpu.kernels_of_sdpa[f"{kernel} {str(query.dtype).removeprefix('torch.')}"] += 1
        if kernel == "flash":
            options = (dropout_p, is_causal, False)
            return aten._scaled_dot_product_flash_attention(query, key, value, *options, scale=scale)[0]
        if kernel == "math":
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        options = (attn_mask, trains, dropout_p, is_causal)
        return aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=scale)[0]

    functional.scaled_dot_product_attention = sdpa


def swap_fake_tensors() -> None:
    """Module.to() swaps parameters, which torch refuses for fake ones: something always holds them."""
    real = torch.utils.swap_tensors
    FakeTensor.numpy = lambda self: np.ones(self.shape, np.float32)

    def swap(old, new):
        if not isinstance(old, FakeTensor):
            return real(old, new)
        if (old.device, old.dtype) != (new.device, new.dtype):
            old.data = new.data

    torch.utils.swap_tensors = swap
