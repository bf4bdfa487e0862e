"""A model as its constructor left it, and new weights for it *staged*: beside those that it runs with.

`Staged` gives every module of a model that runs fresh parameters and buffers, with the constructor's values. They are
filled as those of a new model are. Up to `commit` what ran before is untouched, and `abandon` puts it back; `commit`
writes a module's new values into the tensors that it ran with, so that their addresses stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mxcore.engine.weights.evidence import Built
from mxcore.engine.weights.uninitialised import Unwritten, still_marked, unwritten
from mxcore.errors import LayoutMismatch, LayoutUnsupported

__all__ = ["Constructed", "Staged"]

MOST_VALUES_BYTES = 256 * 1024 * 1024
_NAMED = 5


@dataclass(frozen=True)
class _Form:
    """How to make a tensor again. `storage` is equal where memory is shared; `value` is None where none was given."""

    kind: type
    attributes: dict[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int
    storage_bytes: int
    offset: int
    value: torch.Tensor | None

    def fresh(self, device: torch.device, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        """A new tensor, the class and the attributes of the old one; memory is shared as it was."""
        storage = storages.get(self.storage)
        if storage is None:
            storage = torch.empty(self.storage_bytes, dtype=torch.uint8, device=device).untyped_storage()
            storages[self.storage] = storage
        made = torch.empty(0, dtype=self.dtype, device=device).set_(storage, self.offset, self.shape, self.stride)
        if self.value is not None:
            made.copy_(self.value)
        made.__class__ = self.kind
        made.__dict__.update(self.attributes)
        return made


@dataclass(frozen=True)
class _Module:
    """What a module had. `tensors` are those of its parameters and buffers, which may be None."""

    module: nn.Module
    parameters: dict[str, int | None]
    buffers: dict[str, int | None]
    persistent_not: set[str]
    modules: dict[str, nn.Module | None]


class Constructed:
    """A model's form and the constructor's values, taken before anything fills it (with `MarkUninitialised` around it).

    Costs host memory for the values: norms, rotary tables; not the matrices, which have none. `built` is what tells
    weights from other tensors. Not thread-safe. Raises LayoutUnsupported where a tensor has no memory yet, and where
    the values are more than MOST_VALUES_BYTES.
    """

    def __init__(self, model: nn.Module, device: torch.device, configuration: Sequence[object] = ()) -> None:
        self._forms: dict[int, _Form] = {}
        self._values_bytes = 0
        self._modules = [self._seen(module) for module in model.modules()]
        self.prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
        """What the names of a module's tensors begin with, by the module's id."""
        values = {
            (form.storage, form.offset, form.dtype, form.shape, form.stride): form.value
            for form in self._forms.values()
        }
        self.built = Built(
            model,
            device,
            configuration,
            copies=True,
            keeps_copies=True,
            copied=lambda tensor: values.get(_place(tensor)),
        )
        self._unwritten: dict[str, Unwritten] | None = None

    def _seen(self, module: nn.Module) -> _Module:
        tensors: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
        unvalued = still_marked(_plain(tensors))
        for name, tensor in tensors.items():
            if tensor is None or id(tensor) in self._forms:
                continue
            if not _is_plain(tensor):
                raise LayoutUnsupported(
                    f"{type(module).__name__}.{name} has no memory of its own while the model is built, so that it "
                    "cannot be made again: the weights of this model cannot be replaced while it runs"
                )
            is_valued = name not in unvalued
            self._values_bytes += tensor.nbytes * is_valued
            if self._values_bytes > MOST_VALUES_BYTES:
                raise LayoutUnsupported(
                    f"its constructor gives values to more than {MOST_VALUES_BYTES} bytes, which would be kept beside "
                    "it: the weights of this model cannot be replaced while it runs"
                )
            storage = tensor.untyped_storage()
            self._forms[id(tensor)] = _Form(
                type(tensor),
                vars(tensor).copy(),
                tensor.dtype,
                tuple(tensor.shape),
                tuple(tensor.stride()),
                storage.data_ptr() or id(tensor),
                storage.nbytes(),
                tensor.storage_offset(),
                tensor.detach().to("cpu", copy=True) if is_valued else None,
            )

        def ids(named: Mapping[str, torch.Tensor | None]) -> dict[str, int | None]:
            return {name: None if tensor is None else id(tensor) for name, tensor in named.items()}

        return _Module(
            module,
            ids(module._parameters),
            ids(module._buffers),
            set(module._non_persistent_buffers_set),
            dict(module._modules),
        )

    def filled(self, model: nn.Module) -> None:
        """After the first filling, from storage or with raw weights: what that left without a value, in whole or in
        part, others may leave so too."""
        self._unwritten = unwritten(_registered(model))

    def missing(self, model: nn.Module) -> list[str]:
        """Names of tensors that have no value, or a part that has none, where they had one after the first filling."""
        if (before := self._unwritten) is None:
            return []
        now = unwritten(_registered(model))
        return sorted(name for name, found in now.items() if found.is_more_than(before.get(name)))

    @contextmanager
    def names(self) -> Iterator[None]:
        """Within it the model's parts have the names that they had when it was built: wrappers (LoRA's) are away."""
        now = [(each.module, each.module.__dict__["_modules"]) for each in self._modules]
        for each in self._modules:
            each.module.__dict__["_modules"] = dict(each.modules)
        try:
            yield
        finally:
            for module, modules in now:
                module.__dict__["_modules"] = modules

    def stage(self, device: torch.device) -> Staged:
        """The model with fresh tensors on a device, in place of those that it has."""
        tensors: dict[int, torch.Tensor] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for key, form in self._forms.items():
            tensors[key] = form.fresh(device, storages)
        live = []
        for each in self._modules:
            state = vars(each.module)
            live.append((each.module, dict(state)))
            state["_parameters"] = {n: None if key is None else tensors[key] for n, key in each.parameters.items()}
            state["_buffers"] = {n: None if key is None else tensors[key] for n, key in each.buffers.items()}
            state["_non_persistent_buffers_set"] = set(each.persistent_not)
            state["_modules"] = dict(each.modules)
        return Staged(self, live)


class Staged:
    """A model with fresh tensors in its modules. End it by `commit` of every module, then `close`; or by `abandon`."""

    def __init__(self, constructed: Constructed, live: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        self._constructed = constructed
        self._live = live
        self._by_module = {id(module): state for module, state in live}
        self._as_built = {id(module): _buffer_values(module) for module, _state in live}

    @property
    def modules(self) -> list[nn.Module]:
        """All modules that the model had when it was built, in order."""
        return [module for module, _state in self._live]

    def require_filled(self, model: nn.Module) -> None:
        """Raises LayoutMismatch where a tensor that the first filling wrote has no value now, or not all of it."""
        if missing := self._constructed.missing(model):
            raise LayoutMismatch(
                f"the new version has no values for {len(missing)} tensors that the running one has, or for parts of "
                f"them: {missing[:_NAMED]}"
            )

    def require_ties(self) -> None:
        """Raises LayoutMismatch where the engine has tied tensors that are two in the new version, or may be."""
        owners: dict[int, tuple[str, torch.Tensor]] = {}
        for module, state in self._live:
            for name, live in state["_parameters"].items():
                fresh = module._parameters.get(name)
                if live is None or fresh is None or not live.numel() or live.shape != fresh.shape:
                    continue
                key = live.data_ptr()
                other = owners.setdefault(key, (f"{type(module).__name__}.{name}", fresh))
                if other[1].data_ptr() != fresh.data_ptr() and not torch.equal(_bytes_of(other[1]), _bytes_of(fresh)):
                    raise LayoutMismatch(
                        f"{other[0]} and {type(module).__name__}.{name} are one tensor in this engine, since its files "
                        "had the same values for both, and two in the new version: start the engine anew with it"
                    )

    def as_built(self, model: nn.Module) -> None:
        """Numbers and tensors beside parameters and buffers have the constructor's values again: the old version may
        have written what the new one leaves alone. From here on `abandon` does not bring the old version back."""
        found = self._constructed.built.look(model)
        registered = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self._constructed.built.put_back(found, set(registered), {})

    def commit(self, module: nn.Module, *, makes_more: bool = False) -> list[torch.Tensor]:
        """Writes a module's new values into the tensors that it ran with, and puts those in their place.

        With `makes_more` the module makes some of its tensors of others afterwards, by itself. Returns the tensors that
        the values came from. Raises LayoutMismatch where they came out in another form.
        """
        live = self._by_module[id(module)]
        state = vars(module)
        new_parameters, new_buffers = state["_parameters"], state["_buffers"]
        transient = live["_non_persistent_buffers_set"]
        _write(module, live["_parameters"], new_parameters, makes_more=makes_more)
        values = self._as_built[id(module)]
        prefix, by_loading = self._constructed.prefixes[id(module)], self._constructed.built.written or set()
        kept = {
            name
            for name, value in values.items()
            if name in transient
            and name in new_buffers
            and prefix + name not in by_loading
            and _same(new_buffers[name], value)
        }  # what only the constructor has valued: tables, and what the engine writes while it runs
        buffers = {name: buffer for name, buffer in live["_buffers"].items() if name not in kept}
        written = {name: buffer for name, buffer in new_buffers.items() if name not in kept}
        _write(module, buffers, written, makes_more=makes_more)
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            state[name] = live[name]
        return [tensor for tensor in (*new_parameters.values(), *new_buffers.values()) if tensor is not None]

    def close(self) -> None:
        """After every module was committed: wrappers are in their places again."""
        for module, state in self._live:
            vars(module)["_modules"] = state["_modules"]

    def abandon(self) -> None:
        """The modules are what they were, with the tensors that they ran with, whatever was staged. Idempotent."""
        for module, state in self._live:
            vars(module).clear()
            vars(module).update(state)


def _registered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that have memory."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return _plain(tensors)


def _plain(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None and _is_plain(tensor)}


def _place(tensor: torch.Tensor) -> tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """What two tensors that are views of the same values have in common."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        not tensor.is_meta
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not hasattr(tensor, "__tensor_flatten__")
        and not isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    )


def _buffer_values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers that are not part of checkpoints, as they are staged."""
    return {
        name: buffer.detach().clone()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    if one is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(_bytes_of(one), _bytes_of(other)))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _write(
    module: nn.Module, live: dict[str, Any], new: Mapping[str, torch.Tensor | None], *, makes_more: bool
) -> None:
    where = type(module).__name__
    names = {name for name, tensor in live.items() if tensor is not None}
    there = {name for name, tensor in new.items() if tensor is not None}
    if (missing := sorted(names - there)) and not makes_more:
        raise LayoutMismatch(f"{where} has {missing[:_NAMED]} and would not have it with the new weights")
    if (more := sorted(there - names)) and not makes_more:
        raise LayoutMismatch(f"{where} would have {more[:_NAMED]} with the new weights, which it has not now")
    for name in names & there:
        _copy(f"{where}.{name}", live[name], new[name])


def _copy(name: str, to: torch.Tensor, new: Any) -> None:
    if to.shape != new.shape or to.dtype != new.dtype:
        raise LayoutMismatch(
            f"{name} is {to.dtype} {tuple(to.shape)} and would be {new.dtype} {tuple(new.shape)} with the new weights"
        )
    with torch.no_grad():
        to.data.copy_(new.data)
    for key, value in vars(new).items():  # tensors on a tensor: scales, in some quantisations
        if isinstance(value, torch.Tensor):
            had = vars(to).get(key)
            if isinstance(had, torch.Tensor) and had.shape == value.shape and had.dtype == value.dtype:
                had.data.copy_(value.data)
            else:
                vars(to)[key] = value
        elif isinstance(value, float):
            vars(to)[key] = value
