"""One slice of scores that do not fit into memory: `python -m benchmarks.large --scores 1e9`.

Float32 scores with a normal distribution are written to a file, which is deleted at the end. Each candidate reads the
file in its own process, through Dask, by a memory map per chunk: the sum of the scores, which is what reading costs;
`dask.array.topk`, the hard selection; and `softk.topk`, whose mask is computed and summed up. The command prints the
seconds, those of the processors, how often the file was read, and the largest resident memory of the process. It fails
if the mass of the mask is not k.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .machine import processor, versions

CANDIDATES = ("sum", "dask.array.topk", "softk.topk")
#: How far the mass may be from k, in roundings of k.
ROUNDINGS = 16.0


class Scores:
    """The scores of a file, as Dask reads them. It counts how often every part is read."""

    ndim, dtype = 1, np.dtype("float32")

    def __init__(self, path: Path) -> None:
        self.path, self.shape = path, (path.stat().st_size // self.dtype.itemsize,)
        self.reads: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __getitem__(self, index: tuple[slice]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.shape[0])
        with self._lock:
            self.reads[start] += stop > start  # Dask also asks for no scores, to learn their type
        # A mapping counts as resident memory as long as it exists.
        return np.array(np.memmap(self.path, self.dtype, "r")[index])


def write(path: Path, count: int) -> None:
    """Write normally distributed scores."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, count, 1 << 22):
            rng.standard_normal(min(1 << 22, count - start), dtype=np.float32).tofile(file)


def measure(candidate: str, path: Path, chunk: int, k: int, epsilon: float) -> dict[str, float]:
    """The record of one candidate, measured in this process."""
    import dask
    import dask.array as da

    import softk

    source = Scores(path)
    x = da.from_array(source, chunks=chunk)
    lazy: Any = {
        "sum": lambda: x.sum(dtype=np.float64),
        "dask.array.topk": lambda: da.topk(x, k)[-1],
        "softk.topk": lambda: softk.topk(x, k, epsilon=epsilon).sum(dtype=np.float64),
    }[candidate]
    start, busy = time.perf_counter(), time.process_time()
    with dask.config.set(scheduler="threads", num_workers=os.cpu_count()):
        value = float(lazy().compute())
    return {
        "seconds": time.perf_counter() - start,
        "busy": time.process_time() - busy,  # of all threads
        "passes": max(source.reads.values()),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux has KiB
        "value": value,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--scores", type=float, default=1e7, help="how many scores (default: 1e7)")
    parser.add_argument("--chunk", type=float, default=2**22, help="scores per chunk (default: 2^22)")
    parser.add_argument("--part", type=float, default=1e-3, help="k as a part of the scores (default: 0.001)")
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file is written")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--measure", nargs=2, metavar=("CANDIDATE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the file, and run the candidates one after the other."""
    options = parse(argv)
    count, chunk = int(options.scores), int(options.chunk)
    k = max(1, int(options.part * count))
    if options.measure:
        candidate, path = options.measure
        print(json.dumps(measure(candidate, Path(path), chunk, k, options.epsilon)))
        return 0
    print(processor(), "with", os.cpu_count(), "cores;", versions(("numpy", "dask")))
    print(f"{count:,} scores in chunks of {chunk:,}, k = {k:,}, epsilon = {options.epsilon}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="softk-large-", dir=options.folder) as folder:
        path = Path(folder) / "scores"
        write(path, count)
        for candidate in options.candidates:
            command = [sys.executable, "-m", "benchmarks.large", "--measure", candidate, str(path)]
            command += ["--scores", str(count), "--chunk", str(chunk), "--part", str(options.part)]
            command += ["--epsilon", str(options.epsilon)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            times = f"{found['seconds']:8.1f} s, {found['busy']:.1f} s of processors"
            line = f"{candidate:16} {times}, {found['passes']:.0f} passes, {found['gib']:.2f} GiB"
            if candidate == "softk.topk":
                error = abs(found["value"] - k) / (k * np.finfo(np.float32).eps)
                failed = not error <= ROUNDINGS
                line += f", mass {found['value']:,.3f}, {error:.2f} roundings from k"
            print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
