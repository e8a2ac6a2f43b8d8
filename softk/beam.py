"""Beam search through which gradients flow: one step, and a whole search around a user's step function.

A beam search keeps the best of all the continuations of its beams. Here they are kept by `softk.sorted_topk` over the
flattened axis of beams x vocabulary: row j of the assignment says of which continuations new beam j is made, so it also
mixes the tokens that are fed to the model and the states that the model carries. With ``hard=True`` each row is a
one-hot of the framework's own sort, and the same code is ordinary beam search.

Everything is written with the operators of softk and the Array API standard, so that the derivative is the framework's.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

from ._functions.checks import check_flag, require_array, working_dtype
from ._functions.ordering import sorted_topk
from ._functions.shapes import cast
from ._functions.signatures import explained, plain_tuple
from .backend import AnyArray, Array, ArrayT, backend_of, index_dtype, is_array

__all__ = ["Beams", "Step", "search", "step"]

#: Nested dictionaries, lists, tuples, named tuples and None, with arrays or numbers at the leaves.
Tree = Any


@plain_tuple
class Step(NamedTuple, Generic[ArrayT]):
    """What one step of a beam search keeps.

    Attributes
    ----------
    scores : array, (..., beams)
        The scores of the new beams, the best first; ``-inf`` for those that no continuation is left for.
    tokens : array, (..., beams, vocabulary)
        How much of each token a new beam appends: rows of sum 1, or 0 for a beam of score ``-inf``.
    parents : array, (..., beams, parents)
        How much of each old beam a new one continues: rows of sum 1 or 0 likewise.
    inputs : array, (..., beams, features)
        ``tokens @ table``, or the tokens where there is no table.
    states : tree of arrays, (..., beams, rest)
        The states of the old beams, mixed by the parents.
    """

    scores: ArrayT
    tokens: ArrayT
    parents: ArrayT
    inputs: ArrayT
    states: Tree


@plain_tuple
class Beams(NamedTuple, Generic[ArrayT]):
    """What a whole beam search finds: the n best sequences, the best first.

    Attributes
    ----------
    scores : array, (..., beams)
        What they are ranked by: the log-probability over the length penalty.
    log_probabilities : array, (..., beams)
        The sums of the log-probabilities of the tokens.
    tokens : array, (..., beams, length, vocabulary)
        The sequences, each token as its weights; after the end-of-sequence token there are more of it.
    lengths : array, (..., beams)
        The numbers of tokens, the end-of-sequence token included; floating, as soft beams mix lengths.
    parents : array, (..., length, beams, beams)
        The back-pointers of each step, as weights; before the last ranking.
    sequences : integer array, (..., beams, length)
        The heaviest of the tokens. It has no derivative.
    back_pointers : integer array, (..., length, beams)
        The heaviest of the parents. It has no derivative.
    states : tree of arrays, (..., beams, rest)
        The last states, mixed like everything else.
    """

    scores: ArrayT
    log_probabilities: ArrayT
    tokens: ArrayT
    lengths: ArrayT
    parents: ArrayT
    sequences: ArrayT
    back_pointers: ArrayT
    states: Tree


@explained
def step(
    scores: ArrayT,
    /,
    beams: int | None = None,
    *,
    table: AnyArray | None = None,
    states: Tree = None,
    epsilon: float | AnyArray = 0.1,
    hard: bool = False,
) -> Step[ArrayT]:
    """One step of a beam search: the best continuations, and what they are made of.

    Parameters
    ----------
    scores : array, (..., old, vocabulary)
        The score of each old beam continued by each token. ``-inf`` marks what must not be: the continuations of a beam
        that is not there, a token that is forbidden.
    beams : int, optional
        How many to keep; as many as there are parents unless given.
    table : array, (vocabulary, features), optional
        The embeddings of the tokens.
    states : tree of arrays, (..., old, rest), optional
        What the model carries for each beam: arrays in any nest of dictionaries, lists, tuples, named tuples and None.
        The leading axes are those of `scores`; an array without axes, or a number, holds for all beams and stays as it
        is. A soft step mixes the states of several beams, for which they must be of a real floating dtype; with
        ``hard=True`` a new beam has the state of its parent, of any dtype.
    epsilon : number or array, optional
        Strength of the entropy, as for `softk.sorted_topk`: scores further apart than a few epsilon are not mixed. An
        array broadcasts against the leading axes of `scores`, followed by one axis of size 1.
    hard : bool, optional
        Ordinary beam search: each new beam is one continuation, of equal ones the first. Gradients flow to the scores
        and states that are kept, none through the choice.

    Returns
    -------
    Step
        The new beams, of the dtype of `scores`; `inputs` of that of `table`, and each state of its own. A beam for
        which no continuation is left is ``-inf``, and everything else of it zero. What is in half precision is mixed
        in float32.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the form above, or as `softk.sorted_topk`.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4 (beam search).

    Examples
    --------
    Two beams and three tokens; the best continuation is the first beam's last token.

    >>> import numpy as np
    >>> import softk.beam
    >>> scores = np.asarray([[-3.0, -2.0, -1.0], [-5.0, -1.5, -4.0]])
    >>> found = softk.beam.step(scores, epsilon=0.2, states={"hidden": np.asarray([[1.0], [5.0]])})
    >>> found.scores.round(2).tolist()
    [-1.04, -1.5]
    >>> found.tokens.round(2).tolist()
    [[0.0, 0.07, 0.93], [0.0, 0.93, 0.07]]
    >>> found.states["hidden"].round(1).tolist()
    [[1.3], [4.4]]
    """
    check_flag("hard", hard)
    parents, vocabulary = _last_two("scores", scores)
    beams = parents if beams is None else _count("beams", beams)
    if beams > parents * vocabulary:
        raise ValueError(f"beams must be from 1 to {parents * vocabulary}, the number of continuations, got {beams!r}")
    backend = backend_of(scores)
    xp, dtype = backend.xp, scores.dtype
    batch = tuple(scores.shape[:-2])
    with backend.quiet(scores):
        flat = _widened("scores", xp.reshape(scores, (*batch, parents * vocabulary)))
        values, assignment = _hard_topk(flat, beams) if hard else sorted_topk(flat, beams, epsilon=epsilon)
        shares = xp.reshape(assignment, (*batch, beams, parents, vocabulary))
        tokens, of_parents = xp.sum(shares, axis=-2), xp.sum(shares, axis=-1)
        inputs = cast(xp, tokens, dtype) if table is None else _embed(tokens, table)
        states = _carried(of_parents, states, hard)
        return Step(cast(xp, values, dtype), cast(xp, tokens, dtype), cast(xp, of_parents, dtype), inputs, states)


@explained
def search(
    step_function: Callable[[Array, Tree], tuple[Array, Tree]],
    inputs: ArrayT,
    /,
    states: Tree = None,
    *,
    length: int,
    end: int,
    table: AnyArray | None = None,
    epsilon: float | AnyArray = 0.1,
    hard: bool = False,
    length_penalty: float = 0.0,
) -> Beams[ArrayT]:
    """A whole beam search, soft or hard, around a model's step function.

    All beams start alike, so the first alone is alive in the first step. A beam that has ended stays among the others
    with its score, and goes on with the end-of-sequence token, which costs it nothing. A soft beam can have ended in
    part, by the share f: its next token is distributed as 1 - f times the model's distribution, plus f at `end`.

    Parameters
    ----------
    step_function : callable
        ``step_function(inputs, states)`` gives the log-probabilities of the next token, (..., beams, vocabulary), and
        the new states. ``-inf`` forbids a token.
    inputs : array, (..., beams, features)
        What the step function is fed first; its shape says how many beams there are.
    states : tree of arrays, (..., beams, rest), optional
        The first states, as for `step`.
    length : int
        How many steps: the longest sequence. A Python number, as the steps are unrolled.
    end : int
        The end-of-sequence token.
    table : array, (vocabulary, features), optional
        The embeddings of the tokens. Without it the step function is fed the weights of the tokens themselves.
    epsilon, hard
        As for `step`.
    length_penalty : float, optional
        The exponent a of the penalty ((5 + length) / 6)^a by which the log-probabilities are divided for the last
        ranking; the search itself goes by log-probability.

    Returns
    -------
    Beams
        The n best sequences, n the number of beams, with lengths, back-pointers and last states; of the dtype of the
        log-probabilities, which are added up in float32 where they are in half precision.

    Raises
    ------
    TypeError, ValueError
        As `step`; also if `length`, `end` or `length_penalty` is not of the form above, or the log-probabilities are
        not of the shape above.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4 (beam search). The penalty: Wu
    et al., "Google's Neural Machine Translation System", arXiv:1609.08144, section 7.

    Examples
    --------
    A chain of three tokens, of which 0 ends the sequence; the step function is fed the weights of the last token.

    >>> import numpy as np
    >>> import softk.beam
    >>> chain = np.log(np.asarray([[0.1, 0.7, 0.2], [0.3, 0.1, 0.6], [0.8, 0.1, 0.1]]))
    >>> def next_token(last, states):
    ...     return last @ chain, states
    >>> start = np.asarray([[1.0, 0.0, 0.0]] * 2)
    >>> found = softk.beam.search(next_token, start, length=4, end=0, hard=True)
    >>> found.sequences.tolist()
    [[1, 2, 0, 0], [1, 0, 0, 0]]
    >>> found.lengths.tolist()
    [3.0, 2.0]
    >>> np.exp(found.log_probabilities).round(3).tolist()
    [0.336, 0.21]
    """
    check_flag("hard", hard)
    beams, _ = _last_two("inputs", inputs)
    length = _count("length", length)
    if not isinstance(length_penalty, numbers.Real) or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {length_penalty!r}")
    backend = backend_of(inputs)
    xp, device, batch = backend.xp, backend.device(inputs), tuple(inputs.shape[:-2])
    first = xp.reshape(xp.arange(beams, device=device) == 0, (1,) * len(batch) + (beams,))
    kept: list[Step[Any]] = []
    for _ in range(length):
        logs, states = step_function(inputs, states)
        _, vocabulary = _last_two("the log-probabilities of step_function", logs)
        if tuple(logs.shape[:-1]) != (*batch, beams):
            raise ValueError(
                f"the log-probabilities of step_function must be of shape {(*batch, beams)} + (vocabulary,), as inputs "
                f"is {tuple(inputs.shape)}, got {tuple(logs.shape)}"
            )
        dtype = logs.dtype
        with backend.quiet(logs):
            # In half precision a sum of log-probabilities would be rounded by more than two beams differ by.
            logs = _widened("the log-probabilities of step_function", logs)
            if not kept:
                if not 0 <= _integer("end", end) < vocabulary:
                    raise ValueError(f"end must be from 0 to {vocabulary - 1}, a token, got {end!r}")
                zeros = xp.zeros((*batch, beams), dtype=logs.dtype, device=device)
                scores, ended, lengths = xp.where(first, zeros, -math.inf), zeros, zeros
                is_end = xp.reshape(xp.arange(vocabulary, device=device) == end, (1,) * (logs.ndim - 1) + (vocabulary,))
            logs = _after_the_end(xp, logs, ended[..., None], is_end)
            found = step(scores[..., None] + logs, table=table, states=states, epsilon=epsilon, hard=hard)
            kept.append(found)
            scores, states = found.scores, found.states
            inputs = cast(xp, found.inputs, dtype) if table is None else found.inputs
            lengths = _take(found.parents, lengths + (1.0 - ended))
            ended = _ended(xp, found, end)
    with backend.quiet(scores):
        ranked, order = scores, None
        if length_penalty != 0.0:
            there = scores > -math.inf  # the quotient of an infinite score would have a derivative of NaN in the length
            ranked = xp.where(there, scores, xp.zeros_like(scores)) / ((5.0 + lengths) / 6.0) ** float(length_penalty)
            ranked = xp.where(there, ranked, -math.inf)
            ranked, order = _hard_topk(ranked, beams) if hard else sorted_topk(ranked, beams, epsilon=epsilon)
            scores, lengths = _take_scores(xp, order, scores), _take(order, lengths)
            states = _carried(order, states, hard)
        tokens = _histories(kept, order)
        parents = xp.stack([found.parents for found in kept], axis=-3)
        return Beams(
            cast(xp, ranked, dtype),
            cast(xp, scores, dtype),
            cast(xp, tokens, dtype),
            cast(xp, lengths, dtype),
            cast(xp, parents, dtype),
            xp.argmax(tokens, axis=-1),
            xp.argmax(parents, axis=-1),
            states,
        )


def _after_the_end(xp: Any, logs: Array, ended: Array, is_end: Array) -> Array:
    """log((1 - f) p + f [token is end]), f the share that has ended, with no derivative where it is infinite.

    Where a share is 0 the logarithm is taken of 1 instead and left out by `where`, whose derivative is 0 there.
    """
    some, rest = ended > 0.0, ended < 1.0
    log_rest = xp.where(rest, xp.log(xp.where(rest, 1.0 - ended, xp.ones_like(ended))), -math.inf)
    log_ended = xp.where(some, xp.log(xp.where(some, ended, xp.ones_like(ended))), -math.inf)
    going_on = log_rest + logs
    both = some & (going_on > -math.inf)
    zero = xp.zeros_like(going_on)
    total = xp.logaddexp(xp.where(both, going_on, zero), xp.where(both, log_ended + zero, zero))
    at_end = xp.where(both, total, xp.where(some, log_ended + zero, going_on))
    return xp.where(is_end, at_end, going_on)


def _ended(xp: Any, found: Step[Any], end: int) -> Array:
    """The share of each new beam that has ended.

    A beam that had ended has taken `end`, so `end`'s weight holds both shares; it rounds past 1 by an eps.
    """
    share = found.tokens[..., end]
    return xp.where(share < 1.0, share, xp.ones_like(share))


def _take(weights: Array, values: Array) -> Array:
    """One number a beam, mixed."""
    return (weights @ values[..., None])[..., 0]


def _take_scores(xp: Any, weights: Array, scores: Array) -> Array:
    """Scores mixed; those of ``-inf`` have no weight, and where there is nothing else it is ``-inf``."""
    there = scores > -math.inf
    mixed = _take(weights, xp.where(there, scores, xp.zeros_like(scores)))
    return xp.where(xp.sum(weights, axis=-1) > 0.0, mixed, -math.inf)


def _histories(kept: list[Step[Any]], order: Array | None) -> Array:
    """The tokens of the last beams, found by going back along the parents."""
    xp = backend_of(kept[-1].tokens).xp
    tokens, back = [], order
    for found in reversed(kept):
        tokens.append(found.tokens if back is None else back @ found.tokens)
        back = found.parents if back is None else back @ found.parents
    return xp.stack(tokens[::-1], axis=-2)


def _hard_topk(x: Array, k: int) -> tuple[Array, Array]:
    """`sorted_topk` in the limit, by the framework's own sort; of equal scores the first."""
    backend = backend_of(x)
    xp = backend.xp
    n = x.shape[-1]
    places = xp.argsort(-x, axis=-1, stable=True)[..., :k, None]
    order = xp.arange(n, dtype=places.dtype, device=backend.device(x))
    chosen = places == xp.reshape(order, (1,) * x.ndim + (n,))
    x = x[..., None, :]
    there = chosen & (x > -math.inf)
    values = xp.sum(xp.where(there, x, xp.zeros_like(x)), axis=-1)
    return xp.where(xp.any(there, axis=-1), values, -math.inf), cast(xp, there, x.dtype)


def _embed(tokens: Array, table: Array) -> Array:
    vocabulary = tokens.shape[-1]
    if not is_array(table) or table.ndim != 2 or table.shape[0] != vocabulary:
        got = tuple(table.shape) if is_array(table) else type(table).__name__
        raise ValueError(f"table must be an array of shape ({vocabulary}, features), a row for each token, got {got}")
    return _product(tokens, table)


def _product(weights: Array, values: Array) -> Array:
    """Values mixed, in their own dtype; in half precision, weights that are rounded would no longer sum to 1."""
    wide = working_dtype(backend_of(values).xp, values.dtype)
    return _cast(_cast(weights, wide) @ _cast(values, wide), values.dtype)


def _cast(values: Array, dtype: Any) -> Array:
    """By the library of the array itself: of autograd's, some are boxed and some are plain."""
    return cast(backend_of(values).xp, values, dtype)


def _carried(weights: Array, states: Tree, hard: bool) -> Tree:
    """The tree of states with each leaf, (..., parents, rest), made into (..., beams, rest)."""
    if states is None:
        return None
    if not hard:
        return _mapped(lambda name, leaf: _mixed(name, weights, leaf), "states", states)
    xp, parents = backend_of(weights).xp, weights.shape[-1]
    batch, beams = tuple(weights.shape[:-2]), weights.shape[-2]
    # The row of each new beam's parent among those of all batches.
    start = xp.arange(math.prod(batch), dtype=index_dtype(xp), device=backend_of(weights).device(weights))
    rows = xp.argmax(weights, axis=-1) + parents * xp.reshape(start, (*batch, 1))
    rows, there = xp.reshape(rows, (-1,)), xp.any(weights > 0.0, axis=-1)

    def of_parent(name: str, leaf: Array) -> Array:
        rest, xp = _rest(name, weights, leaf), backend_of(leaf).xp
        taken = xp.take(xp.reshape(leaf, (-1, math.prod(rest))), rows, axis=0)
        taken = xp.reshape(taken, (*batch, beams, *rest))
        zero = False if xp.isdtype(leaf.dtype, "bool") else 0
        return xp.where(xp.reshape(there, (*batch, beams, *(1,) * len(rest))), taken, zero)

    return _mapped(of_parent, "states", states)


def _mapped(function: Callable[[str, Array], Array], name: str, tree: Tree) -> Tree:
    """The tree with a function of its name and itself in the place of each array that the beams do not share."""
    if tree is None or isinstance(tree, numbers.Number):
        return tree
    if isinstance(tree, dict):
        mapped = copy.copy(tree)  # a dictionary of the same kind
        mapped.update((key, _mapped(function, f"{name}[{key!r}]", branch)) for key, branch in tree.items())
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        pairs = zip(tree._fields, tree, strict=True)
        return type(tree)(*(_mapped(function, f"{name}.{field}", branch) for field, branch in pairs))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(function, f"{name}[{i}]", branch) for i, branch in enumerate(tree))
    if not is_array(tree):
        raise TypeError(
            f"{name} must be an array, a number, None, or a dictionary, list or tuple of them, "
            f"got {type(tree).__name__}"
        )
    return tree if tree.ndim == 0 else function(name, tree)


def _mixed(name: str, weights: Array, leaf: Array) -> Array:
    xp = backend_of(weights).xp
    if not xp.isdtype(leaf.dtype, "real floating"):
        raise TypeError(
            f"{name} must be of a real floating dtype, for a soft step mixes the states of several beams, got "
            f"{leaf.dtype}; convert it, leave it out of states, or use hard=True, which takes that of one beam"
        )
    rest = _rest(name, weights, leaf)
    rows = xp.reshape(leaf, (*weights.shape[:-2], weights.shape[-1], math.prod(rest)))
    return xp.reshape(_product(weights, rows), (*weights.shape[:-1], *rest))


def _rest(name: str, weights: Array, leaf: Array) -> tuple[int, ...]:
    """The axes of a leaf behind those of the beams."""
    wanted = (*weights.shape[:-2], weights.shape[-1])
    if tuple(leaf.shape[: len(wanted)]) != wanted:
        raise ValueError(f"{name} must have the first axes {wanted}, or none at all, got shape {tuple(leaf.shape)}")
    return tuple(leaf.shape[len(wanted) :])


def _widened(name: str, scores: Array) -> Array:
    """Scores in the dtype that they are computed in, float32 at least."""
    xp = backend_of(scores).xp
    if not xp.isdtype(scores.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating-point, got dtype {scores.dtype}")
    return cast(xp, scores, working_dtype(xp, scores.dtype))


def _last_two(name: str, x: Array) -> tuple[int, int]:
    require_array(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least two axes, (..., beams, rest), got shape {tuple(x.shape)}")
    return int(x.shape[-2]), int(x.shape[-1])


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, got {value!r}")
    return int(value)


def _count(name: str, value: Any) -> int:
    if _integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return int(value)
