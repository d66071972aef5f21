"""What a public function does first: places of arrays, tracers, JAX's settings."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from lore_jax import _checks

P = ParamSpec("P")

R = TypeVar("R")


# NaN is the documented value of users without pairs, and masked branches may hold it:
# inputs are checked instead. Promotion follows JAX's default.
_SETTINGS = {
    "numpy_dtype_promotion": "standard",
    "debug_nans": False,
    "debug_infs": False,
}


def public(
    instead: str | None = None, over_mesh: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function.

    Arrays that span processes are refused. Arrays with Explicit axes become arrays
    with Auto axes over the same buffers, because gathers from Explicit axes need an
    output sharding. Strict promotion and the NaN and infinity checks of JAX are off
    inside.

    Args:
      instead: what to use under `jit`, `grad` and `vmap`, of a function that works on
        the host; None where the function itself can be transformed.
      over_mesh: whether arrays that span processes are admitted beside a `mesh`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            arguments = [*enumerate(args), *kwargs.items()]
            changed, spans = {}, over_mesh and kwargs.get("mesh") is not None
            for place, value in arguments:
                name = functools.partial(_name, function, place)
                new = _admit(value, name, instead and (function, instead), spans)
                if new is not value:
                    changed[place] = new
            if changed:
                args = tuple(changed.get(i, x) for i, x in enumerate(args))  # pyright: ignore[reportAssignmentType]
                kwargs = {k: changed.get(k, x) for k, x in kwargs.items()}  # pyright: ignore[reportAssignmentType]
            with _settings():
                return function(*args, **kwargs)

        return wrapped

    return decorate


def _name(function, place: int | str) -> str:
    """The parameter that an argument at this position is bound to."""
    if isinstance(place, str):
        return place
    names = list(inspect.signature(function).parameters)
    return names[min(place, len(names) - 1)]


def _admit(value: Any, name: Callable[[], str], host_only, spans: bool) -> Any:
    """The argument, with Auto axes; raises as `public` says."""
    if isinstance(value, jax.Array):
        leaves = [("", value)]
    elif _is_record(value):
        paths = jax.tree_util.tree_leaves_with_path(value)
        leaves = [(path, x) for path, x in paths if isinstance(x, jax.Array)]
    else:
        return value
    explicit = False
    for path, leaf in leaves:
        if _checks.is_traced(leaf):
            if host_only:
                function, instead = host_only
                raise TypeError(
                    f"{function.__qualname__} works on the host, and "
                    f"{name()}{_keystr(path)} is traced by jit, grad or vmap; there, "
                    f"use {instead}"
                )
            continue
        if not leaf.is_fully_addressable:
            if not spans:
                _checks.check_local(leaf, name() + _keystr(path))
            continue  # Only its shards are looked at.
        explicit |= _has_explicit_axes(leaf)
    return jax.tree.map(_with_auto_axes, value) if explicit else value


def _is_record(value) -> bool:
    """True for the records of this library, whose fields may be arrays."""
    return hasattr(value, "_fields") or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def _keystr(path) -> str:
    return jax.tree_util.keystr(path) if path else ""


def _has_explicit_axes(leaf: jax.Array) -> bool:
    sharding = leaf.sharding
    return isinstance(sharding, NamedSharding) and _is_explicit(sharding.mesh)


def _is_explicit(mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _auto(mesh: Any) -> Mesh:
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _with_auto_axes(leaf):
    if _checks.is_traced(leaf) or not isinstance(leaf, jax.Array):
        return leaf
    if not leaf.is_fully_addressable or not _has_explicit_axes(leaf):
        return leaf
    sharding: Any = leaf.sharding
    placed = NamedSharding(
        _auto(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind
    )
    return jax.device_put(leaf, placed)  # Shares the buffers: nothing is copied.


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in _SETTINGS.items():
            if getattr(jax.config, f"jax_{name}") != value:
                stack.enter_context(getattr(jax, name)(value))
        # A mesh that `jax.set_mesh` made current must have the axes of the arrays.
        if _is_explicit(jax.sharding.get_abstract_mesh()):
            with contextlib.suppress(ValueError):  # While tracing, it stays.
                stack.enter_context(jax.set_mesh(_auto(jax.sharding.get_mesh())))
        yield
