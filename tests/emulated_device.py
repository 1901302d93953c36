"""A GPU that is not there: tensors that live on the CPU, say that they are on ``cuda:0``, and refuse to meet those that do not.

`emulated_gpu` is a context in which `torch.cuda.is_available()` is true, ``.to("cuda")`` and ``device="cuda"`` work, and an operation
on tensors of both devices raises what CUDA would raise. So a line that forgets to move a tensor is found on a machine without a GPU.
It is an emulation: no kernel of CUDA runs, its speed, memory, rounding and random numbers are not met, and ``torch.compile`` and
several processes are left out.

How: every operation passes a dispatch mode, which knows the storages that are "on the GPU" and computes on the CPU; the Python
side of a tensor (`device`, `to`, `numpy`, ...) is patched to match.

As a command it runs notebooks so, in the fast tier and without writing them, and lists the cells that fail:

    OMP_NUM_THREADS=1 python tests/emulated_device.py book/*.ipynb
"""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vaelib.graphs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU: dict[int, StorageWeakRef] = {}  # the storages that are; a weak reference keeps the address from being used again
GENERATORS: dict[int, torch.Generator] = {}
COPIES = ("aten::copy_", "aten::_foreach_copy_")  # from any device to any
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
ORIGINAL_DEVICE, ORIGINAL_TO, ORIGINAL_NUMPY, ORIGINAL_DEEPCOPY = Tensor.device, Tensor.to, Tensor.numpy, Tensor.__deepcopy__
ORIGINAL_GENERATOR, ORIGINAL_TENSOR, ORIGINAL_AS_TENSOR = torch.Generator, torch.tensor, torch.as_tensor
ORIGINAL_AUTOCAST, ORIGINAL_GROUPED = torch.autocast.__init__, torch._C._group_tensors_by_device_and_dtype
MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats")


def on_gpu(value: Tensor) -> bool:
    """Whether the tensor says that it is on the GPU."""
    return value.untyped_storage()._cdata in ON_GPU


def place(value: Tensor, gpu: bool) -> Tensor:
    """The tensor, whose storage is on the GPU from now on, or is not."""
    if not gpu:
        ON_GPU.pop(value.untyped_storage()._cdata, None)
    elif not on_gpu(value) and not value.is_meta:
        reference = StorageWeakRef(value.untyped_storage())
        ON_GPU[reference.cdata] = reference
        if len(ON_GPU) % 1000 == 0:
            for address in [address for address, kept in ON_GPU.items() if kept.expired()]:
                del ON_GPU[address]
    return value


def mixed(name: str) -> RuntimeError:
    """What torch says, in about these words."""
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")


def check_same_device(func, args, kwargs) -> None:
    """RuntimeError where CUDA would raise one."""
    name = func._schema.name
    if name in COPIES:
        return
    first, rest = args[:1], (args[1:], kwargs)
    if name in INDEXING and on_gpu(first[0]):  # indices may be on the CPU, and so may a single value
        rest = [value for value in args[2:] if isinstance(value, Tensor) and value.dim() > 0]
    tensors = [value for value in tree_leaves((first, rest)) if isinstance(value, Tensor)]
    placed = [on_gpu(value) for value in tensors]
    if any(placed) and not all(placed):
        scalars = [value.dim() == 0 for value, gpu in zip(tensors, placed, strict=True) if not gpu]
        allowed = torch.Tag.pointwise in func.tags and all(scalars) and (len(scalars) == 1 or name == "aten::where")
        if not allowed or (func._schema.is_mutable and not placed[0]):
            raise mixed(name)


class Dispatch(TorchDispatchMode):
    """Computes on the CPU what is asked for on the GPU, and keeps the books."""

    gpu = False  # whether the last result was there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device, name = kwargs.get("device"), func._schema.name
        check_same_device(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, Tensor)]
        if device is not None:
            # `new_zeros` and its kin, and a change of dtype or layout, name the device below, which is always the CPU
            inherits = name == "aten::_to_copy" or name.startswith("aten::new_")
            gpu = device.type == "cuda" or (inherits and device.type == "cpu" and on_gpu(tensors[0]))
            kwargs["device"] = CPU if gpu else device
            if name == "aten::zeros" and torch._C._current_graph_task_id() >= 0:  # autograd's own, for a part that has no gradient
                gpu = self.gpu
        else:
            gpu = on_gpu(tensors[0]) if name in COPIES and tensors else any(map(on_gpu, tensors))
        for generator in (value for value in leaves if isinstance(value, torch._C.Generator)):
            if (generator._cdata in GENERATORS) != gpu:
                expected, found = ("cuda", "cpu") if gpu else ("cpu", "cuda")
                raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}'")
        result = func(*args, **kwargs)
        if name not in COPIES:
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    place(value, gpu)
                    self.gpu = gpu
        return result


class Move(torch.autograd.Function):
    """A copy on the other device; its gradient comes back."""

    @staticmethod
    def forward(ctx, value, gpu):
        ctx.gpu = gpu
        return place(value.clone(), gpu)

    @staticmethod
    def backward(ctx, gradient):
        return place(gradient.clone(), not ctx.gpu), None


def to(self: Tensor, *args, **kwargs) -> Tensor:
    """`Tensor.to`, for the two devices."""
    copy = kwargs.pop("copy", False)
    if (other := args[0] if args else kwargs.get("other")) is not None and isinstance(other, Tensor):
        device, dtype, form = other.device, other.dtype, kwargs.get("memory_format")
    else:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or "meta" in (device.type, self.device.type):
        return ORIGINAL_TO(self, *args, **kwargs, copy=copy)
    moves = (device.type == "cuda") != on_gpu(self)
    value = Move.apply(self, device.type == "cuda") if moves else self
    return ORIGINAL_TO(value, dtype=dtype or self.dtype, copy=copy and not moves, memory_format=form or torch.preserve_format)


def numpy(self: Tensor, *args, **kwargs):
    """`Tensor.numpy`, which a GPU's tensor does not have."""
    if on_gpu(self):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )
    return ORIGINAL_NUMPY(self, *args, **kwargs)


def made(original):
    """`torch.tensor` or `torch.as_tensor`, for the two devices."""

    def make(data, *args, device=None, **kwargs):
        if device is None:  # without one the context decides: `with torch.device("meta")`, or `torch.set_default_device`
            contexts = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
            device = data.device if isinstance(data, Tensor) else (contexts or [CPU])[-1]
        device = torch.device(device)
        if device.type == "meta":
            return original(data, *args, device=device, **kwargs)
        return original(data, *args, device=CPU, **kwargs).to(device)

    return make


class Generator(ORIGINAL_GENERATOR):
    """`torch.Generator`, for the two devices; the numbers are those of the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.place = GPU if torch.device(device).type == "cuda" else CPU
        if self.place == GPU:
            GENERATORS[self._cdata] = self  # kept for good: the address stays its own
        return self

    @property
    def device(self):
        return self.place


def grouped(*args):
    """The optimizers' parameters by device and dtype, with the device that they say they are on."""
    groups = ORIGINAL_GROUPED(*args)
    return {(GPU if on_gpu(lists[0][0]) else device, dtype): (lists, *rest) for (device, dtype), (lists, *rest) in groups.items()}


def autocast(self, device_type, *args, **kwargs):
    """`torch.autocast`, whose work on the GPU is that on the CPU."""
    ORIGINAL_AUTOCAST(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Stand:
    """A stream of CUDA's: here all work is done in the order in which it is asked for."""

    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


class Recorded:
    """A graph whose replay is another call of the function: what a recording must not do, reading numbers, `Watch` sees before."""

    def __init__(self, function):
        self.replay = function


def record(replayed):
    """`vaelib.graphs.Replayed.record`: nothing is computed yet."""
    replayed.graph = Recorded(replayed.function)


@contextlib.contextmanager
def emulated_gpu():
    """Within it there is one "GPU", ``cuda:0``."""
    _device_constructors()  # torch keeps this list for good, so it must not see the patches
    patches = [
        (Tensor, "device", property(lambda self: GPU if on_gpu(self) else ORIGINAL_DEVICE.__get__(self))),
        (Tensor, "is_cuda", property(on_gpu)),
        (Tensor, "is_cpu", property(lambda self: self.device.type == "cpu")),
        (Tensor, "get_device", lambda self: 0 if on_gpu(self) else -1),
        (Tensor, "to", to),
        (Tensor, "cpu", lambda self, memory_format=torch.preserve_format: self.to("cpu", memory_format=memory_format)),
        (Tensor, "cuda", lambda self, device=None, non_blocking=False: self.to("cuda")),
        (Tensor, "numpy", numpy),
        (Tensor, "__deepcopy__", lambda self, memo: place(ORIGINAL_DEEPCOPY(self, memo), on_gpu(self))),
        (torch, "tensor", made(ORIGINAL_TENSOR)),
        (torch, "as_tensor", made(ORIGINAL_AS_TENSOR)),
        (torch, "Generator", Generator),
        (torch.autocast, "__init__", autocast),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_name", lambda device=None: "an emulated GPU"),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "manual_seed_all", lambda seed: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "Stream", Stand),
        (torch.cuda, "current_stream", Stand),
        (torch.cuda, "stream", contextlib.nullcontext),
        (vaelib.graphs.Replayed, "record", record),
        (torch.cuda, "mem_get_info", lambda device=None: (2**34, 2**34)),
        *((torch.cuda, name, lambda device=None: 0) for name in MEMORY),
    ]
    if hasattr(torch, "accelerator"):  # what the optimizers ask; an older torch asks `torch.cuda`
        patches.append((torch.accelerator, "current_stream", mock.Mock(**{"return_value.is_capturing.return_value": False})))
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Dispatch())
        stack.callback(ON_GPU.clear)
        yield


def failures(notebook: Path) -> list[tuple[int, str, str]]:
    """Number, id and error of each code cell (from 0) that fails on the emulated GPU; the notebook is not written."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    hook = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import emulated_device as _emulated"
    hook += "; _gpu = _emulated.emulated_gpu(); _gpu.__enter__()"
    book.cells.insert(0, nbformat.v4.new_code_cell(hook))
    client = NotebookClient(book, timeout=None, allow_errors=True, resources={"metadata": {"path": str(notebook.parent)}})
    client.execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"][1:]
    found = []
    for number, cell in enumerate(cells):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                found.append((number, cell.id, f"{output.ename}: {output.evalue}"))
    return found


def main() -> int:
    """Runs the notebooks named on the command line; 1 where a cell failed, else 0."""
    os.environ.setdefault("VAELIB_FAST", "1")
    count = 0
    for notebook in map(Path, sys.argv[1:]):
        found = failures(notebook)
        print(f"{notebook}: {len(found)} cells failed", *(f"  {number} {cell}: {error}" for number, cell, error in found), sep="\n")
        count += len(found)
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
