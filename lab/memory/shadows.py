"""Tensors with a shape and no memory, which pass for tensors on the processor.

torch's FakeTensorMode does this and more (symbolic shapes, several devices) at several times the cost of an operator.
Here an operator runs its meta kernel, and what it returns is a Shadow, which dispatches as a tensor on the processor
does: autograd, autocast and composite operators take the paths that they take on real tensors. Views share a storage
that has a size, so that a ledger counts them as it counts real ones.

Tensors of given values (`torch.tensor(3)`, say: a counter of steps) stay real, and so does what is computed from them
alone.

Source: the note "Fake Tensor Dispatch Keys" in torch/_subclasses/fake_tensor.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICE = torch.ops.prim.device.default
_LAYER_NORM = torch.ops.aten.native_layer_norm.default
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
_CPU, _META = torch.device("cpu"), torch.device("meta")

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Shadow(Tensor):
    """A tensor on the meta device that says it is on the processor, but to the meta kernels."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is _DEVICE:
            return _META if torch._C._meta_in_tls_dispatch_include() else _CPU
        raise RuntimeError(f"{func}: a shadow is of use inside ShadowMode alone")


class ShadowMode(TorchDispatchMode):
    """While it is entered, new tensors are shadows.

    Most meta kernels are slow Python. So an operator that does no more than return new tensors is asked for their
    layout once for each layout of its arguments; one that writes in place is not run at all.

    Args:
        device: whose kernels are shadowed, where "cpu" and "cuda" return different types.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self._layouts: dict[Hashable, tuple[type, list[_Layout]] | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True wraps every dispatch for the sake of torch.compile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return _CPU
        kwargs = kwargs or {}
        given = _tensors([*args, *kwargs.values()])
        shadows = sum(type(tensor) is Shadow for tensor in given)
        if given and not shadows:
            return func(*args, **kwargs)
        if _writes_in_place(func):
            return args[0] if func._schema.returns else None
        if shadows < len(given):
            args, kwargs = _shadow(args), dict(zip(kwargs, _shadow(list(kwargs.values())), strict=True))
        if not _returns_new(func):
            return _shadow(self._on_meta(func, args, kwargs))
        key = func, _key(args), _key(tuple(kwargs.items()))
        if known := self._layouts.get(key):
            kind, layouts = known
            new = [_shadow(_new(layout)) for layout in layouts]
            return kind(new) if kind is not Tensor else new[0]
        result = self._on_meta(func, args, kwargs)
        if key not in self._layouts:
            self._layouts[key] = _layouts(result, given)
        return _shadow(result)

    def _on_meta(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator's meta kernel returns."""
        if _takes_device(func):
            kwargs = {**kwargs, "device": _META}
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(True)
            result = func(*args, **kwargs)
            if func is _LAYER_NORM and self._device == "cpu" and args[2] is not None:
                # On the processor mean and deviation have the input's type; the meta kernel gives what CUDA has, fp32.
                return result[0], *(statistic.to(args[0].dtype) for statistic in result[1:])
            return result


@cache
def _writes_in_place(func: Any) -> bool:
    """Whether an operator changes its first argument's elements and nothing else; those that may resize it are not."""
    name = func._schema.name
    in_place = func.namespace == "aten" and name.endswith("_") and func._schema.is_mutable
    return in_place and torch.Tag.inplace_view not in func.tags and not name.endswith(("resize_", "set_", "resize_as_"))


@cache
def _returns_new(func: Any) -> bool:
    """Whether an operator says that it changes nothing and that its results are no views; of one that is not true."""
    aliases = any(result.alias_info for result in func._schema.returns) or func is _UNSAFE_VIEW
    return not func._schema.is_mutable and not aliases


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _shadow(value: Any) -> Any:
    """The same with shadows in the place of tensors."""
    if isinstance(value, Tensor):
        if type(value) is Shadow:
            return value
        if value.device != _META:
            value = _new((value.shape, value.stride(), value.dtype))
        return Tensor._make_subclass(Shadow, value, False, dispatch_device=True, device_for_backend_keys=_CPU)
    return type(value)(map(_shadow, value)) if isinstance(value, list | tuple) else value


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _key(value: Any) -> Hashable:
    """All of an argument that the layout of results may depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, type(value)
    if isinstance(value, list | tuple):
        return tuple([_key(item) for item in value])
    return type(value), value  # 1, 1.0 and True are equal, and promote differently


def _layouts(result: Any, given: Sequence[Tensor]) -> tuple[type, list[_Layout]] | None:
    """The layouts of what was returned, if those are new tensors, each with a storage of its own and no larger than it."""
    made = [result] if isinstance(result, Tensor) else result
    if not isinstance(made, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in made):
        return None
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in made}
    if len(storages) < len(made) or not storages.keys().isdisjoint(t.untyped_storage()._cdata for t in given):
        return None
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
    if list(storages.values()) != [_new(layout).untyped_storage().nbytes() for layout in layouts]:
        return None
    return Tensor if isinstance(result, Tensor) else type(result), layouts


def _new(layout: _Layout) -> Tensor:
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device=_META)
