"""One budget over a tree of arrays: a dictionary of a network's parameters, a list of layers, the heads of a cache.

The scores of all leaves form one slice, with one threshold. `topk` returns their masks in the containers of the tree.
"""

from ._functions.budget import threshold, topk

__all__ = ["threshold", "topk"]
