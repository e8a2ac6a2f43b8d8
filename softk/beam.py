"""Differentiable beam search: a single step, and a whole search around a user's step function.

A beam search keeps the best of all continuations of its beams. Here `softk.sorted_topk` selects them over the flattened
axis of beams x vocabulary. Row j of the assignment has the weights of the continuations in the new beam j. The same
weights mix the tokens that are fed to the model and the states of the model. With ``hard=True`` each row is one-hot,
from the framework's own sort, and the same code is ordinary beam search.

The code uses only softk's operators and the Array API standard, so the framework's autodiff differentiates it.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

from ._functions.checks import check_count, check_flag, check_integer, require_array, working_dtype
from ._functions.ordering import sorted_topk
from ._functions.shapes import cast
from ._functions.signatures import explained, plain_tuple
from .backend import AnyArray, Array, ArrayT, backend_of, index_dtype, is_array

__all__ = ["Beams", "Step", "search", "step"]

#: Nested dictionaries, lists, tuples, named tuples and None, with arrays or numbers at the leaves.
Tree = Any


@plain_tuple
class Step(NamedTuple, Generic[ArrayT]):
    """The result of one step of a beam search.

    Attributes
    ----------
    scores : array, (..., beams)
        The scores of the new beams, the best first. A beam for which no continuation is left has the score ``-inf``.
    tokens : array, (..., beams, vocabulary)
        The weight of each token in a new beam. Rows sum to 1, or to 0 for a beam of score ``-inf``.
    parents : array, (..., beams, parents)
        The weight of each old beam in a new beam. Rows sum to 1, or to 0 for a beam of score ``-inf``.
    inputs : array, (..., beams, features)
        ``tokens @ table``, or `tokens` without a table.
    states : tree of arrays, (..., beams, rest)
        The states of the old beams, mixed with the weights in `parents`.
    """

    scores: ArrayT
    tokens: ArrayT
    parents: ArrayT
    inputs: ArrayT
    states: Tree


@plain_tuple
class Beams(NamedTuple, Generic[ArrayT]):
    """The result of a beam search: the best sequences, one per beam, the best first.

    Attributes
    ----------
    scores : array, (..., beams)
        The scores that rank the sequences: the log-probability divided by the length penalty.
    log_probabilities : array, (..., beams)
        The sums of the log-probabilities of the tokens.
    tokens : array, (..., beams, length, vocabulary)
        The sequences, with each token as weights over the vocabulary. Sequences are padded with the end-of-sequence
        token.
    lengths : array, (..., beams)
        The number of tokens, including the first end-of-sequence token. Floating-point, because soft beams mix lengths.
    parents : array, (..., length, beams, beams)
        The back-pointers of each step, as weights, before the final ranking.
    sequences : integer array, (..., beams, length)
        The token of the largest weight at each position. It has no derivative.
    back_pointers : integer array, (..., length, beams)
        The parent of the largest weight in each step. It has no derivative.
    states : tree of arrays, (..., beams, rest)
        The final states, mixed with the same weights.
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
    """One step of a beam search: select the best continuations and mix tokens, parents and states accordingly.

    Parameters
    ----------
    scores : array, (..., old, vocabulary)
        The score of each old beam continued by each token. ``-inf`` marks forbidden continuations: forbidden tokens,
        and all continuations of an empty beam.
    beams : int, optional
        The number of new beams; by default the number of old beams.
    table : array, (vocabulary, features), optional
        The embeddings of the tokens.
    states : tree of arrays, (..., old, rest), optional
        The states of the model, one per beam: arrays, nested in dictionaries, lists, tuples, named tuples and None. The
        leading axes are those of `scores`. A number, or an array without axes, is shared by all beams and returned
        unchanged. A soft step mixes the states of several beams, so they must have a real floating dtype. With
        ``hard=True`` a new beam gets the state of its parent, of any dtype.
    epsilon : number or array, optional
        Strength of the entropy, as for `softk.sorted_topk`: scores further apart than a few epsilon are not mixed. An
        array broadcasts against the leading axes of `scores`, followed by one axis of size 1.
    hard : bool, optional
        Ordinary beam search: each new beam is a single continuation; ties go to the first. Gradients flow to the
        selected scores and states, but not through the selection.

    Returns
    -------
    Step
        The new beams, with the dtype of `scores`. `inputs` has the dtype of `table`, and each state keeps its dtype. A
        beam for which no continuation is left has the score ``-inf``, and its other results are zero. Half-precision
        values are mixed in float32.

    Raises
    ------
    TypeError, ValueError
        If an argument does not have the form above; also as `softk.sorted_topk`.

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
    beams = parents if beams is None else check_count("beams", beams)
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

    All beams start from the same state, so only the first beam is active in the first step. A beam that has ended stays
    among the others with its score: it continues with the end-of-sequence token at log-probability 0. A soft beam can
    have ended partially, with share f. Its next token is then distributed as 1 - f times the model's distribution, plus
    f at `end`.

    Parameters
    ----------
    step_function : callable
        ``step_function(inputs, states)`` returns the log-probabilities of the next token, (..., beams, vocabulary), and
        the new states. ``-inf`` forbids a token.
    inputs : array, (..., beams, features)
        The input of the first call of the step function. Its shape determines the number of beams.
    states : tree of arrays, (..., beams, rest), optional
        The initial states, as for `step`.
    length : int
        The number of steps, which is the largest length of a sequence. A Python integer, because the steps are
        unrolled.
    end : int
        The end-of-sequence token.
    table : array, (vocabulary, features), optional
        The embeddings of the tokens. Without it the step function gets the weights of the tokens.
    epsilon, hard
        As for `step`.
    length_penalty : float, optional
        The exponent a of the penalty ((5 + length) / 6)^a. The final ranking divides the log-probabilities by it; the
        search itself uses the log-probabilities.

    Returns
    -------
    Beams
        The best sequences, one per beam, with lengths, back-pointers and final states. They have the dtype of the
        log-probabilities. Half-precision log-probabilities are summed in float32.

    Raises
    ------
    TypeError, ValueError
        As `step`; also if `length`, `end` or `length_penalty` does not have the form above, or the log-probabilities
        do not have the shape above.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4 (beam search). The penalty: Wu
    et al., "Google's Neural Machine Translation System", arXiv:1609.08144, section 7.

    Examples
    --------
    A Markov chain of three tokens, where token 0 ends the sequence. The step function gets the weights of the last
    token.

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
    length = check_count("length", length)
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
            # In half precision the rounding of a sum of log-probabilities exceeds the difference between beams.
            logs = _widened("the log-probabilities of step_function", logs)
            if not kept:
                if not 0 <= check_integer("end", end) < vocabulary:
                    raise ValueError(f"end must be from 0 to {vocabulary - 1}, a token, got {end!r}")
                zeros = xp.zeros((*batch, beams), dtype=logs.dtype, device=device)
                scores, ended, lengths = xp.where(first, zeros, -math.inf), zeros, zeros
                is_end = xp.reshape(xp.arange(vocabulary, device=device) == end, (1,) * (logs.ndim - 1) + (vocabulary,))
            logs = _after_the_end(xp, logs, ended[..., None], is_end)
            found = step(scores[..., None] + logs, table=table, states=states, epsilon=epsilon, hard=hard)
            kept.append(found)
            scores, states = found.scores, found.states
            inputs = cast(xp, found.inputs, dtype) if table is None else found.inputs
            # The share of a beam that had ended before does not grow longer.
            lengths = _take(found.parents, lengths + (1.0 - ended))
            ended = _ended(xp, found, end)
    with backend.quiet(scores):
        ranked, order = scores, None
        if length_penalty != 0.0:
            there = scores > -math.inf  # an infinite score over the penalty would have a NaN derivative in the length
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
    """log((1 - f) p + f [token is end]), where f is the share that has ended. The derivative is 0 where it is infinite.

    A logarithm of 0 would give NaN derivatives, so the logarithm of 1 is taken there and discarded by ``where``.
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

    A beam that had ended before continues with `end`, so the weight of `end` is the share that has ended before or now.
    Its rounding may exceed 1, so it is clipped.
    """
    share = found.tokens[..., end]
    return xp.where(share < 1.0, share, xp.ones_like(share))


def _take(weights: Array, values: Array) -> Array:
    """Mix one number per beam."""
    return (weights @ values[..., None])[..., 0]


def _take_scores(xp: Any, weights: Array, scores: Array) -> Array:
    """Mix scores. A score of ``-inf`` is skipped, as its weight is 0; a row of weights without any gives ``-inf``."""
    there = scores > -math.inf
    mixed = _take(weights, xp.where(there, scores, xp.zeros_like(scores)))
    return xp.where(xp.sum(weights, axis=-1) > 0.0, mixed, -math.inf)


def _histories(kept: list[Step[Any]], order: Array | None) -> Array:
    """The tokens of the final beams, traced back along the parents."""
    xp = backend_of(kept[-1].tokens).xp
    tokens, back = [], order
    for found in reversed(kept):
        tokens.append(found.tokens if back is None else back @ found.tokens)
        back = found.parents if back is None else back @ found.parents
    return xp.stack(tokens[::-1], axis=-2)


def _hard_topk(x: Array, k: int) -> tuple[Array, Array]:
    """The exact counterpart of `sorted_topk`, by the framework's own sort. Of equal scores the first is selected."""
    backend = backend_of(x)
    xp = backend.xp
    n = x.shape[-1]
    # A stable sort of -x keeps equal scores in their order, which a descending sort need not do.
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
        raise ValueError(f"table must be an array of shape ({vocabulary}, features), one row per token, got {got}")
    return _product(tokens, table)


def _product(weights: Array, values: Array) -> Array:
    """Mix values, in float32 at least: in half precision the rounded weights would no longer sum to 1."""
    wide = working_dtype(backend_of(values).xp, values.dtype)
    return _cast(_cast(weights, wide) @ _cast(values, wide), values.dtype)


def _cast(values: Array, dtype: Any) -> Array:
    """Cast by the array's own backend, because boxed and plain arrays of autograd may be mixed."""
    return cast(backend_of(values).xp, values, dtype)


def _carried(weights: Array, states: Tree, hard: bool) -> Tree:
    """The states of the new beams: each leaf (..., parents, rest) is mixed, or taken, to (..., beams, rest)."""
    if states is None:
        return None
    if not hard:
        return _mapped(lambda name, leaf: _mixed(name, weights, leaf), "states", states)
    xp, parents = backend_of(weights).xp, weights.shape[-1]
    batch, beams = tuple(weights.shape[:-2]), weights.shape[-2]
    # The index of each new beam's parent among the parents of all batch elements.
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
    """Apply ``function(name, leaf)`` to each array with axes. Numbers and arrays without axes stay as they are."""
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
            f"{name} must be of a real floating dtype, because a soft step mixes the states of several beams, got "
            f"{leaf.dtype}; convert it, leave it out of states, or use hard=True, which takes the state of one beam"
        )
    rest = _rest(name, weights, leaf)
    rows = xp.reshape(leaf, (*weights.shape[:-2], weights.shape[-1], math.prod(rest)))
    return xp.reshape(_product(weights, rows), (*weights.shape[:-1], *rest))


def _rest(name: str, weights: Array, leaf: Array) -> tuple[int, ...]:
    """The axes of a leaf after the axis of the beams."""
    wanted = (*weights.shape[:-2], weights.shape[-1])
    if tuple(leaf.shape[: len(wanted)]) != wanted:
        raise ValueError(f"{name} must have the first axes {wanted}, or none at all, got shape {tuple(leaf.shape)}")
    return tuple(leaf.shape[len(wanted) :])


def _widened(name: str, scores: Array) -> Array:
    """The scores in the dtype of the computation, float32 at least."""
    xp = backend_of(scores).xp
    if not xp.isdtype(scores.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating-point, got dtype {scores.dtype}")
    return cast(xp, scores, working_dtype(xp, scores.dtype))


def _last_two(name: str, x: Array) -> tuple[int, int]:
    require_array(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least two axes, (..., beams, rest), got shape {tuple(x.shape)}")
    return int(x.shape[-2]), int(x.shape[-1])
