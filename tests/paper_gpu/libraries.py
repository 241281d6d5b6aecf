"""The libraries' own Python for CUDA, as it is written; only what calls a compiled kernel does nothing."""

import sys
from types import SimpleNamespace

import torch
from fake import PaperGPU
from torch._subclasses.fake_tensor import FakeTensor

FIELDS = {
    "quant_state": None, "blocksize": 64, "compress_statistics": True, "quant_type": "fp4",
    "quant_storage": torch.uint8, "module": None, "bnb_quantized": False,
}  # fmt: skip
KEPT = []
"""Registrations, which end when they are collected."""


def _nothing(*_, **__) -> None: ...


def _bitsandbytes(gpu: PaperGPU) -> None:
    import bitsandbytes
    from bitsandbytes import _ops, functional
    from bitsandbytes.nn import modules

    # The implementations for CUDA, which a CPU build of torch would never reach.
    written, register = {}, _ops.register_kernel
    for name in [name for name in sys.modules if name.startswith("bitsandbytes.backends.cuda")]:
        del sys.modules[name]
    _ops.register_kernel = lambda name, device: lambda function: written.setdefault(name, function)
    from bitsandbytes.backends.cuda import ops

    _ops.register_kernel = register
    ops._dequantize_4bit_impl = ops._dequantize_blockwise_impl = _nothing
    ops._gemm_4bit_kernel_impl = lambda a, b, shape, *_, **__: a.new_empty(*a.shape[:-1], shape[0])
    gpu.kernels[torch.ops.bitsandbytes.gemm_4bit.default] = written["bitsandbytes::gemm_4bit"]

    def get_paged(*shape, dtype=torch.float32, device=None):
        # Counted, as plan does: while it is used it is on the GPU.
        paged = torch.empty(*shape, dtype=dtype, device=device)
        paged.is_paged = True
        return paged

    functional.get_paged, functional.prefetch_tensor, functional.fill = get_paged, _nothing, _nothing

    real = modules.Params4bit

    class FakeParams4bit(FakeTensor):
        """bitsandbytes' parameter; torch makes no subclass of a fake tensor, so that its class is changed."""

        def detach(self):
            return Params4bit(super().detach(), **{name: getattr(self, name) for name in FIELDS})

        def to(self, *args, **kwargs):
            if self.bnb_quantized:
                return self
            on_gpu = self.data.contiguous().to(torch._C._nn._parse_to(*args, **kwargs)[0])
            options = {name: getattr(self, name) for name in list(FIELDS)[1:5]}
            packed, state = functional.quantize_4bit(on_gpu, **options)
            if self.module is not None:
                self.module.quant_state = state
            fields = {name: getattr(self, name) for name in FIELDS} | {"quant_state": state, "bnb_quantized": True}
            return Params4bit(packed, **fields)

    class Params4bit(real):
        def __new__(cls, data=None, requires_grad=False, **fields):
            if not isinstance(data, FakeTensor):
                return real.__new__(cls, data, requires_grad, **fields)
            made = data.detach()
            made.__class__, made._is_param = FakeParams4bit, True
            for name, usual in FIELDS.items():
                given = fields.get(name)
                setattr(made, name, usual if given is None else given)
            return made

    bitsandbytes.nn.Params4bit = modules.Params4bit = Params4bit


def _trl() -> None:
    """The LM head's Triton kernels write into tensors that are there already."""
    import trl.models.activation_offloading as offloading
    from trl.kernels import chunked_logprob as head

    class Kernel:
        def __getitem__(self, grid):
            return _nothing

    head._TRITON_AVAILABLE, head._forward_kernel, head._backward_kernel = True, Kernel(), Kernel()
    head.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    # Of its own it takes addresses, which fake tensors have not.
    offloading._get_unique_tensor_key = lambda t: (t.untyped_storage()._cdata, t.storage_offset(), t.dtype)


def _torch() -> None:
    # One kernel on CUDA; a CPU build takes it apart, with tensors in between.
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("silu_backward", lambda grad, x: torch.empty_like(x))
    KEPT.append(library)
    # fp16's loss scaling asks the gradients whether to take the step.
    torch.amp.GradScaler._maybe_opt_step = lambda self, optimizer, state, *args, **kwargs: optimizer.step(
        *args, **kwargs
    )


def install(gpu: PaperGPU) -> None:
    """Put all of it in place."""
    from transformers.utils import import_utils

    # Else it takes the paths of torch.compile, with a mask.
    import_utils.is_fake_tensor = lambda tensor: False
    _torch()
    _trl()
    _bitsandbytes(gpu)
