"""Copies of the tasks that make an array, so that it is computed again instead of being kept in memory.

`dask.graph_manipulation.bind` does the same, but some versions of Dask fail to copy what `reshape` and `rechunk` made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import dask.array as da
from dask._task_spec import DataNode, Task, TaskRef, convert_legacy_graph
from dask.base import clone_key
from dask.blockwise import Blockwise
from dask.graph_manipulation import checkpoint
from dask.highlevelgraph import HighLevelGraph, Layer

from softk.backend import Array

__all__ = ["computed_again"]


def computed_again(array: Array, after: Array | None, seed: Hashable) -> Array:
    """The array, from copies of its tasks. Values that are in memory, or held by a cluster, are not copied.

    Parameters
    ----------
    array : dask.array.Array
        The array.
    after : dask.array.Array or None
        The copies do not start before this array is computed.
    seed : hashable
        What the keys of the copies are made from: other copies of the same array have another seed.
    """
    old = array.dask
    kept = {name for name, layer in old.layers.items() if not old.dependencies[name] and _has_values(layer)}
    first = None if after is None else checkpoint(after)
    wait = None if first is None else first.key
    known = old.get_all_external_keys()
    keys = known.difference(*(old.layers[name].get_output_keys() for name in kept))
    layers: dict[str, Any] = {} if first is None else dict(first.dask.layers)
    dependencies: dict[str, set[str]] = {} if first is None else dict(first.dask.dependencies)
    for name, layer in old.layers.items():
        if name in kept:
            layers[name], dependencies[name] = layer, set(old.dependencies[name])
            continue
        if isinstance(layer, Blockwise):
            copy, waits = layer.clone(keys=keys, seed=seed, bind_to=wait)
        else:
            copy, waits = _copy(dict(layer), known, keys, seed, wait), True
        new = clone_key(name, seed)
        layers[new] = copy
        dependencies[new] = {other if other in kept else clone_key(other, seed) for other in old.dependencies[name]}
        if waits and wait is not None:
            dependencies[new].add(wait)
    name = array.name if array.name in kept else clone_key(array.name, seed)
    return da.Array(HighLevelGraph(layers, dependencies), name, array.chunks, meta=array._meta)


def _has_values(layer: Layer) -> bool:
    """Whether a layer has values in the place of tasks: an array in memory, or what a cluster holds."""
    if isinstance(layer, Blockwise):
        return False
    # What a cluster holds is a reference, and none of the tasks.
    tasks = convert_legacy_graph(dict(layer), set(layer))
    return all(isinstance(task, DataNode) for task in tasks.values())


def _copy(tasks: dict[Any, Any], known: set[Any], keys: set[Any], seed: Hashable, wait: Any) -> dict[Any, Any]:
    """The tasks of a layer under new keys. `known` are the keys of the graph, and `keys` those that are copied.

    Tasks that need none that is copied start after `wait`.
    """
    found = {}
    for key, task in convert_legacy_graph(tasks, known).items():
        new = clone_key(key, seed)
        others = {other: clone_key(other, seed) for other in task.dependencies if other in keys}
        if wait is not None and isinstance(task, Task) and not others:
            found[new] = Task(new, _called_after, TaskRef(wait), task.func, *task.args, **task.kwargs)
        else:
            found[new] = task.substitute(others, key=new)
    return found


def _called_after(first: None, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)
