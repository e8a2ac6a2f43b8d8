"""The threads of the Numba kernels: the same bits for every number of them, from many threads, and after a fork."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import softk
from softk_numba import pool

pytestmark = pytest.mark.kernels

ROWS, N, K = 64, 300, 7


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    pool._close()
    yield
    pool._close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of threads, whatever the work and the cores."""

    def use(count: int) -> None:
        monkeypatch.setattr(pool, "GRAIN", 1)
        monkeypatch.setattr(pool, "threads_of", lambda like: count)

    return use


def scores(rows: int = ROWS, n: int = N, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)


def mask_and_gradient(x: Any) -> tuple[Any, Any]:
    mask, pull = softk.vjp(softk.topk, x, K, epsilon=0.1)
    return mask, pull(np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape))["x"]


def fill(target: Any, start: int, stop: int) -> None:
    """A kernel in Python."""
    for row in range(start, stop):
        target[row] += row + 1


def numba() -> None:
    pytest.importorskip("numba", reason="Numba is not installed")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 65])
@pytest.mark.parametrize("parts", [1, 2, 7, 28])
def test_every_row_is_computed_once(rows: int, parts: int) -> None:
    target = np.zeros(rows)
    pool.run_parts(fill, (target,), rows, min(parts, rows), min(parts, rows))
    assert target.tolist() == list(range(1, rows + 1))


def test_the_parts_are_computed_at_the_same_time() -> None:
    barrier = threading.Barrier(4)

    def kernel(start: int, stop: int) -> None:
        barrier.wait(60)  # fails unless four threads are here at once

    for _ in range(3):
        pool.run_parts(kernel, (), 4, 4, 4)


def test_the_results_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    numba()
    x, found = scores(), []
    for count in (1, 2, 7):
        threads(count)
        found += [mask_and_gradient(x) for _ in range(5)]
    for mask, gradient in found[1:]:
        assert mask.tobytes() == found[0][0].tobytes()
        assert gradient.tobytes() == found[0][1].tobytes()
    assert len(pool._pool.threads) == 6


def test_small_work_stays_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "threads_of", lambda like: 2)
    seen = []

    def kernel(start: int, stop: int) -> None:
        seen.append((threading.current_thread(), start, stop))

    pool.in_parallel(kernel, (), 16, 1000, None)
    assert seen == [(threading.current_thread(), 0, 16)]
    assert not pool._pool.threads
    seen.clear()
    pool.in_parallel(kernel, (), 1024, 1000, None)
    assert sorted(place[1:] for place in seen) == [(i * 1024 // 8, (i + 1) * 1024 // 8) for i in range(8)]
    assert len(pool._pool.threads) == 1


def test_as_many_threads_as_the_framework_and_the_environment_say() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert pool.threads_of(torch.ones(3)) == 1
        torch.set_num_threads(1000)
        assert pool.threads_of(torch.ones(3)) == pool.cores()
    finally:
        torch.set_num_threads(before)
    assert 1 <= pool.threads_of(np.ones(3)) <= pool.cores()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "x"}, 8),
        ({"OMP_NUM_THREADS": "99"}, 8),
        ({"NUMBA_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, 3),
    ],
)
def test_the_usual_variables(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int) -> None:
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pool, "cores", lambda: 8)
    assert pool._default.__wrapped__() == expected


def test_sixteen_threads_at_once(threads: Callable[[int], None]) -> None:
    numba()
    inputs = [scores(seed=i) for i in range(16)]
    threads(1)
    expected = [mask_and_gradient(x) for x in inputs]
    threads(3)
    barrier = threading.Barrier(16)

    def work(i: int) -> bool:
        barrier.wait(60)
        found = [mask_and_gradient(inputs[i]) for _ in range(20)]
        return all(a.tobytes() == b.tobytes() for pair in found for a, b in zip(pair, expected[i], strict=True))

    with ThreadPoolExecutor(16) as executor:
        assert all(executor.map(work, range(16), timeout=300))
    assert len(pool._pool.threads) == 2


def test_a_kernel_that_calls_a_kernel() -> None:
    def outer(target: Any, start: int, stop: int) -> None:
        for row in range(start, stop):
            pool.run_parts(fill, (target[row],), 40, 8, 4)

    target = np.zeros((16, 40))
    pool.run_parts(outer, (target,), 16, 16, 4)
    assert (target == np.arange(1, 41)).all()


@pytest.mark.parametrize("bad", [0, 31, 63])
def test_an_exception_in_a_part_is_raised(bad: int) -> None:
    def kernel(target: Any, start: int, stop: int) -> None:
        time.sleep(0.001)
        if start <= bad < stop:
            raise ZeroDivisionError(f"row {bad}")
        fill(target, start, stop)

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match=f"row {bad}"):
            pool.run_parts(kernel, (np.zeros(64),), 64, 16, 3)
    target = np.zeros(64)
    pool.run_parts(fill, (target,), 64, 16, 3)
    assert target.tolist() == list(range(1, 65))
    assert len(pool._pool.threads) == 2


def test_an_interrupted_call_waits_and_leaves_the_pool_usable() -> None:
    caller, begun, running = threading.current_thread(), threading.Event(), []

    def kernel(start: int, stop: int) -> None:
        if threading.current_thread() is caller:
            assert begun.wait(60)
            raise KeyboardInterrupt
        running.append("begun")
        begun.set()
        time.sleep(0.05)
        running.append("ended")

    with pytest.raises(KeyboardInterrupt):
        pool.run_parts(kernel, (), 16, 16, 2)
    assert running == ["begun", "ended"]
    target = np.zeros(64)
    pool.run_parts(fill, (target,), 64, 16, 2)
    assert target.tolist() == list(range(1, 65))


def test_a_sleeping_thread_keeps_no_array_alive() -> None:
    import weakref

    class Owned:
        pass

    def kernel(owned: Any, start: int, stop: int) -> None:
        time.sleep(0.001)

    owned = Owned()
    alive = weakref.ref(owned)
    pool.run_parts(kernel, (owned,), 16, 16, 3)
    del owned
    deadline = time.monotonic() + 10
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() is None


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    target = np.zeros(64)
    pool.run_parts(fill, (target,), 64, 16, 4)
    assert target.tolist() == list(range(1, 65))


def forks(test: Any) -> Any:
    """For a test that forks: Python and JAX warn of the threads that they started, if an earlier test used them."""
    for message in ("This process .* is multi-threaded:DeprecationWarning", "os.fork.. was called:RuntimeWarning"):
        test = pytest.mark.filterwarnings(f"default:{message}")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")(test)


def _in_child(send: Any, x: Any) -> None:
    before = len(pool._pool.threads)
    pool.GRAIN, pool.threads_of = 1, lambda like: 3  # type: ignore[assignment]
    mask, gradient = mask_and_gradient(x)
    send.send((before, len(pool._pool.threads), mask.tobytes(), gradient.tobytes()))


@forks
def test_a_fork(threads: Callable[[int], None]) -> None:
    numba()
    threads(3)
    x = scores()
    expected = [value.tobytes() for value in mask_and_gradient(x)]
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_in_child, args=(send, x))
        child.start()
        for _ in range(5):  # the parent goes on
            assert [value.tobytes() for value in mask_and_gradient(x)] == expected
        assert receive.poll(120)
        assert receive.recv() == (0, 2, *expected)
        child.join(60)
        assert child.exitcode == 0


@forks
def test_a_fork_beside_a_thread_at_work() -> None:
    release = threading.Event()

    def kernel(start: int, stop: int) -> None:
        release.wait(60)

    other = threading.Thread(target=pool.run_parts, args=(kernel, (), 4, 4, 2))
    other.start()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        target = np.zeros(64)
        pool.run_parts(fill, (target,), 64, 16, 3)
        os._exit(int(target.tolist() != list(range(1, 65))))
    assert time.monotonic() - begun < 30.0
    release.set()
    other.join(60)
    assert os.waitpid(child, 0)[1] == 0


def test_beside_the_threads_of_torch(threads: Callable[[int], None]) -> None:
    numba()
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    x = torch.from_numpy(scores())
    threads(1)
    expected = softk.topk(x, K, epsilon=0.1)
    threads(3)
    big = torch.ones(300, 300)
    stop = threading.Event()

    def multiply() -> None:
        while not stop.is_set():
            assert float((big @ big)[0, 0]) == 300.0

    other = threading.Thread(target=multiply)
    try:
        torch.set_num_threads(2)
        other.start()
        for _ in range(30):
            assert torch.equal(softk.topk(x, K, epsilon=0.1), expected)
            assert float((big @ big).sum()) == 300.0**3
    finally:
        stop.set()
        other.join(60)
        torch.set_num_threads(before)


def run_python(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), SOFTK_QUIET="1", **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_process_ends_without_a_word() -> None:
    """Also with threads at work, and with a kernel that is called when everything ends."""
    done = run_python(
        """
        import atexit, threading, time
        import numpy as np
        from softk_numba import pool

        def fill(target, start, stop):
            for row in range(start, stop):
                target[row] += 1

        def late():
            target = np.zeros(64)
            pool.run_parts(fill, (target,), 64, 16, 3)
            assert target.tolist() == [1.0] * 64
            print("late")

        def slow(start, stop):
            time.sleep(0.3)

        atexit.register(late)
        late()
        assert threading.active_count() == 3
        assert all(thread.daemon for thread in pool._pool.threads)
        threading.Thread(target=pool.run_parts, args=(slow, (), 8, 8, 3), daemon=True).start()
        time.sleep(0.1)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "late\nlate\n", "")


def test_a_signal_interrupts_a_call() -> None:
    """The call ends at once, without the parts that are still computed. The pool goes on."""
    done = run_python(
        """
        import os, signal, threading, time
        import numpy as np
        from softk_numba import pool

        caller, release, at_work = threading.current_thread(), threading.Event(), threading.Event()
        def kernel(start, stop):
            if threading.current_thread() is not caller:
                at_work.set()
                release.wait(120)
            else:
                at_work.wait(120)  # so that the caller does not take both parts

        def interrupt():
            at_work.wait(120)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

        for _ in range(2):
            release.clear()
            at_work.clear()
            threading.Thread(target=interrupt).start()
            try:
                pool.run_parts(kernel, (), 2, 2, 2)  # the caller waits for the part of the other thread
            except KeyboardInterrupt:
                print("interrupted", "early" if not release.is_set() else "late")
            release.set()

        def fill(target, start, stop):
            for row in range(start, stop):
                target[row] += 1
        target = np.zeros(64)
        pool.run_parts(fill, (target,), 64, 16, 3)
        assert target.tolist() == [1.0] * 64
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted early\n" * 2, "")
