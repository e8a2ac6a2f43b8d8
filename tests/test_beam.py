"""The beam search: its step and the whole, soft and hard, on every array library, beside searches written out."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

import softk
import softk.beam

from .libraries import BY_NAME, Library
from .test_errors import complains

INF = math.inf
BEAMS, VOCABULARY, FEATURES, LENGTH, END = 3, 5, 4, 4, 0
SHORT = 2  # what JAX compiles: every step is another copy of the whole solver


class Model(NamedTuple):
    """A little recurrent model over the tokens; the state is a tree."""

    start: Any  # (words, beams, features)
    state: Any  # (words, beams, features)
    recur: Any  # (features, features)
    out: Any  # (features, vocabulary)
    table: Any  # (vocabulary, features)
    forbidden: Any  # (vocabulary,): 0, or -inf


def model(seed: int = 0, words: int = 2) -> Model:
    rng = np.random.default_rng(seed)
    once = rng.normal(size=(2, words, 1, FEATURES)) + np.zeros((BEAMS, 1))
    forbidden = np.zeros(VOCABULARY)
    forbidden[3] = -INF
    return Model(
        once[0],
        once[1],
        rng.normal(size=(FEATURES, FEATURES)),
        2.0 * rng.normal(size=(FEATURES, VOCABULARY)),
        1.5 * rng.normal(size=(VOCABULARY, FEATURES)),
        forbidden,
    )


def search(given: Model, **options: Any) -> softk.beam.Beams:
    """The search of softk over the model, on any library."""
    from softk.backend import backend_of

    xp = backend_of(given.start).xp

    def next_token(inputs: Any, states: Any) -> tuple[Any, Any]:
        hidden = xp.tanh(inputs + states["hidden"][0] @ given.recur)
        logits = hidden @ given.out
        logits = logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))
        return logits + xp.reshape(given.forbidden, (1, 1, VOCABULARY)), {"hidden": [hidden, None], "none": ()}

    states = {"hidden": [given.state, None], "none": ()}
    options = {"length": LENGTH, "end": END, "table": given.table, **options}
    return softk.beam.search(next_token, given.start, states, **options)


#: The arrays of `Beams`, without the states.
ARRAYS = softk.beam.Beams._fields[:-1]


def found(lib: Library, given: Model, **options: Any) -> dict[str, np.ndarray]:
    """The search on a library, brought back."""

    def run(*arrays: Any) -> Any:
        result = search(Model(*arrays), **options)
        return (*result[:-1], result.states["hidden"][0])

    values = lib.call(run, *(lib.array(value) for value in given))
    return dict(zip((*ARRAYS, "states"), (lib.numpy(value) for value in values), strict=True))


class Hypothesis(NamedTuple):
    """One beam of the search that is written out below."""

    score: float
    tokens: list[int]
    pointers: list[int]
    ended: bool
    hidden: np.ndarray
    inputs: np.ndarray


def written_out(given: Model, word: int, length_penalty: float, length: int = LENGTH) -> list[tuple[float, Hypothesis]]:
    """Ordinary beam search in plain Python, for one word: hypotheses with what they are ranked by."""
    beams = [Hypothesis(0.0, [], [], False, given.state[word, 0], given.start[word, 0])]
    for _ in range(length):
        candidates = []
        for i, old in enumerate(beams):
            hidden = np.tanh(old.inputs + old.hidden @ given.recur)
            logits = hidden @ given.out
            logs = logits - np.log(np.sum(np.exp(logits))) + given.forbidden
            for token in range(VOCABULARY):
                gain = logs[token] if not old.ended else (0.0 if token == END else -INF)
                if gain > -INF:
                    tokens, ended = [*old.tokens, token], old.ended or token == END
                    new = (old.score + gain, tokens, [*old.pointers, i], ended, hidden, given.table[token])
                    candidates.append(Hypothesis(*new))
        beams = sorted(candidates, key=lambda one: -one.score)[:BEAMS]
    ranked = [(one.score / ((5 + size(one.tokens)) / 6) ** length_penalty, one) for one in beams]
    return sorted(ranked, key=lambda pair: -pair[0])


def size(tokens: list[int]) -> int:
    return tokens.index(END) + 1 if END in tokens else len(tokens)


@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
@pytest.mark.parametrize("epsilon", [None, 1e-5], ids=["hard", "epsilon to 0"])
def test_ordinary_beam_search(lib: Library, epsilon: float | None, length_penalty: float) -> None:
    """The hard search and the limit of the soft one: scores, tokens, lengths, back-pointers, order and states."""
    if lib.name == "jax" or (lib.name in ("jax-jit", "dask") and length_penalty == 0.0):
        pytest.skip("a graph takes too long to make; run with a penalty, JAX with jit")
    given = model()
    options: dict[str, Any] = {"hard": True} if epsilon is None else {"epsilon": epsilon}
    length = SHORT if "jax" in lib.name else LENGTH
    answer = found(lib, given, length_penalty=length_penalty, length=length, **options)
    for word in range(2):
        wanted = written_out(given, word, length_penalty, length)
        np.testing.assert_allclose(answer["scores"][word], [score for score, _ in wanted], rtol=0, atol=1e-11)
        logs = [one.score for _, one in wanted]
        np.testing.assert_allclose(answer["log_probabilities"][word], logs, rtol=0, atol=1e-11)
        np.testing.assert_array_equal(answer["sequences"][word], [one.tokens for _, one in wanted])
        one_hot = np.eye(VOCABULARY)[[one.tokens for _, one in wanted]]
        np.testing.assert_allclose(answer["tokens"][word], one_hot, rtol=0, atol=1e-11)
        np.testing.assert_allclose(answer["lengths"][word], [size(one.tokens) for _, one in wanted], rtol=0, atol=1e-11)
        before = sorted((one for _, one in wanted), key=lambda one: -one.score)
        np.testing.assert_array_equal(answer["back_pointers"][word, -1], [one.pointers[-1] for one in before])
        np.testing.assert_allclose(answer["states"][word], [one.hidden for _, one in wanted], rtol=0, atol=1e-11)
        follow = np.arange(BEAMS)
        for pointers in answer["back_pointers"][word, ::-1]:
            follow = pointers[follow]
        np.testing.assert_array_equal(follow, np.zeros(BEAMS))  # all descend from the one beam of the start


def test_the_cases_above_say_something() -> None:
    """The penalty changes an order, beams end at different lengths, and back-pointers cross."""
    plain, other = ([one.tokens for _, one in written_out(model(), 1, penalty)] for penalty in (0.0, 1.5))
    both = [one for word in range(2) for _, one in written_out(model(), word, 0.0)]
    assert len({size(one.tokens) for one in both}) > 1
    assert any(one.pointers[-1] != 0 for one in both)
    first = [[one.tokens for _, one in written_out(model(), 0, penalty)] for penalty in (0.0, 1.5)]
    assert plain != other or first[0] != first[1]


def test_all_sequences_are_searched_when_the_beam_is_wide() -> None:
    """With as many beams as there are sequences, the n best are the n most probable of all."""
    logs = np.log(np.random.default_rng(3).dirichlet(np.ones(3), size=3))
    beams = 27
    start = np.zeros((beams, 3))
    start[:, 1] = 1.0
    answer = softk.beam.search(lambda last, states: (last @ logs, states), start, length=3, end=0, hard=True)
    totals = {}
    for tokens in itertools.product(range(3), repeat=3):
        total, last = 0.0, 1
        for place, token in enumerate(tokens):
            total, last = total + logs[last, token], token
            if token == 0:
                totals[tokens[: place + 1]] = total
                break
        else:
            totals[tokens] = total
    wanted = sorted(totals.items(), key=lambda item: -item[1])
    np.testing.assert_allclose(answer.scores[: len(wanted)], [total for _, total in wanted], rtol=0, atol=1e-12)
    assert [tuple(row)[:n] for row, n in zip(answer.sequences.tolist(), map(int, answer.lengths), strict=True)][
        : len(wanted)
    ] == [tokens for tokens, _ in wanted]
    np.testing.assert_array_equal(answer.scores[len(wanted) :], -INF)  # there are no more sequences
    np.testing.assert_array_equal(answer.tokens[len(wanted) :], 0.0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_libraries_agree(lib: Library, dtype: str) -> None:
    """A soft search, far from the limit, is that of NumPy."""
    if "jax" in lib.name or (lib.name == "dask" and dtype == "float32"):
        pytest.skip("a graph takes too long to make; JAX's numbers are compared with its derivatives")
    given = Model(*(value.astype(dtype) for value in model()))
    answer = found(lib, given, epsilon=1.0, length_penalty=0.7)
    wanted = found(BY_NAME["numpy"], model(), epsilon=1.0, length_penalty=0.7)
    for name in ("scores", "log_probabilities", "tokens", "lengths", "parents", "states"):
        assert answer[name].dtype == dtype
        assert answer[name].shape == wanted[name].shape
        np.testing.assert_allclose(answer[name], wanted[name], rtol=0, atol=1e-12 if dtype == "float64" else 2e-5)
    np.testing.assert_allclose(answer["tokens"].sum(axis=-1), 1.0, rtol=0, atol=1e-5)
    assert 0.01 < np.max(answer["tokens"][..., 0, :], axis=-1).min() < 0.99  # and soft it is


# --- derivatives


def weighed(given: Model, cotangents: list[Any], **options: Any) -> Any:
    """A number that every differentiable result enters."""
    from softk.backend import backend_of

    xp = backend_of(given.start).xp
    answer = search(given, **options)
    parts = (answer.scores, answer.log_probabilities, answer.tokens, answer.lengths, answer.states["hidden"][0])
    return sum(xp.sum(part * cotangent) for part, cotangent in zip(parts, cotangents, strict=True))


def differentiated(
    library: str, given: Model, cotangents: list[np.ndarray], **options: Any
) -> tuple[float, list[np.ndarray]]:
    """`weighed` and its derivatives, by the framework; by JAX under jit."""
    lib = BY_NAME[library]
    lib.require()
    arrays = [lib.array(value) for value in given]
    weights = [lib.array(value) for value in cotangents]
    if library == "torch":
        for array in arrays:
            array.requires_grad_(True)
        value = weighed(Model(*arrays), weights, **options)
        value.backward()
        return float(value.detach()), [array.grad.numpy() for array in arrays]
    import jax

    value, found = jax.jit(jax.value_and_grad(lambda values: weighed(Model(*values), weights, **options)))(arrays)
    return float(value), [np.asarray(gradient) for gradient in found]


@pytest.mark.parametrize(
    ("library", "epsilon", "length", "length_penalty"),
    [("torch", 1.0, LENGTH, 0.7), ("torch", 0.05, LENGTH, 0.7), ("jax", 0.5, SHORT, 0.0)],
)
def test_derivatives_are_difference_quotients(
    library: str, epsilon: float, length: int, length_penalty: float, rng: np.random.Generator
) -> None:
    """Of every result in every input; also nearly hard, where a token is forbidden and all but one beam are dead."""
    given = model()
    words = given.start.shape[0]
    shapes = [(words, BEAMS), (words, BEAMS), (words, BEAMS, length, VOCABULARY), (words, BEAMS)]
    cotangents = [rng.normal(size=shape) for shape in (*shapes, (words, BEAMS, FEATURES))]
    options = {"epsilon": epsilon, "length": length, "length_penalty": length_penalty}
    value, found = differentiated(library, given, cotangents, **options)
    assert value == pytest.approx(weighed(given, cotangents, **options), rel=1e-12, abs=1e-12)
    assert all(np.all(np.isfinite(gradient)) for gradient in found)
    step = 1e-5 * epsilon
    for place in range(5):  # not the forbidden tokens: they are infinite
        direction = rng.normal(size=given[place].shape)
        ahead, behind = (
            weighed(given._replace(**{Model._fields[place]: given[place] + moved * direction}), cotangents, **options)
            for moved in (step, -step)
        )
        wanted = (ahead - behind) / (2.0 * step)
        assert np.sum(found[place] * direction) == pytest.approx(wanted, rel=1e-6, abs=1e-7 / epsilon)


@pytest.mark.parametrize(
    ("library", "hard", "turns"),
    [("torch", True, (0, 1, 2, 1)), ("torch", False, (0, 1, 2, 1)), ("jax", False, (1,))],
)
def test_no_derivative_is_nan(library: str, hard: bool, turns: tuple[int, ...]) -> None:
    """Where beams die, have ended to the last digit, and only one token is allowed."""
    lib = BY_NAME[library]
    lib.require()
    from softk.backend import backend_of

    allowed = np.asarray([[-0.1, -INF, -2.0], [0.0, -INF, -INF], [-INF, -INF, -0.5]])

    def total(logs: Any) -> Any:
        xp = backend_of(logs).xp
        first = lib.array(np.zeros((4, 3)) + np.asarray([1.0, 0.0, 0.0]))
        turn = iter(turns)

        def next_token(inputs: Any, states: Any) -> tuple[Any, Any]:
            place = next(turn)
            return inputs @ lib.array(np.zeros((3, 3))) + logs[place, :][None, :], states

        answer = softk.beam.search(
            next_token, first, {"seen": first}, length=len(turns), end=0, epsilon=1e-3, hard=hard, length_penalty=0.5
        )
        alive = answer.scores > -INF
        scores = xp.where(alive, answer.scores, xp.zeros_like(answer.scores))
        return xp.sum(scores) + xp.sum(answer.tokens**2) + xp.sum(answer.lengths) + xp.sum(answer.states["seen"])

    x = lib.array(allowed)
    if library == "torch":
        x.requires_grad_(True)
        total(x).backward()
        gradient = x.grad.numpy()
    else:
        import jax

        gradient = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~np.isfinite(allowed)], 0.0)
    assert np.any(gradient != 0.0)


# --- one step


def test_step_is_the_sorted_topk(lib: Library, rng: np.random.Generator) -> None:
    """Batched, to fewer beams, with a tree of states of two shapes, and an epsilon a slice."""
    if lib.name == "jax":
        pytest.skip("compiling takes too long; run with the outer jit")
    scores, table = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 6))
    states = rng.normal(size=(2, 3, 2, 2)), rng.normal(size=(2, 3))
    epsilon = np.asarray([[0.3], [1.0]])

    def run(scores: Any, table: Any, epsilon: Any, one: Any, other: Any) -> tuple[Any, ...]:
        answer = softk.beam.step(scores, 2, table=table, states=({"one": one}, [other, None]), epsilon=epsilon)
        assert answer.states[1][1] is None
        return (*answer[:4], answer.states[0]["one"], answer.states[1][0])

    values = lib.call(run, *(lib.array(value) for value in (scores, table, epsilon, *states)))
    found = [lib.numpy(value) for value in values]
    kept, assignment = softk.sorted_topk(scores.reshape(2, 12), 2, epsilon=epsilon)
    shares = assignment.reshape(2, 2, 3, 4)
    wanted = [
        kept,
        shares.sum(axis=-2),
        shares.sum(axis=-1),
        np.einsum("wbpv,vf->wbf", shares, table),
        np.einsum("wbpv,wpij->wbij", shares, states[0]),
        np.einsum("wbpv,wp->wb", shares, states[1]),
    ]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


def carried() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Scores of two words, states of many dtypes, and the parents of the new beams; the last of the second word is
    dead."""
    rng = np.random.default_rng(4)
    scores = np.asarray([[[0.0, -1.0], [-3.0, 2.0], [-9.0, -9.0]], [[-INF, 1.0], [-INF, -INF], [-INF, 0.0]]])
    states = {
        "tokens": rng.integers(0, 100, (2, 3, 4)),
        "lengths": rng.integers(0, 100, (2, 3)).astype("int32"),
        "done": rng.uniform(size=(2, 3)) < 0.5,
        "seen": rng.uniform(size=(2, 3, 2, 2)) < 0.5,
        "bias": np.where(rng.uniform(size=(2, 3, 2)) < 0.5, -INF, rng.normal(size=(2, 3, 2))),
        "cell": rng.normal(size=(2, 3, 5)).astype("float32"),
    }
    return scores, states, np.asarray([[1, 0, 0], [0, 2, -1]])


def of_parents(values: np.ndarray, parents: np.ndarray) -> np.ndarray:
    found = np.zeros_like(values)
    for word, beam in np.ndindex(*parents.shape):
        if parents[word, beam] >= 0:
            found[word, beam] = values[word, parents[word, beam]]
    return found


def test_a_hard_step_takes_the_state_of_the_parent(lib: Library) -> None:
    """Of any dtype, to the last bit; what all beams share stays."""
    scores, states, parents = carried()
    shared = np.asarray(7)

    def run(scores: Any, shared: Any, *leaves: Any) -> tuple[Any, ...]:
        tree = {"cache": [dict(zip(states, leaves, strict=True)), None], "place": (3, shared)}
        answer = softk.beam.step(scores, states=tree, hard=True)
        assert answer.states["cache"][1] is None
        assert answer.states["place"][0] == 3
        return (*answer.states["cache"][0].values(), answer.states["place"][1])

    found = lib.call(run, lib.array(scores), lib.array(shared), *(lib.array(v, v.dtype) for v in states.values()))
    *leaves, place = (lib.numpy(value) for value in found)
    for leaf, values in zip(leaves, states.values(), strict=True):
        assert leaf.dtype == values.dtype
        np.testing.assert_array_equal(leaf, of_parents(values, parents))
    assert place == shared


@pytest.mark.parametrize("library", ["torch", "jax", "autograd"])
def test_gradients_of_the_states_of_a_hard_step(library: str, rng: np.random.Generator) -> None:
    """A parent gets what its children have, added up."""
    pytest.importorskip(library)
    scores, states, parents = carried()
    cell, u = states["cell"].astype(float), rng.normal(size=(2, 3, 5))
    wanted = np.zeros_like(cell)
    for word, beam in np.ndindex(*parents.shape):
        if parents[word, beam] >= 0:
            wanted[word, parents[word, beam]] += u[word, beam]
    if library == "torch":
        import torch

        leaf = torch.tensor(cell, requires_grad=True)
        softk.beam.step(torch.tensor(scores), states=leaf, hard=True).states.backward(torch.tensor(u))
        found = leaf.grad.numpy()
    elif library == "jax":
        import jax

        def total(cell: Any) -> Any:
            return jax.numpy.sum(u * softk.beam.step(jax.numpy.asarray(scores), states=cell, hard=True).states)

        found = np.asarray(jax.jit(jax.grad(total))(jax.numpy.asarray(cell)))
    else:
        import autograd

        def boxed(cell: Any) -> Any:
            # Everything is boxed, as in a search.
            moved = softk.beam.step(scores + 0.0 * autograd.numpy.sum(cell), states=cell, hard=True)
            return autograd.numpy.sum(u * moved.states)

        found = autograd.grad(boxed)(cell)
    np.testing.assert_array_equal(found, wanted)


def test_a_hard_search_carries_integers() -> None:
    """The tokens that a model has seen, kept by itself, are the sequences."""
    given = model()
    for length_penalty in (0.0, 1.5):

        def next_token(inputs: Any, states: Any) -> tuple[Any, Any]:
            hidden = np.tanh(inputs + states["hidden"] @ given.recur)
            logits = hidden @ given.out
            logits = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)) + given.forbidden
            last = np.argmin(np.abs(inputs[..., None, :] - given.table).sum(axis=-1), axis=-1)
            seen = np.concatenate([states["seen"], last[..., None]], axis=-1)
            return logits, {"hidden": hidden, "seen": seen, "place": states["place"] + 1}

        states = {"hidden": given.state, "seen": np.zeros((2, BEAMS, 0), int), "place": 0}
        options = {"length": LENGTH, "end": END, "table": given.table, "hard": True}
        found = softk.beam.search(next_token, given.start, states, length_penalty=length_penalty, **options)
        assert found.states["place"] == LENGTH
        assert found.states["seen"].dtype == int
        np.testing.assert_array_equal(found.states["seen"][..., 1:], found.sequences[..., :-1])


def test_a_soft_step_names_the_state_that_cannot_be_mixed() -> None:
    class Memory(NamedTuple):
        cell: Any
        done: Any

    memory = Memory(np.ones((2, 3)), np.asarray([True, False]))
    message = r"states\['layers'\]\[1\]\.done must be of a real floating dtype.*got bool; convert it.*hard=True"
    with pytest.raises(TypeError, match=message):
        softk.beam.step(np.zeros((2, 3)), states={"layers": [None, memory]})
    kept = softk.beam.step(np.zeros((2, 3)), states={"layers": [None, memory]}, hard=True).states["layers"][1]
    np.testing.assert_array_equal(kept.done, [True, True])
    soft = softk.beam.step(np.zeros((2, 3)), states={"place": 4, "shared": np.asarray(5)}).states
    assert soft == {"place": 4, "shared": np.asarray(5)}


# --- half precision


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_search_in_half_precision(dtype: str, hard: bool, rng: np.random.Generator) -> None:
    """Log-probabilities are added up in float32, and a state that does not change is mixed into itself."""
    torch = pytest.importorskip("torch")
    kind, length = getattr(torch, dtype), 40
    logs = torch.log_softmax(torch.tensor(3.0 * rng.standard_normal((length, 6, 6))), dim=-1).to(kind)
    forbidden = torch.tensor([-INF, 0.0, 0.0, 0.0, 0.0, 0.0])  # no beam ends
    found = {}
    for wide in (kind, torch.float64):
        turn = iter(logs.to(wide))
        inputs = torch.eye(6, dtype=wide)[:4]

        def next_token(inputs: Any, states: Any, turn: Any = turn, wide: Any = wide) -> tuple[Any, Any]:
            assert inputs.dtype == wide
            given = next(turn)
            logits = inputs @ given if hard else given[:4]  # soft tokens would be rounded for the model
            return torch.log_softmax(logits, dim=-1).to(kind).to(wide) + forbidden.to(wide), states

        states = torch.full((4, 3), 1.7).to(kind).to(wide)
        found[wide] = softk.beam.search(next_token, inputs, states, length=length, end=0, hard=hard, epsilon=0.02)
    half, right = found[kind], found[torch.float64]
    assert {value.dtype for value in half[:5]} == {kind}
    torch.testing.assert_close(half.states, right.states.to(kind), rtol=0, atol=0)
    torch.testing.assert_close(half.scores.double(), right.scores, rtol=0.505 * torch.finfo(kind).eps, atol=1e-4)
    if hard:
        assert torch.equal(half.sequences, right.sequences)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_step_in_half_precision(dtype: str, rng: np.random.Generator) -> None:
    """Everything is rounded once, at the end."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    scores, table, states = (
        torch.tensor(rng.standard_normal(shape)).to(kind) for shape in ((2, 4, 6), (6, 8), (2, 4, 8))
    )
    found = softk.beam.step(scores, table=table, states=states, epsilon=0.7)
    wanted = softk.beam.step(scores.double(), table=table.double(), states=states.double(), epsilon=0.7)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == kind
        torch.testing.assert_close(one.double(), other, rtol=0.505 * torch.finfo(kind).eps, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_changes_nothing(hard: bool) -> None:
    torch = pytest.importorskip("torch")
    given = Model(*(torch.tensor(value).float() for value in model()))

    def next_token(inputs: Any, states: Any) -> tuple[Any, Any]:
        with torch.autocast("cpu", enabled=False):
            hidden = torch.tanh(inputs + states @ given.recur)
            return torch.log_softmax(hidden @ given.out, dim=-1) + given.forbidden, hidden

    options: dict[str, Any] = {"length": LENGTH, "end": END, "table": given.table, "length_penalty": 0.7, "hard": hard}
    wanted = softk.beam.search(next_token, given.start, given.state, epsilon=1.0, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = softk.beam.search(next_token, given.start, given.state, epsilon=1.0, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("hard", [False, True])
def test_nothing_is_reported(hard: bool) -> None:
    """Underflow and infinities are meant; what the step function does is reported."""
    logs = np.asarray([[-0.2, -0.3, -2000.0, -INF]] * 3)
    options: dict[str, Any] = {"length": 5, "end": 0, "length_penalty": 0.5, "epsilon": 0.5, "hard": hard}
    with np.errstate(all="raise"):
        found = softk.beam.search(lambda inputs, states: (logs, states), np.ones((3, 4)), np.ones((3, 2)), **options)
        with pytest.raises(FloatingPointError):
            softk.beam.search(lambda inputs, states: (np.log(0.0 * logs), states), np.ones((3, 4)), **options)
    assert np.isfinite(found.states).all()


def test_hard_ties_go_to_the_first(lib: Library) -> None:
    scores = np.asarray([[1.0, 2.0, 2.0], [2.0, -INF, 1.0]])
    answer = lib.call(lambda x: tuple(softk.beam.step(x, hard=True))[:3], lib.array(scores))
    kept, tokens, parents = (lib.numpy(value) for value in answer)
    np.testing.assert_array_equal(kept, [2.0, 2.0])
    np.testing.assert_array_equal(tokens, [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(parents, [[1.0, 0.0], [1.0, 0.0]])


def test_named_tuples_stay_what_they_are() -> None:
    class Memory(NamedTuple):
        cell: Any
        more: Any

    states = Memory(np.eye(2), {"x": [np.ones((2, 3))]})
    answer = softk.beam.step(np.asarray([[0.0, -1.0], [3.0, 2.0]]), states=states, hard=True).states
    assert type(answer) is Memory
    np.testing.assert_array_equal(answer.cell, [[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(answer.more["x"][0], np.ones((2, 3)))


# --- errors


def test_errors_of_a_step() -> None:
    x = np.zeros((2, 3))
    step = softk.beam.step
    complains(TypeError, "scores", "list", "an array", step, [[1.0]])
    complains(ValueError, "scores", r"\(3,\)", "two axes", step, np.zeros(3))
    complains(TypeError, "beams", "2.0", "Python integer", step, x, 2.0)
    complains(ValueError, "beams", "0", "at least 1", step, x, 0)
    complains(ValueError, "table", r"\(2, 5\)", r"\(3, features\)", step, x, table=np.zeros((2, 5)))
    complains(TypeError, "scores", "int64", "floating", step, np.zeros((2, 3), int))
    complains(TypeError, "scores", "int64", "floating", step, np.zeros((2, 3), int), hard=True)
    complains(TypeError, "states", "str", "an array, a number, None", step, x, states={"a": "b"})
    complains(TypeError, "states", "int64", "floating", step, x, states=np.zeros((2, 1), dtype="int64"))
    complains(ValueError, "states", r"\(3, 2\)", r"\(2,\)", step, x, states=[np.zeros((3, 2))])
    for hard in (False, True):
        complains(ValueError, "beams", "7", "from 1 to 6", step, x, 7, hard=hard)


def test_errors_of_a_search() -> None:
    def good(inputs: Any, states: Any) -> tuple[Any, Any]:
        return np.zeros((2, 3)), states

    def run(step_function: Any = good, inputs: Any = np.zeros((2, 3)), **options: Any) -> None:  # noqa: B008
        softk.beam.search(step_function, inputs, **{"length": 2, "end": 0, **options})

    complains(ValueError, "inputs", r"\(3,\)", "two axes", run, inputs=np.zeros(3))
    complains(TypeError, "length", "2.5", "Python integer", run, length=2.5)
    complains(ValueError, "length", "0", "at least 1", run, length=0)
    complains(TypeError, "end", "'x'", "Python integer", run, end="x")
    complains(ValueError, "end", "3", "from 0 to 2", run, end=3)
    complains(ValueError, "length_penalty", "nan", "finite", run, length_penalty=math.nan)
    wrong = r"\(2, 2, 3\)"
    complains(ValueError, "step_function", wrong, r"\(2,\)", run, lambda inputs, states: (np.zeros((2, 2, 3)), states))
    complains(ValueError, "epsilon", "-1.0", "positive", run, epsilon=-1.0)
