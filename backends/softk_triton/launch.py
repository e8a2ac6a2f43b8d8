"""The launch of the kernels: tiles or segments for a problem, the sequence of passes, and the output buffers."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import segments, tiles

#: The longest row that one program solves in registers (half of it with weights), and the number of scores per warp.
LONGEST = 32768
PER_WARP = 1024
#: The width of a chunk of a short row. A warp then has several rows, and computes the values of several rows at once.
WIDTH = 32
#: The registers of a thread, limited for these tiles, so that more programs run at a time and hide each other's waits.
REGISTERS = {1024: 128, 2048: 80, 4096: 80, 8192: 80, 16384: 64, 32768: 64}
#: For longer rows: the scores that a program loads at a time, its warps, the shortest segment, and the most segments.
BLOCK = 1024
WARPS = 4
SHORTEST = 32768
SEGMENTS = 1024
#: The sample of a long row: its scores, the length of a run of adjacent ones, and the warps of its program.
SAMPLE: dict[str, Any] = {"SAMPLE": 8192, "RUN": 32, "num_warps": 8}

Tensor = torch.Tensor
Optional = torch.Tensor | None


class Problem:
    """The inputs of a primitive as rows of scores. Results have the shapes of the primitive's results."""

    grid: tuple[int]
    size: dict[str, int]

    def __init__(self, x: Tensor, k: Tensor, tau: Tensor, weights: Optional, where: Optional) -> None:
        self.x, self.n = x.contiguous(), x.shape[-1]
        self.rows = x.numel() // self.n
        arrays, steps = zip(_per_row(k), _per_row(tau), _per_item(weights), _per_item(where), strict=True)
        self.arrays = (self.x, *arrays)
        self.steps = dict(zip(("k_step", "tau_step", "weights_step", "where_step"), steps, strict=True))
        self.weights = weights

    def per_item(self, dtype: torch.dtype | None = None) -> Tensor:
        """An empty buffer of the shape of the scores."""
        return torch.empty(self.x.shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def per_row(self, *count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty buffer for one value per slice, or for `count` such results."""
        return torch.empty((*count, *self.x.shape[:-1], 1), dtype=dtype, device=self.x.device)

    def run(self, kernel: Any, *arrays: Any, grid: tuple[int] | None = None, **options: Any) -> None:
        """Launch a kernel on the device of the scores and its current stream."""
        with _on(self.x.device):
            kernel[grid or self.grid](
                *self.arrays, *arrays, n=self.n, rows=self.rows, **self.steps, **self.size | options
            )

    def mask(self) -> tuple[Tensor, ...]:
        """The mask, the offset and the reference."""
        found = self.per_item(), self.per_row(), self.per_row()
        self.forward(*found, None, None)
        return found

    def settled(self) -> tuple[Tensor, ...]:
        """The outputs of the solver primitive."""
        numbers, flags = self.per_row(4), self.per_row(4, dtype=torch.bool)
        self.forward(None, None, None, numbers, flags)
        return *numbers.unbind(), *flags.unbind()

    def cotangents(self, given: tuple[Optional, ...], needed: tuple[bool, ...]) -> tuple[Optional, ...]:
        """The cotangents of (x, k, tau, weights) that are needed, from the offset, the reference, u and c."""
        of_x, of_k, of_tau, of_weights = needed
        found = (
            self.per_item() if of_x else None,
            self.per_row() if of_k else None,
            self.per_row() if of_tau else None,
            self.per_item(torch.float32) if of_weights and self.weights is not None else None,
        )
        self.pull(*(None if value is None else value.contiguous() for value in given), *found)
        return found

    def forward(
        self, mask: Optional, offset: Optional, reference: Optional, numbers: Optional, flags: Optional
    ) -> None:
        raise NotImplementedError

    def pull(self, offset: Optional, reference: Optional, u: Optional, c: Optional, *found: Optional) -> None:
        raise NotImplementedError


class Tiles(Problem):
    """Rows that fit into registers: a program loads one or more rows once."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        block = max(1 << (self.n - 1).bit_length(), 16)
        scores = PER_WARP // 2 if block < PER_WARP else PER_WARP  # short rows are faster with more warps
        rows = max(scores // block, 1)
        width = min(WIDTH, block) if rows > 1 else block
        self.grid = (-(-self.rows // rows),)
        warps = min(max((1 if self.weights is None else 2) * rows * block // scores, 1), 32)
        self.size = {
            "ROWS": rows,
            "CHUNKS": block // width,
            "WIDTH": width,
            "FULL": self.n == block,
            "num_warps": warps,
        }
        if self.weights is None and block in REGISTERS:
            self.size["maxnreg"] = REGISTERS[block]

    def forward(self, *found: Optional) -> None:
        self.run(tiles.solve_tile, *found)

    def pull(self, *arrays: Optional) -> None:
        self.run(tiles.pull_tile, *arrays)


class Segments(Problem):
    """Longer rows: many programs process one segment each, in several passes."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        length = SHORTEST
        while length * SEGMENTS < self.n:
            length *= 2
        self.segments = -(-self.n // length)
        self.grid = (self.rows * self.segments,)
        self.each = (self.rows,)
        self.size = {
            "segments": self.segments,
            "LENGTH": length,
            "BLOCK": BLOCK,
            "SEGMENTS": 1 << (self.segments - 1).bit_length(),
            "num_warps": WARPS,
        }

    def parts(self, *count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty buffer for the partial results of all segments."""
        return torch.empty((*count, self.rows, self.segments), dtype=dtype, device=self.x.device)

    def values(self, *count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty buffer for an intermediate value of each row."""
        return torch.empty((*count, self.rows), dtype=dtype, device=self.x.device)

    @property
    def mass(self) -> torch.dtype:
        """The dtype of a mass, which is a count without weights."""
        return torch.int32 if self.weights is None else torch.float32

    def forward(
        self, mask: Optional, offset: Optional, reference: Optional, numbers: Optional, flags: Optional
    ) -> None:
        # For a mask, any reference within a temperature of the gap will do. The solver needs the scores at the gap.
        kernels, near = segments, float(mask is not None)
        pivots = self.values(kernels.PIVOTS.value, dtype=torch.int32)
        self.run(kernels.sample_rows, pivots, grid=self.each, **SAMPLE)
        counts = self.parts(kernels.PIVOTS.value, dtype=self.mass)
        survey = pivots, self.parts(5), self.parts(dtype=self.mass), counts, self.parts(dtype=torch.int32)
        self.run(kernels.survey, *survey)
        outer, facts, lowest = self.values(2), self.values(4, dtype=torch.int32), self.values(dtype=torch.int32)
        first = self.values(2, dtype=torch.int32), self.values(2, dtype=self.mass)
        self.run(kernels.open_bracket, *survey, outer, facts, lowest, *first, grid=self.each)
        bracket, reached, counts = self.select(*first, near, upper=True)
        last, flanks = self.values(dtype=self.mass), self.parts(2)
        self.run(kernels.flank, bracket, reached, counts, last, flanks, near)
        lower: tuple[Optional, ...] = (None, None, None)
        if self.weights is not None:
            bracket = self.values(2, dtype=torch.int32)
            self.run(kernels.open_lower_bracket, flanks, lowest, last, bracket, grid=self.each)
            lower = self.select(bracket, first[1][1], 0.0, upper=False)
        gap, state = self.values(5), self.values(5)
        self.run(kernels.frame_rows, flanks, last, outer, facts, *lower, gap, state, grid=self.each)
        tails: Optional = None
        above: Optional = None
        for steps in range(segments.SWEEPS):
            swept = self.values(5), self.parts(3), self.parts(dtype=self.mass)
            self.run(kernels.sweep_rows, gap, state, tails, above, *swept, steps)
            state, tails, above = swept
        results = (mask, offset, reference, numbers, flags, segments.SWEEPS)
        self.run(kernels.mask_rows, gap, facts, state, tails, above, *results)

    def select(self, bracket: Tensor, mass: Tensor, near: float, *, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Narrow the bracket of a score at the gap.

        Returns the last bracket but one, the mass at its lower end, and the counts from which the next kernel computes
        the last bracket.
        """
        counts: Optional = None
        for _ in range(segments.PASSES):
            found = (
                self.values(2, dtype=torch.int32),
                self.values(dtype=self.mass),
                self.parts(segments.PIVOTS.value, dtype=self.mass),
            )
            self.run(segments.count, bracket, mass, counts, *found, near, UPPER=upper)
            bracket, mass, counts = found
        assert counts is not None
        return bracket, mass, counts

    def pull(self, offset: Optional, reference: Optional, u: Optional, c: Optional, *found: Optional) -> None:
        kernels = segments
        of_x, of_k, of_tau, of_weights = found
        distances, sums, masses = self.parts(3), self.parts(14), self.parts(dtype=self.mass)
        # The derivatives in k, tau and the weights need p exactly in a gap, so each side of it has its own sums.
        sides = any(value is not None for value in (of_k, of_tau, of_weights))
        self.run(kernels.nearest_rows, offset, reference, distances, SIDES=sides)
        self.run(kernels.sum_rows, offset, reference, u, distances, sums, masses, SIDES=sides)
        joined, gains = self.values(11), self.parts()
        moments = None if of_tau is None else self.parts()
        arrays = distances, sums, masses, of_k, joined
        self.run(kernels.join_rows, offset, reference, c, *arrays, grid=self.each, SIDES=sides)
        self.run(kernels.gain_rows, offset, reference, u, joined, gains, SIDES=sides)
        self.run(kernels.pull_rows, offset, reference, u, c, joined, gains, of_x, of_weights, moments, SIDES=sides)
        if of_tau is not None:
            self.run(kernels.temperature_rows, offset, reference, c, joined, moments, of_tau, grid=self.each)


def fault_on(device: torch.device) -> str | None:
    """The reason why kernels do not start on the device, such as a missing C compiler, or None if they do."""
    try:
        with _on(device):
            tiles.probe[(1,)](torch.empty(1, device=device))
    except Exception as reason:
        warnings.warn(
            f"softk's kernels do not run on {device}, so softk uses PyTorch operations instead: {reason!r}",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"kernels do not start on {device}: {reason!r}"
    return None


def problem(inputs: tuple[Any, ...]) -> Problem:
    """The inputs of a primitive as tiles if a row fits into registers, else as segments."""
    x, weights = inputs[0], inputs[3]
    return (Tiles if x.shape[-1] <= (LONGEST if weights is None else LONGEST // 2) else Segments)(*inputs)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _per_row(value: Tensor) -> tuple[Tensor, int]:
    """An array of one value per slice, or one for all, and its stride in elements: 0 for a shared value."""
    return (value, 0) if value.ndim == 0 else (value.contiguous(), 1)


def _per_item(value: Optional) -> tuple[Optional, int]:
    """An array of the shape of the scores, and the stride of its rows: 0 if all rows are the same."""
    if value is None:
        return None, 0
    pairs = zip(value.shape[:-1], value.stride(), strict=False)
    if value.stride(-1) == 1 and all(size == 1 or step == 0 for size, step in pairs):
        return value, 0
    return value.contiguous(), value.shape[-1]
