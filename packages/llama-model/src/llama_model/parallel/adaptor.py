"""Lets megatron-core run on the device at hand: it spells the accelerator `torch.cuda` and `"cuda"`.

An import hook changes megatron-core's own modules as they load, and nothing of them on disk:

- each module's name `torch` becomes a view of torch in which `torch.cuda` is the device's module and "cuda" the current
  device (not on CUDA);
- three functions compare `param.type()` with "torch.cuda.FloatTensor": those constants become the device's;
- the optimizer takes `FusedAdam` where neither apex nor Transformer Engine is installed: with torch's AdamW,
  megatron-core cannot load a checkpoint of its distributed optimizer;
- where clipping falls back to torch's norm and to scaling gradients one after another, it gets a norm that is right for
  large tensors (torch's fp32 norm is off by a thousandth at 20 M numbers on a CPU), and scales them together, in place;
- the jit fuser, which is torch.compile, is off: no compiler is ever called;
- its warnings that optional packages are missing, that the CPU's generator changed, and how to set up CUDA's streams
  where there is no CUDA, are not shown.

Outside megatron-core it touches what `TOUCHED` lists.
"""

import functools
import importlib.machinery
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, spec_from_file_location
from typing import Any

import torch
from npu_kernels import Device
from npu_kernels import device as find_device

from llama_model.errors import ModelError, RequestError
from llama_model.parallel.fused_adam import FusedAdam

TOUCHED = ("sys.meta_path", "warnings.filters", "torch.Tensor.cuda")
"""Every name outside megatron-core that is changed: the hook; two more filters, for torch's notices that functions
of torch.distributed which megatron-core calls got new names, and that it asks views for gradients; and, only where
there is no CUDA device and `Tensor.cuda` could do nothing but raise, that method, which moves to the device at hand.
"""

FACTORIES = ("autocast", "empty", "empty_like", "ones", "tensor", "zeros")
"""The functions of torch that megatron-core calls with "cuda" for a device."""

TYPE_NAMES = {
    "optimizer.clip_grads": ("clip_grad_by_total_norm_fp32",),
    "optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "optimizer.optimizer": ("Float16OptimizerWithFloat16Params.__init__",),
}
"""Modules of megatron-core and their functions that compare a tensor's type with the name of one of CUDA's."""

OPTIMIZER_NAMES = {
    "optimizer": {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False},
    "optimizer.distrib_optimizer": {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True},
}
"""Modules of megatron-core and their names, as they would stand there if `FusedAdam` were apex's."""

NORM_ROW = 2**14
"""Numbers whose squares torch adds up in fp32 on a CPU, 2.6e-8 off; rows are added up in fp64."""

SILENCED = r"(Transformer Engine and )?Apex (are|is) not installed|The following imports from `dynamic_context.py`"
"""Beginnings of the warnings that importing megatron-core gives."""

_PACKAGE = "megatron.core"


def adapt(device: Device | None = None) -> None:
    """Installs the import hook. Call it before the first import of megatron.core; again is allowed and does nothing.

    Args:
        device: Where megatron-core is to compute; the machine's accelerator unless given.

    Raises:
        ModelError: megatron-core is not installed, was imported before, or is adapted to another device.
        RequestError: The CPU is asked for on a machine with CUDA, where `Tensor.cuda` must stay what it is.
    """
    before = adapted_device()
    if before is not None:
        if device not in (None, before):
            raise ModelError(f"megatron-core is adapted to {before.type} in this process already")
        return
    device = find_device() if device is None else device
    for needed in ("megatron", "psutil"):  # without psutil, saving a checkpoint waits for ever
        if find_spec(needed) is None:
            raise ModelError(
                f"{needed} is not installed: pip install './packages/llama-model[parallel]' and its siblings"
            )
    if _PACKAGE in sys.modules:
        raise ModelError(
            "megatron.core was imported before it could be adapted: call llama_model.parallel.adapt() (or initialize) "
            "before the first import of megatron.core"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise RequestError("megatron-core on the CPU of a machine with CUDA: hide its GPUs (CUDA_VISIBLE_DEVICES='')")
    sys.meta_path.insert(0, _Finder(device))
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its fp32 distributed optimizer asks views of weights whether they have gradients.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", module="megatron")
    if not torch.cuda.is_available():
        torch.Tensor.cuda = _to_device(device)  # type: ignore[method-assign]


def adapted_device() -> Device | None:
    """The device that megatron-core is adapted to in this process; None before `adapt`."""
    return next((finder.device for finder in sys.meta_path if isinstance(finder, _Finder)), None)


class _Finder(MetaPathFinder):
    """Finds megatron-core's modules where they always are, and gives them our loader."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.torch = view_of_torch(device)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec  # compiled modules know no torch.cuda
        loader = _Loader(fullname, spec.loader.path, self)
        places = spec.submodule_search_locations
        return spec_from_file_location(fullname, spec.origin, loader=loader, submodule_search_locations=places)


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a module as usual, then adapts what it has defined."""

    def __init__(self, fullname: str, path: str, finder: _Finder) -> None:
        super().__init__(fullname, path)
        self._finder = finder

    def exec_module(self, module: types.ModuleType) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SILENCED)
            super().exec_module(module)
        _adapt_module(module, self._finder.device, self._finder.torch)


def _adapt_module(module: types.ModuleType, device: Device, view: types.ModuleType) -> None:
    """Everything that the module's docstring above names."""
    name = module.__name__.removeprefix(f"{_PACKAGE}.")
    if device.type != "cuda":
        _redirect(module, name, device, view)
    if name == "jit":
        module.disable_jit_fuser()
    for function, ours in CLIP_FUNCTIONS.items() if name == "optimizer.clip_grads" else ():
        if vars(module)[function].__module__ == f"{_PACKAGE}.utils":  # it found no other
            vars(module)[function] = ours
    if name in OPTIMIZER_NAMES and vars(module)["Adam"].__module__.startswith("torch.optim"):  # it found no other
        vars(module).update(OPTIMIZER_NAMES[name])


def _scale_together(chunk_size: int, overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], scale: float) -> None:
    """Writes `scale` times the first list's tensors into the second's: apex's `multi_tensor_scale`."""
    del chunk_size, overflow
    source, target = lists
    if any(a is not b for a, b in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, scale)


def _norm_together(
    chunk_size: int, overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """As apex's `multi_tensor_l2norm`."""
    del chunk_size, overflow
    assert not per_tensor
    return l2_norm([tensor for tensor_list in lists for tensor in tensor_list]), None


def l2_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of all tensors as one vector, fp32 [1], on their device. There is at least one.

    On a CPU torch's own is off by 1e-3 of 2e7 numbers in fp32: here rows' sums are added up in fp64.
    """
    if tensors[0].device.type != "cpu":
        norm: torch.Tensor = torch.stack(torch._foreach_norm(tensors)).norm()
        return norm.view(1)
    squares = sum((_square_sum(tensor.detach().flatten()) for tensor in tensors), torch.zeros((), dtype=torch.float64))
    return squares.sqrt().to(torch.float32).view(1)


def _square_sum(x: torch.Tensor) -> torch.Tensor:
    """Of a vector on a CPU: an fp64 scalar."""
    whole = x.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(x[:whole].view(-1, NORM_ROW), dim=1).double()
    total: torch.Tensor = rows.square().sum() + torch.linalg.vector_norm(x[whole:]).double().square()
    return total


CLIP_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "l2_norm_impl": _norm_together,
    "multi_tensor_scale_impl": _scale_together,
}
"""Where megatron-core takes apex's fused functions, and what stands for its own in their place."""


def _redirect(module: types.ModuleType, name: str, device: Device, view: Any) -> None:
    """Points a module at the device."""
    if vars(module).get("torch") is torch:
        module.torch = view  # type: ignore[attr-defined]
    for path in TYPE_NAMES.get(name, ()):
        _rename_types(functools.reduce(getattr, path.split("."), module), device.type)
    if name == "tensor_parallel.layers":
        module.linear_with_grad_accumulation_and_async_allreduce.warned = True
    if name == "tensor_parallel.random":
        # They reach into torch.cuda.random and CUDA's list of generators.
        vars(module)["_get_cuda_rng_state"] = lambda device=None, clone=False, graph_safe=False: (
            view.cuda.get_rng_state()
        )
        vars(module)["_set_cuda_rng_state"] = lambda new_state, device=-1, graph_safe=False: view.cuda.set_rng_state(
            new_state
        )
        logging.getLogger(module.__name__).addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """On a CPU the accelerator's generator is the CPU's: that it changed says nothing."""
    return "CPU RNG state changed" not in record.getMessage()


def _rename_types(function: Any, device_type: str) -> None:
    """Replaces "torch.cuda.FloatTensor" and its kin among a function's constants by the names that `type()` gives."""
    function = getattr(function, "__func__", function)
    prefix = "torch." if device_type == "cpu" else f"torch.{device_type}."

    def renamed(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(map(renamed, constant))
        if isinstance(constant, str):
            return re.sub(r"torch\.cuda\.(?=\w*Tensor\b)", prefix, constant)
        return constant

    code = function.__code__
    function.__code__ = code.replace(co_consts=renamed(code.co_consts))


# --- the views -------------------------------------------------------------------------------------------------------


class _View(types.ModuleType):
    """A module that answers from its own names first, and from `base` otherwise."""

    def __init__(self, base: types.ModuleType, names: dict[str, Any]) -> None:
        super().__init__(base.__name__)
        vars(self).update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def view_of_torch(device: Device) -> types.ModuleType:
    """Torch as megatron-core's modules see it: `torch.cuda` is the device's module, "cuda" the current device."""
    names: dict[str, Any] = {"current_device": device.torch_device}
    if device.type == "cpu":
        names |= {  # what torch.cpu lacks
            "default_stream": torch.cpu.current_stream,
            "empty_cache": lambda: None,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "manual_seed": torch.manual_seed,
            "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
        }
    cuda = _View(torch.get_device_module(device.type), names)
    return _View(torch, {"cuda": cuda, **{name: _here(getattr(torch, name), device.type) for name in FACTORIES}})


def _here(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`function` with "cuda" among its arguments read as the device."""

    def translated(argument: Any) -> Any:
        is_cuda = isinstance(argument, str) and (argument == "cuda" or argument.startswith("cuda:"))
        return device_type + argument[len("cuda") :] if is_cuda else argument

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(translated, args), **{name: translated(value) for name, value in kwargs.items()})

    return call


def _to_device(device: Device) -> Callable[..., torch.Tensor]:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Moves to the device that llama_model.parallel has adapted megatron-core to; there is no CUDA device."""
        del args, kwargs
        return self.to(device.torch_device())

    return cuda
