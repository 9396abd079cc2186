"""A copy of the user's module that holds shapes only, without references to the original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import ReplayError, UnsupportedError
from lightning_gradaudit.simulation.batch import Batch
from lightning_gradaudit.simulation.replay import unregistered_tensors

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED_BY_COMPILING = ("forward", "training_step", "validation_step", "test_step", "predict_step", "_compiler_ctx")


def replicate(module: nn.Module, like: Batch | None) -> nn.Module:
    """Copy a module without its weights and without images that it keeps from earlier batches.

    Args:
        module: Left exactly as it is.
        like: A batch; tensors of the shape of its images or labels that the module holds are not copied.

    Returns:
        Parameters and buffers on the meta device. The copy does not log, and no part of it is compiled: a compiled
        function refers to the module that it was compiled from, and has no second derivative.

    Raises:
        ReplayError: When the module cannot be copied.
        UnsupportedError: When a part of it is TorchScript.
    """
    _refuse_scripted(module)
    replaced: dict[int, Any] = {}
    for tensor in unregistered_tensors(module):
        if like is not None and _has_shape_of(tensor, like):
            replaced[id(tensor)] = torch.zeros_like(tensor)
        elif not tensor.is_leaf:  # deepcopy refuses them, and a graph may hold anything
            replaced[id(tensor)] = tensor.detach().clone()
    compiled = module.__dict__.get("_compiler_ctx")
    if compiled is not None:
        replaced[id(compiled)] = None
    try:
        replica = copy.deepcopy(module, replaced)
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise ReplayError(
            f"{type(module).__name__} cannot be copied ({error}), so its gradient cannot be simulated. "
            "Keep open files, locks and other live objects out of the module."
        ) from error
    for name in ("log", "log_dict", "print"):
        if hasattr(replica, name):
            object.__setattr__(replica, name, _ignore)
    if compiled is not None:
        for name in _REPLACED_BY_COMPILING:
            replica.__dict__.pop(name, None)
    for submodule in list(replica.modules()):
        _run_eagerly(submodule)
        _drop_per_sample_hooks(submodule)
    return _to_meta(replica)


def _refuse_scripted(module: nn.Module) -> None:
    """Refuse TorchScript, whose code refers to its own weights, so that no others can be passed to it."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            where = f"its module {name!r}" if name else "it"
            raise UnsupportedError(
                f"module: expected Python modules, but {where} is TorchScript ({submodule.original_name}), whose "
                "gradient cannot be simulated. Audit the module that was scripted."
            )


def _run_eagerly(module: nn.Module) -> None:
    module.__dict__["_compiled_call_impl"] = None
    original = module._modules.get("_orig_mod")
    if original is not None:  # torch.compile(submodule)
        object.__setattr__(module, "forward", original)


def _drop_per_sample_hooks(module: nn.Module) -> None:
    """Remove the hooks of Opacus: per-sample gradients are simulated here, and its hooks keep images."""
    for kind in _HOOKS:
        hooks = getattr(module, kind, None) or {}
        for key, hook in list(hooks.items()):
            function = getattr(hook, "func", hook)
            if str(getattr(function, "__module__", "")).startswith("opacus"):
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
    for kept in ("activations", "max_batch_len"):
        module.__dict__.pop(kept, None)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replace `LightningModule.log` in a replica: an audit must not write to the user's logs."""


def _to_meta(module: nn.Module) -> nn.Module:
    """Replace parameters and buffers by shapes, keeping ties between parameters."""
    replaced: dict[int, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                shape = replaced.setdefault(
                    id(parameter), nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                )
                submodule._parameters[name] = shape
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = buffer.to("meta")
    return module


def _has_shape_of(tensor: Tensor, batch: Batch) -> bool:
    image = batch.inputs.shape[1:]
    labels = tensor.shape == batch.labels.shape and tensor.dtype == batch.labels.dtype
    return labels or tensor.shape[-len(image) :] == image
