"""Rows over threads.

Numba's own threads abort the process when two Python threads use them at once, and hang after a fork. Here a kernel
lets go of Python's lock while it runs, and a few threads of Python's are enough.

The rows are split into contiguous parts. The calling thread computes parts from the first one on; the threads of the
pool, which sleep until they are asked, take parts from the last one on. So nobody waits for a thread that wakes up
late, or that is busy with the parts of another caller. Rows are independent, so that the results do not depend on who
computes them.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from functools import cache
from queue import SimpleQueue
from typing import Any

#: The least work of a part, 100 to 200 microseconds. A thread begins 50 to 100 after it is asked. A unit is one score.
GRAIN = 98304
#: What a row costs beyond its scores, in the same unit.
PER_ROW = 250
#: Parts per thread, where they are large enough: a thread that starts late leaves some of its parts to the others.
PARTS = 4
#: How long a fork waits for threads that are at work.
PATIENCE = 0.1


def in_parallel(kernel: Any, arguments: tuple[Any, ...], rows: int, n: int, like: Any) -> None:
    """Run a kernel on all rows.

    Parameters
    ----------
    kernel : callable
        ``kernel(*arguments, start, stop)`` computes the rows from `start` to `stop`.
    arguments : tuple
        The other arguments. What is written to must be in the hands of the caller alone.
    rows, n : int
        How many rows there are, and how long each is.
    like : array
        An array of the framework whose number of threads is to be used.
    """
    most = rows * (n + PER_ROW) // GRAIN
    threads = min(threads_of(like), rows, most) if most > 1 else 1
    if threads < 2:
        kernel(*arguments, 0, rows)
    else:
        run_parts(kernel, arguments, rows, min(PARTS * threads, rows, most), threads)


def run_parts(kernel: Any, arguments: tuple[Any, ...], rows: int, parts: int, threads: int) -> None:
    """Run a kernel on `parts` parts of the rows, by so many threads. The calling thread is one of them.

    An exception in a part is raised here. When the calling thread is interrupted, it starts no further parts and waits
    for those that are being computed; if it is interrupted again, it leaves them. They keep alive what they write to.
    """
    job = _Job(kernel, arguments, rows, parts)
    slots = _pool.ask(job, threads - 1)
    try:
        job.work(job.parts.popleft)
    finally:
        job.parts.clear()
        for slot in slots:
            slot.acquire()
    if job.errors:
        raise job.errors.pop()


# --- how many threads


def threads_of(like: Any) -> int:
    """As many threads as the framework is set to, at most one for each core."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return min(int(torch.get_num_threads()), cores())
    return _default()


@cache
def cores() -> int:
    """How many cores the process may run on."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return count or 1


@cache
def _default() -> int:
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP takes a list, one number per level
        if value.isdecimal() and int(value) > 0:
            return min(int(value), cores())
    return cores()


# --- the threads


class _Job:
    """The parts of a call that nobody has begun."""

    __slots__ = ("arguments", "errors", "kernel", "parts")

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], rows: int, parts: int) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.parts = deque((i * rows // parts, (i + 1) * rows // parts) for i in range(parts))
        self.errors: list[BaseException] = []

    def work(self, take: Any) -> None:
        """Compute parts until there are none. To take one from a deque is atomic."""
        while True:
            try:
                start, stop = take()
            except IndexError:
                return
            self.kernel(*self.arguments, start, stop)

    def help(self, slot: Any) -> None:
        """The same in a thread of the pool, which holds the slot meanwhile."""
        if not slot.acquire(blocking=False):
            return  # the caller has gone on
        try:
            self.work(self.parts.pop)
        except BaseException as error:
            self.parts.clear()
            self.errors.append(error)
        finally:
            slot.release()


class _Pool:
    """Threads that wait for jobs. They are started when they are first needed, and end with the process."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[_Job, Any] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.closed = False

    def ask(self, job: _Job, count: int) -> list[Any]:
        """Ask up to `count` threads, fewer if requests still wait.

        Returns a lock for each of them, which the thread holds while it helps.
        """
        if len(self.threads) < count:
            self._start(count)
        slots = [threading.Lock() for _ in range(min(count, len(self.threads) - self.jobs.qsize()))]
        for slot in slots:
            self.jobs.put((job, slot))
        return slots

    def _start(self, count: int) -> None:
        with self.lock:
            while len(self.threads) < count and not self.closed:
                thread = threading.Thread(target=self._serve, name=f"softk-{len(self.threads)}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, by the system's limits or because the interpreter ends
                    return
                self.threads.append(thread)

    def _serve(self) -> None:
        while (asked := self.jobs.get()) is not None:
            job, slot = asked
            job.help(slot)
            del asked, job, slot  # a sleeping thread keeps no array alive

    def close(self) -> None:
        """End the threads, and wait a little for those that are at work."""
        with self.lock:
            self.closed = True
        for _ in self.threads:
            self.jobs.put(None)
        end = time.monotonic() + PATIENCE
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(max(end - time.monotonic(), 0.0))


_pool = _Pool()


def _close() -> None:
    """End the threads; a later call starts others."""
    pool = _pool
    _renew()
    pool.close()


def _renew() -> None:
    global _pool
    _pool = _Pool()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    # Without threads nothing is lost in the child, and Python has nothing to warn of.
    os.register_at_fork(before=_close, after_in_child=_renew)
