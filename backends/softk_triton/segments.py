"""The kernels for rows that are too long for a tile: several passes over the scores, each by many programs per row.

A program reduces its segment of a row to partial results. Every program of the next pass, or a small kernel between two
passes, combines the partial results of all segments. Passes need no synchronization except their order, and the order
of summation is fixed. A pass that a row no longer needs reads none of its scores. A value of a row is a vector of
length 1, and loaded scores are tiles of one row, so that the functions of `tiles` apply.

Forward: `sample_rows` (pivots from a sample), `survey` (with the masses at the pivots), `count` (brackets of keys,
PIVOTS at a time), `flank`, `sweep_rows`, `mask_rows`.
Backward: `nearest_rows`, `sum_rows`, `gain_rows`, `pull_rows`.

Partial results are summed in the columns of a tile, and across columns only at the end of a segment, because a sum
across the threads of a program takes as long as several loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softk._reference.threshold.limits import STEPS

from .tiles import (
    DOMINANCE,
    FARTHEST,
    INFINITY,
    LARGEST,
    across,
    balance_of,
    bars,
    columns,
    cotangent_of,
    distance_of,
    edge_of,
    extent,
    final_offset,
    finish,
    from_nearest,
    from_sides,
    gain_of,
    going_on,
    is_close,
    is_ordinary,
    key_of,
    level_of,
    load_cotangent,
    load_kept,
    load_numbers,
    load_per_row,
    load_scores,
    load_tile,
    load_weights,
    log_odds,
    masses_of,
    max_of,
    min_of,
    narrow_gap,
    narrowed,
    newton,
    odds_of,
    ordinary_mask,
    rates,
    reference_of,
    safe_denominator,
    score_of,
    select,
    sides_of,
    sigmoid,
    spaced,
    store_settled,
    sum_of,
    tail_of,
    tails_of,
    total_of,
    weigh,
)

PIVOTS = tl.constexpr(8)
#: The number of passes that narrow a bracket of all integers to one key, and of sweeps after which the search ends.
PASSES = 11
SWEEPS = STEPS + 1


# --- indices, partial results and values of rows


@triton.jit
def this_place(segments):
    """The row of this program, as a vector of length 1, and its segment."""
    program = tl.program_id(0)
    return program // segments + tl.arange(0, 1), program % segments


@triton.jit
def segment_of(segment, n, going, LENGTH: tl.constexpr):
    """The first column of a segment and its end, which are equal if the row is done and nothing is to be read."""
    begin = segment * LENGTH
    return begin, tl.where(tl.max(going.to(tl.int32), axis=0) > 0, tl.minimum(begin + LENGTH, n), begin)


@triton.jit
def parts_of(parts, field, row, rows, segments, SEGMENTS: tl.constexpr, other):
    """Load the partial results of all segments of a row, as a tile."""
    segment = tl.arange(0, SEGMENTS)[None, None, :]
    place = (field * rows + across(row.to(tl.int64))) * segments + segment
    return tl.load(parts + place, mask=segment < segments, other=other)


@triton.jit
def hand_on(parts, field, row, rows, segment, segments, value):
    """Store a partial result of a segment for the next pass."""
    tl.store(parts + (field * rows + row.to(tl.int64)) * segments + segment, value)


@triton.jit
def field_of(values, field, row, rows):
    """Load a value of a row."""
    return tl.load(values + field * rows + row)


@triton.jit
def keep(values, field, row, rows, value, segment):
    """Store a value of a row. Only the program of the first segment writes it."""
    tl.store(values + field * rows + row, value, mask=segment + tl.arange(0, 1) == 0)


# --- the scores at the gap


@triton.jit(do_not_specialize=["rows", "segments"])
def sample_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    pivots,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SAMPLE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Per row: pivots around the k-th largest score, from a sample of the scores.

    The sample is made of runs of RUN adjacent scores at equal distances. The pivots cover three standard deviations of
    the mass above a score in a random sample. Any pivots are right, and those of a sample usually leave a bracket that
    needs no further pass.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    place = columns(0, 1, SAMPLE)
    distance = n // (SAMPLE // RUN)
    column = (place // RUN).to(tl.int64) * distance + place % RUN
    x, able, _sound = load_scores(x_given, where, row, column, column < n, n, where_step)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    weights = None
    heaviest = tl.full([1], 1.0, tl.float32)
    if weights_given is not None:
        weights, _all, _usable = load_weights(weights_given, row, column, column < n, able, weights_step)
        x = tl.where(weights > 0.0, x, -INFINITY)
        heaviest = max_of(weights)
    total = sum_of(tl.where(x > -INFINITY, 1.0, 0.0))
    if weights_given is not None:
        total = sum_of(weights)
    share = tl.minimum(tl.maximum(k / n * SAMPLE, 0.0), total)
    spread = 3.0 * tl.sqrt(heaviest * share * (1.0 - share / safe_denominator(total)) + heaviest * heaviest)
    side = 2.0 * tl.arange(0, 2).to(tl.float32) - 1.0
    bar = tl.minimum(tl.maximum(share - side * spread, 0.0), total - heaviest)
    lowest, highest = min_of(tl.where(x > -INFINITY, x, LARGEST)), max_of(tl.maximum(x, -LARGEST))
    # Both ends are searched at once, as two rows. An error of a fraction of tau does not matter.
    first, last = key_of(lowest + 0.0) + tl.zeros([2], tl.int32), key_of(highest + 0.0) + tl.zeros([2], tl.int32)
    mass, near = total + tl.zeros([2], tl.float32), 0.25 * tau + tl.zeros([2], tl.float32)
    ends, _, _ = select(x, weights, first, last, mass, bar, bar, near, mass, 0.5 * heaviest)
    lower, upper = tl.min(score_of(ends), axis=0), tl.max(score_of(ends), axis=0)
    lower, upper = tl.minimum(tl.maximum(lower, -LARGEST), LARGEST), tl.minimum(tl.maximum(upper, -LARGEST), LARGEST)
    part = tl.arange(0, PIVOTS)
    share = part.to(tl.float32) / (PIVOTS - 1)
    tl.store(pivots + part * rows + row, key_of(lower * (1.0 - share) + upper * share + 0.0))


@triton.jit(do_not_specialize=["rows", "segments"])
def survey(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    pivots_given,
    scores,
    totals,
    counts,
    unsound,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per segment: the extreme scores, those of positive weight, the mass, that at each pivot, and whether invalid."""
    row, segment = this_place(segments)
    nothing, everything = tl.full([1, 1, BLOCK], -INFINITY, tl.float32), tl.full([1, 1, BLOCK], INFINITY, tl.float32)
    lowest, highest, first, last = everything, nothing, everything, nothing
    bad, of_all = tl.zeros([1, 1, BLOCK], tl.int32), tl.zeros([1, 1, BLOCK], tl.float32)
    pivot = tl.arange(0, PIVOTS)
    pivots = across(score_of(tl.load(pivots_given + pivot * rows + row)))
    total, found = tl.zeros([1, 1, BLOCK], tl.float32), tl.zeros([PIVOTS, 1, BLOCK], tl.float32)
    begin, end = segment_of(segment, n, row >= 0, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        x, able, sound = load_scores(x_given, where, row, column, inside, n, where_step)
        weights = None
        if weights_given is not None:
            weights, all_weights, usable = load_weights(weights_given, row, column, inside, able, weights_step)
            sound, of_all = sound & usable, of_all + all_weights
        lowest, highest = tl.minimum(lowest, tl.where(able, x, INFINITY)), tl.maximum(highest, x)
        bad = bad | tl.where(sound, 0, 1)
        if weights_given is None:
            total += masses_of(able, None)
        else:
            counted = able & (weights > 0.0)
            first = tl.minimum(first, tl.where(counted, x, INFINITY))
            last = tl.maximum(last, tl.where(counted, x, -INFINITY))
            total += weights
        found += masses_of(x >= pivots, weights)
    if weights_given is None:
        first, last = lowest, highest
    hand_on(scores, 0, row, rows, segment, segments, min_of(lowest))
    hand_on(scores, 1, row, rows, segment, segments, max_of(highest))
    hand_on(scores, 2, row, rows, segment, segments, min_of(first))
    hand_on(scores, 3, row, rows, segment, segments, max_of(last))
    hand_on(scores, 4, row, rows, segment, segments, sum_of(of_all))
    hand_on(totals, 0, row, rows, segment, segments, total_of(total, weights_given))
    hand_on(unsound, 0, row, rows, segment, segments, max_of(bad))
    hand_on(counts, pivot, row, rows, segment, segments, total_of(found, weights_given))


@triton.jit
def narrow(low, high, reached, pivots, counts, row, rows, segments, bar, going, SEGMENTS: tl.constexpr):
    """Narrow a bracket by the masses at and above each of several pivots, which rise."""
    pivot, segment = tl.arange(0, PIVOTS), tl.arange(0, SEGMENTS)[None, :]
    place = (pivot * rows + row.to(tl.int64))[:, None] * segments + segment
    found = tl.sum(tl.load(counts + place, mask=segment < segments, other=0), axis=1)
    # The mass falls as the pivots rise. The last pivot with enough mass is `low`; `high` is below the next pivot.
    enough = found > bar
    raised = tl.max(tl.where(enough, pivots, low), axis=0)
    lowered = tl.min(tl.where(enough, high, pivots - 1), axis=0)
    reached = tl.where(going & (raised > low), tl.min(tl.where(enough, found, reached), axis=0), reached)
    low = tl.where(going, tl.maximum(low, raised), low)
    return low, tl.where(going, tl.minimum(high, lowered), high), reached


@triton.jit(do_not_specialize=["rows", "segments"])
def open_bracket(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    pivots,
    scores,
    totals,
    counts,
    unsound,
    outer,
    flags,
    edges,
    bracket,
    mass,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per row: the combined results of the survey, and the bracket that they leave."""
    row = tl.program_id(0) + tl.arange(0, 1)
    k, _, valid = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    lowest = min_of(parts_of(scores, 0, row, rows, segments, SEGMENTS, INFINITY))
    highest = max_of(parts_of(scores, 1, row, rows, segments, SEGMENTS, -INFINITY))
    first = key_of(min_of(parts_of(scores, 2, row, rows, segments, SEGMENTS, INFINITY)) + 0.0)
    last = key_of(max_of(parts_of(scores, 3, row, rows, segments, SEGMENTS, -INFINITY)) + 0.0)
    total = sum_of(parts_of(totals, 0, row, rows, segments, SEGMENTS, 0))
    valid = valid & (max_of(parts_of(unsound, 0, row, rows, segments, SEGMENTS, 0)) == 0)
    k = tl.where(valid, k, 0.0)
    nothing = k <= 0.0
    of_all = sum_of(parts_of(scores, 4, row, rows, segments, SEGMENTS, 0.0))
    everything, enough = extent(k, total, of_all, n, weights_given)
    bar, _ = bars(k, weights_given)
    lowest = tl.where(bar < total, lowest, -INFINITY)
    valid = valid & enough
    keep(outer, 0, row, rows, lowest, 0)
    keep(outer, 1, row, rows, highest, 0)
    keep(flags, 0, row, rows, nothing, 0)
    keep(flags, 1, row, rows, everything, 0)
    keep(flags, 2, row, rows, valid, 0)
    keep(edges, 0, row, rows, first, 0)
    # A row without a search gets an empty bracket, so that the passes skip it.
    searched = valid & ~nothing & ~everything
    low, pivots = tl.where(searched, first, last), tl.load(pivots + tl.arange(0, PIVOTS) * rows + row)
    low, high, reached = narrow(low, last, total, pivots, counts, row, rows, segments, bar, searched, SEGMENTS)
    keep(bracket, 0, row, rows, low, 0)
    keep(bracket, 1, row, rows, high, 0)
    keep(mass, 0, row, rows, reached, 0)
    keep(mass, 1, row, rows, total, 0)


@triton.jit
def pivots_in(low, high):
    """Keys that cut a bracket into equal parts: above `low`, and at most `high`."""
    # The width of a bracket of 32-bit keys needs 64 bits.
    part = tl.arange(0, PIVOTS).to(tl.int64) + 1
    width = high.to(tl.int64) - low.to(tl.int64)
    return (low.to(tl.int64) + (width * part + PIVOTS) // (PIVOTS + 1)).to(tl.int32)


@triton.jit
def bracket_of(bracket, mass, counts, row, rows, segments, bar, lower_bar, near, weights, SEGMENTS: tl.constexpr):
    """The bracket after the previous pass, the mass at its lower end, and whether it must still be narrowed."""
    low, high, reached = field_of(bracket, 0, row, rows), field_of(bracket, 1, row, rows), field_of(mass, 0, row, rows)
    going = going_on(low, high, reached, bar, lower_bar, near, weights)
    if counts is not None:
        pivots = pivots_in(low, high)
        low, high, reached = narrow(low, high, reached, pivots, counts, row, rows, segments, bar, going, SEGMENTS)
        going = going_on(low, high, reached, bar, lower_bar, near, weights)
    return low, high, reached, going


@triton.jit(do_not_specialize=["rows", "segments"])
def count(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    bracket,
    mass,
    counts,
    next_bracket,
    next_mass,
    next_counts,
    near,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UPPER: tl.constexpr,
):
    """Per segment: the mass at and above each pivot, for the upper or the lower side of the gap."""
    row, segment = this_place(segments)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    bar, lower_bar = bars(k, weights_given)
    if not UPPER:  # the same search with the other bar finds the lower side
        bar = lower_bar
    low, high, reached, going = bracket_of(
        bracket, mass, counts, row, rows, segments, bar, lower_bar, near * tau, weights_given, SEGMENTS
    )
    keep(next_bracket, 0, row, rows, low, segment)
    keep(next_bracket, 1, row, rows, high, segment)
    keep(next_mass, 0, row, rows, reached, segment)
    pivots = across(score_of(pivots_in(low, high)))
    found = tl.zeros([PIVOTS, 1, BLOCK], tl.float32)
    begin, end = segment_of(segment, n, going, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        x, able, _sound = load_scores(x_given, where, row, column, inside, n, where_step)
        weights = None
        if weights_given is not None:
            weights, _all, _usable = load_weights(weights_given, row, column, inside, able, weights_step)
        found += masses_of(x >= pivots, weights)
    hand_on(next_counts, tl.arange(0, PIVOTS), row, rows, segment, segments, total_of(found, weights_given))


@triton.jit(do_not_specialize=["rows", "segments"])
def flank(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    bracket,
    mass,
    counts,
    last_mass,
    flanks,
    near,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per segment: the nearest scores at or above the lower bound that the passes have found, and below it."""
    row, segment = this_place(segments)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    bar, lower_bar = bars(k, weights_given)
    low, high, reached, _ = bracket_of(
        bracket, mass, counts, row, rows, segments, bar, lower_bar, near * tau, weights_given, SEGMENTS
    )
    keep(last_mass, 0, row, rows, reached, segment)
    # If both sides are closer to each other than tau, any score in the bracket will do, and nothing is read.
    close = is_close(low, high, reached, lower_bar, near * tau)
    upper = tl.zeros([1, 1, BLOCK], tl.float32) + across(tl.where(close, score_of(low), INFINITY))
    lower = tl.zeros([1, 1, BLOCK], tl.float32) + across(tl.where(close, score_of(low), -INFINITY))
    begin, end = segment_of(segment, n, ~close, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        x, able, _sound = load_scores(x_given, where, row, column, inside, n, where_step)
        weights = None
        if weights_given is not None:
            weights, _all, _usable = load_weights(weights_given, row, column, inside, able, weights_step)
        if weights_given is not None:  # an item of weight 0 is on no side of the gap
            x = tl.where(weights > 0.0, x, -INFINITY)
        above = x >= across(score_of(low))
        upper, lower = tl.minimum(upper, tl.where(above, x, INFINITY)), tl.maximum(lower, tl.where(above, -INFINITY, x))
    upper, lower = min_of(upper), max_of(lower)
    hand_on(flanks, 0, row, rows, segment, segments, upper)
    hand_on(flanks, 1, row, rows, segment, segments, lower)


@triton.jit(do_not_specialize=["rows", "segments"])
def open_lower_bracket(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    flanks,
    edges,
    mass,
    bracket,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per row with weights: the bracket of the lower side of the gap, if the two sides differ.

    Weights within the rounding of k may lie between the two sides, so the lower side needs a search of its own.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    k, _, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    _, lower_bar = bars(k, weights_given)
    lower = key_of(max_of(parts_of(flanks, 1, row, rows, segments, SEGMENTS, -INFINITY)) + 0.0)
    first, apart = field_of(edges, 0, row, rows), field_of(mass, 0, row, rows) <= lower_bar
    keep(bracket, 0, row, rows, tl.where(apart & (first < lower), first, lower), 0)
    keep(bracket, 1, row, rows, lower, 0)


# --- the threshold


@triton.jit(do_not_specialize=["rows", "segments"])
def frame_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    flanks,
    mass,
    outer,
    flags,
    bracket,
    total,
    counts,
    gap,
    state,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per row: both sides of the gap, their z, the reference, and the initial state of the search."""
    row = tl.program_id(0) + tl.arange(0, 1)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    nothing = field_of(flags, 0, row, rows) != 0
    everything, valid = field_of(flags, 1, row, rows) != 0, field_of(flags, 2, row, rows) != 0
    _, lower_bar = bars(k, weights_given)
    upper = min_of(parts_of(flanks, 0, row, rows, segments, SEGMENTS, INFINITY))
    if weights_given is None:
        lower = max_of(parts_of(flanks, 1, row, rows, segments, SEGMENTS, -INFINITY))
    else:
        below, _, _, _ = bracket_of(
            bracket, total, counts, row, rows, segments, lower_bar, lower_bar, 0.0 * tau, weights_given, SEGMENTS
        )
        lower = score_of(below)
    apart = field_of(mass, 0, row, rows) <= lower_bar
    lowest, highest = field_of(outer, 0, row, rows), field_of(outer, 1, row, rows)
    high = tl.where(nothing, highest, tl.where(everything, lowest, upper))
    low = tl.where(nothing | everything | ~apart | (lower == -INFINITY), high, lower)
    keep(flags, 3, row, rows, high > LARGEST, 0)
    high, low, reference, z_high, z_low = reference_of(high, low, tau)
    keep(gap, 0, row, rows, reference, 0)
    keep(gap, 1, row, rows, z_high, 0)
    keep(gap, 2, row, rows, z_low, 0)
    keep(gap, 3, row, rows, high, 0)
    keep(gap, 4, row, rows, low, 0)
    # The state of the search: the offset, the bracket, whether it is done, and whether the next step is the final one.
    fixed = (nothing | everything | ~valid).to(tl.float32)
    keep(state, 0, row, rows, 0.0 * tau, 0)
    keep(state, 1, row, rows, 0.0 * tau - INFINITY, 0)
    keep(state, 2, row, rows, 0.0 * tau + INFINITY, 0)
    keep(state, 3, row, rows, fixed, 0)
    keep(state, 4, row, rows, fixed, 0)


@triton.jit
def search_of(state, tails, above, steps, half, k, row, rows, segments, weights, SEGMENTS: tl.constexpr):
    """The state of the search after the previous pass: the offset, its bracket, and whether it is done."""
    offset, least, most = field_of(state, 0, row, rows), field_of(state, 1, row, rows), field_of(state, 2, row, rows)
    done, last = field_of(state, 3, row, rows) != 0.0, field_of(state, 4, row, rows) != 0.0
    if tails is not None:
        mass = sum_of(parts_of(above, 0, row, rows, segments, SEGMENTS, 0))
        lower = sum_of(parts_of(tails, 0, row, rows, segments, SEGMENTS, 0.0))
        upper = sum_of(parts_of(tails, 1, row, rows, segments, SEGMENTS, 0.0))
        slope = sum_of(parts_of(tails, 2, row, rows, segments, SEGMENTS, 0.0))
        offset, least, most, done, last = newton(
            offset, least, most, done, last, steps, mass, lower, upper, slope, half, k, weights
        )
    return offset, least, most, done, last


@triton.jit(do_not_specialize=["rows", "segments", "steps"])
def sweep_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    gap,
    state,
    tails,
    above,
    next_state,
    next_tails,
    next_above,
    steps,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per segment: the sums of a sweep at the offset of the previous pass."""
    row, segment = this_place(segments)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    reference, z_high, z_low = field_of(gap, 0, row, rows), field_of(gap, 1, row, rows), field_of(gap, 2, row, rows)
    high, low = field_of(gap, 3, row, rows), field_of(gap, 4, row, rows)
    half, excess = narrowed(z_high, z_low)
    # Every program makes the step for itself, from the sums of all segments in the previous pass.
    offset, least, most, done, last = search_of(
        state, tails, above, steps - 1, half, k, row, rows, segments, weights_given, SEGMENTS
    )
    keep(next_state, 0, row, rows, offset, segment)
    keep(next_state, 1, row, rows, least, segment)
    keep(next_state, 2, row, rows, most, segment)
    keep(next_state, 3, row, rows, done.to(tl.float32), segment)
    keep(next_state, 4, row, rows, last.to(tl.float32), segment)
    level, zero = tl.exp(offset), tl.zeros([1, 1, BLOCK], tl.float32)
    mass, both, upper, slope = zero, zero, zero, zero
    ordinary = is_ordinary(excess, tau, done)
    begin, end = segment_of(segment, n, ~done, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        x, able, _sound = load_scores(x_given, where, row, column, inside, n, where_step)
        weights = None
        if weights_given is not None:
            weights, _all, _usable = load_weights(weights_given, row, column, inside, able, weights_step)
        if ordinary:
            odds = odds_of(x, reference, z_high, z_low, tau)
        else:
            odds = narrow_gap(x, high, low, reference, z_high, z_low, tau)
        side, tails_here, upper_here, slope_here = tails_of(odds, weights, level)
        mass += masses_of(side, weights)
        both, upper, slope = both + tails_here, upper + upper_here, slope + slope_here
    above_it = sum_of(upper)
    lower = sum_of(both) - above_it
    hand_on(next_above, 0, row, rows, segment, segments, total_of(mass, weights_given))
    hand_on(next_tails, 0, row, rows, segment, segments, tl.where(lower < 0.0, 0.0, lower))
    hand_on(next_tails, 1, row, rows, segment, segments, above_it)
    hand_on(next_tails, 2, row, rows, segment, segments, sum_of(slope))


@triton.jit(do_not_specialize=["rows", "segments", "steps"])
def mask_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    gap,
    flags,
    state,
    tails,
    above,
    mask,
    offset_found,
    reference_found,
    settled,
    settled_flags,
    steps,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Write the mask of each segment and the threshold, or, without `mask`, the outputs of the solver primitive."""
    row, segment = this_place(segments)
    k, tau, _ = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    reference, z_high, z_low = field_of(gap, 0, row, rows), field_of(gap, 1, row, rows), field_of(gap, 2, row, rows)
    high, low = field_of(gap, 3, row, rows), field_of(gap, 4, row, rows)
    nothing, everything = field_of(flags, 0, row, rows) != 0, field_of(flags, 1, row, rows) != 0
    half, excess = narrowed(z_high, z_low)
    offset, _, _, _, _ = search_of(
        state, tails, above, steps - 1, half, k, row, rows, segments, weights_given, SEGMENTS
    )
    valid = (field_of(flags, 2, row, rows) != 0) & (offset == offset)
    level = tl.exp(offset)
    offset += 0.5 * (z_high + z_low)  # the search measures it from the middle of the gap
    leads = segment + tl.arange(0, 1) == 0  # only the first segment stores the values of a row
    if mask is None:
        most = field_of(flags, 3, row, rows) != 0
        store_settled(
            settled, settled_flags, row, rows, leads, reference, offset, z_high, z_low, nothing, everything, valid, most
        )
    else:
        offset = final_offset(offset, nothing, everything, valid)
        tl.store(reference_found + row, reference, mask=leads)
        tl.store(offset_found + row, offset, mask=leads)
        ordinary = is_ordinary(excess, tau, nothing | everything | ~valid)
        begin, end = segment_of(segment, n, row >= 0, LENGTH)
        for start in range(begin, end, BLOCK):
            column = columns(start, 1, BLOCK)
            inside = column < n
            x, able, _sound = load_scores(x_given, where, row, column, inside, n, where_step)
            weights = None
            if weights_given is not None:
                weights, _all, _usable = load_weights(weights_given, row, column, inside, able, weights_step)
            if weights is None and ordinary:
                soft = ordinary_mask(odds_of(x, reference, z_high, z_low, tau), level)
            else:
                odds = narrow_gap(x, high, low, reference, z_high, z_low, tau)
                soft = finish(x, odds, level, excess, weights, reference, tau, offset, nothing, everything, valid)
            tl.store(mask + across(row.to(tl.int64)) * n + column, soft, mask=inside)


# --- the rule in reverse


@triton.jit(do_not_specialize=["rows", "segments"])
def nearest_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    distances,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Per segment: the nearest scores of positive weight, and the largest weight.

    With SIDES these are the nearest scores above and below the threshold, else the smallest |z|.
    """
    row, segment = this_place(segments)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset, reference = field_of(offset_given, 0, row, rows), field_of(reference_given, 0, row, rows)
    high, low = tl.full([1, 1, BLOCK], INFINITY, tl.float32), tl.full([1, 1, BLOCK], -INFINITY, tl.float32)
    heaviest = tl.zeros([1, 1, BLOCK], tl.float32)
    begin, end = segment_of(segment, n, row >= 0, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        kept = load_kept(where, row, column, inside, where_step)
        x = load_tile(x_given, row, column, kept, n, -INFINITY).to(tl.float32)
        z = log_odds(x, reference, tau, offset)
        weights = None
        if weights_given is not None:
            weights = load_tile(weights_given, row, column, inside, weights_step, 0.0)
            heaviest = tl.maximum(heaviest, tl.where(x > -INFINITY, weights, 0.0))
        if SIDES:
            above, below = edge_of(x, z, inside, weights)
            high, low = tl.minimum(high, above), tl.maximum(low, below)
        else:
            high = tl.minimum(high, distance_of(z, inside, weights))
    hand_on(distances, 0, row, rows, segment, segments, min_of(high))
    hand_on(distances, 1, row, rows, segment, segments, max_of(low))
    hand_on(distances, 2, row, rows, segment, segments, max_of(heaviest))


@triton.jit
def nearest_in(distance):
    """The smallest |z| of a row, as `nearest_of`."""
    return tl.minimum(distance, 0.5 * FARTHEST)


@triton.jit
def edges_in(distances, row, rows, segments, SEGMENTS: tl.constexpr):
    """The results of `nearest_rows` for a row."""
    return (
        min_of(parts_of(distances, 0, row, rows, segments, SEGMENTS, INFINITY)),
        max_of(parts_of(distances, 1, row, rows, segments, SEGMENTS, -INFINITY)),
        safe_denominator(max_of(parts_of(distances, 2, row, rows, segments, SEGMENTS, 0.0))),
    )


@triton.jit
def greater(values, u, share, best, u_best, share_best):
    """Update the greatest value in each column of a tile, and u and the share there."""
    better = values > best
    best, u_best = tl.where(better, values, best), tl.where(better, u, u_best)
    return best, u_best, tl.where(better, share, share_best)


@triton.jit
def greatest(values, u, share):
    """The greatest value of a row, and u and the share there. Equal greatest values do not dominate: any will do."""
    best = max_of(values)
    at = values == across(best)
    return best, max_of(tl.where(at, u, -INFINITY)), max_of(tl.where(at, share, 0.0))


@triton.jit(do_not_specialize=["rows", "segments"])
def sum_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    u_given,
    distances,
    sums,
    masses,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Per segment: V', <v', u>, <v', share>, and the greatest a v'.

    With SIDES these and the tails are summed for each side of the threshold. Each side then has its own units, which
    `join_rows` balances. Otherwise there is one sum, which takes the place of that above.
    """
    row, segment = this_place(segments)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset, reference = field_of(offset_given, 0, row, rows), field_of(reference_given, 0, row, rows)
    high, low, unit = edges_in(distances, row, rows, segments, SEGMENTS)
    if SIDES:
        high, low, near_high, near_low, across_high, across_low = sides_of(high, low, reference, tau, offset)
    else:
        nearest = nearest_in(high)
    zero = tl.zeros([1, 1, BLOCK], tl.float32)
    tails_below, normal_below, pulled_below, shares_below = zero, zero, zero, zero
    tails_above, normal_above, pulled_above, shares_above = zero, zero, zero, zero
    most_below, u_below, share_below, most_above, u_above, share_above = zero, zero, zero, zero, zero, zero
    mass = zero
    begin, end = segment_of(segment, n, row >= 0, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        kept = load_kept(where, row, column, inside, where_step)
        x = load_tile(x_given, row, column, kept, n, -INFINITY).to(tl.float32)
        z = log_odds(x, reference, tau, offset)
        weights = None
        if weights_given is not None:
            weights = load_tile(weights_given, row, column, inside, weights_step, 0.0)
        u = load_cotangent(u_given, row, column, kept, n)
        if SIDES:
            distance, height = from_sides(
                x, z, inside, weights, high, low, near_high, near_low, across_high, across_low, tau
            )
        else:
            distance, height = from_nearest(z, inside, weights, nearest), across(tl.exp(-nearest))
        tail, larger = tail_of(distance, height)
        scaled = tail / larger
        if weights_given is None:
            share = tl.where(inside, 1.0, 0.0)
        else:
            share = tl.where(scaled > 0.0, weights, 0.0) / across(unit)
        if SIDES:
            upper = z > 0.0
            mass += masses_of(upper & inside, weights)
            tail = weigh(weights, tail)
            tails_below, tails_above = (
                tails_below + tl.where(upper, 0.0, tail),
                tails_above + tl.where(upper, tail, 0.0),
            )
            below, scaled = tl.where(upper, 0.0, scaled), tl.where(upper, scaled, 0.0)
            weighted = weigh(weights, below)
            normal_below, pulled_below = normal_below + weighted, pulled_below + below * u
            shares_below += below * share
            most_below, u_below, share_below = greater(weighted, u, share, most_below, u_below, share_below)
        weighted = weigh(weights, scaled)
        normal_above, pulled_above = normal_above + weighted, pulled_above + scaled * u
        shares_above += scaled * share
        most_above, u_above, share_above = greater(weighted, u, share, most_above, u_above, share_above)
    most_below, u_below, share_below = greatest(most_below, u_below, share_below)
    most_above, u_above, share_above = greatest(most_above, u_above, share_above)
    hand_on(masses, 0, row, rows, segment, segments, total_of(mass, weights_given))
    hand_on(sums, 0, row, rows, segment, segments, sum_of(tails_below))
    hand_on(sums, 1, row, rows, segment, segments, sum_of(tails_above))
    hand_on(sums, 2, row, rows, segment, segments, sum_of(normal_below))
    hand_on(sums, 3, row, rows, segment, segments, sum_of(normal_above))
    hand_on(sums, 4, row, rows, segment, segments, sum_of(pulled_below))
    hand_on(sums, 5, row, rows, segment, segments, sum_of(pulled_above))
    hand_on(sums, 6, row, rows, segment, segments, sum_of(shares_below))
    hand_on(sums, 7, row, rows, segment, segments, sum_of(shares_above))
    hand_on(sums, 8, row, rows, segment, segments, most_below)
    hand_on(sums, 9, row, rows, segment, segments, u_below)
    hand_on(sums, 10, row, rows, segment, segments, share_below)
    hand_on(sums, 11, row, rows, segment, segments, most_above)
    hand_on(sums, 12, row, rows, segment, segments, u_above)
    hand_on(sums, 13, row, rows, segment, segments, share_above)


@triton.jit
def both_of(sums, field, row, rows, segments, SEGMENTS: tl.constexpr):
    """The sums over a row below and above the threshold."""
    return (
        sum_of(parts_of(sums, field, row, rows, segments, SEGMENTS, 0.0)),
        sum_of(parts_of(sums, field + 1, row, rows, segments, SEGMENTS, 0.0)),
    )


@triton.jit
def greatest_of(sums, field, row, rows, segments, SEGMENTS: tl.constexpr):
    """The greatest value of a row over all segments, and u and the share there."""
    values = parts_of(sums, field, row, rows, segments, SEGMENTS, 0.0)
    u = parts_of(sums, field + 1, row, rows, segments, SEGMENTS, 0.0)
    share = parts_of(sums, field + 2, row, rows, segments, SEGMENTS, 0.0)
    return greatest(values, u, share)


@triton.jit(do_not_specialize=["rows", "segments"])
def join_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    c_given,
    distances,
    sums,
    masses,
    of_k,
    joined,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Per row: the balance of the two sides, V', the level from which u is measured, and the cotangent of k."""
    row = tl.program_id(0) + tl.arange(0, 1)
    k, tau = load_per_row(k_given, row, rows, k_step, 0.0), load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset, reference = field_of(offset_given, 0, row, rows), field_of(reference_given, 0, row, rows)
    c = tl.zeros([1], tl.float32)
    if c_given is not None:
        c = field_of(c_given, 0, row, rows)
    high, low, unit = edges_in(distances, row, rows, segments, SEGMENTS)
    if SIDES:
        _, _, near_high, near_low, _, _ = sides_of(high, low, reference, tau, offset)
        below, above = both_of(sums, 0, row, rows, segments, SEGMENTS)
        mass = sum_of(parts_of(masses, 0, row, rows, segments, SEGMENTS, 0))
        nearest, less, more = balance_of(mass, below, above, k, near_high, near_low, weights_given)
    else:
        nearest, less, more = nearest_in(high), 0.0 * offset, 0.0 * offset + 1.0
    below, above = both_of(sums, 2, row, rows, segments, SEGMENTS)
    normal = safe_denominator(less * below + more * above)
    origin = tl.where(more * above > less * below, high, low)  # the side that has more of p
    origin = tl.minimum(tl.maximum(tl.where(tl.abs(origin) == INFINITY, reference, origin), -LARGEST), LARGEST)
    below, above = both_of(sums, 4, row, rows, segments, SEGMENTS)
    pulled = less * below + more * above
    below, above = both_of(sums, 6, row, rows, segments, SEGMENTS)
    shares = less * below + more * above
    most_below, u_below, share_below = greatest_of(sums, 8, row, rows, segments, SEGMENTS)
    most_above, u_above, share_above = greatest_of(sums, 11, row, rows, segments, SEGMENTS)
    # Whether the greatest item below or above the threshold dominates p.
    lower, upper = less * most_below > normal * DOMINANCE, more * most_above > normal * DOMINANCE
    at_most = tl.where(upper, u_above / safe_denominator(share_above), u_below / safe_denominator(share_below))
    rate, inverse_slope = rates(nearest, normal)
    hbar = rate * pulled - inverse_slope * c
    keep(joined, 0, row, rows, nearest, 0)
    keep(joined, 1, row, rows, less, 0)
    keep(joined, 2, row, rows, normal, 0)
    keep(joined, 3, row, rows, tl.where(lower | upper, at_most, pulled / safe_denominator(shares)), 0)
    keep(joined, 4, row, rows, unit, 0)
    keep(joined, 5, row, rows, hbar, 0)
    keep(joined, 6, row, rows, (lower | upper).to(tl.float32), 0)
    keep(joined, 7, row, rows, more, 0)
    keep(joined, 8, row, rows, high, 0)
    keep(joined, 9, row, rows, low, 0)
    keep(joined, 10, row, rows, origin, 0)
    if of_k is not None:
        keep(of_k, 0, row, rows, tl.where(offset == offset, hbar, float("nan")), 0)


@triton.jit
def rule_of(x, z, u, inside, weights, joined, reference, tau, offset, row, rows, SIDES: tl.constexpr):
    """v', v, and the multiple of the weights from which u is measured, for a tile."""
    nearest, normal = field_of(joined, 0, row, rows), field_of(joined, 2, row, rows)
    level, unit = field_of(joined, 3, row, rows), field_of(joined, 4, row, rows)
    held = field_of(joined, 6, row, rows) != 0.0
    if SIDES:
        less, more = field_of(joined, 1, row, rows), field_of(joined, 7, row, rows)
        high, low = field_of(joined, 8, row, rows), field_of(joined, 9, row, rows)
        high, low, near_high, near_low, across_high, across_low = sides_of(high, low, reference, tau, offset)
        distance, height = from_sides(
            x, z, inside, weights, high, low, near_high, near_low, across_high, across_low, tau
        )
        tail, larger = tail_of(distance, height)
        scaled = tail * tl.where(z > 0.0, across(more), across(less)) / larger
    else:
        tail, larger = tail_of(from_nearest(z, inside, weights, nearest), across(tl.exp(-nearest)))
        scaled = tail / larger
    if weights is None:
        level = tl.where(inside, across(level), 0.0)
    else:
        level = tl.where(scaled > 0.0, weights, 0.0) / across(unit) * across(level)
    # At a dominating item the level is exactly u. It has more than 3/4 of p, and every other item less than 1/4.
    most = across(held) & (weigh(weights, scaled) > across(0.5 * normal))
    return scaled, gain_of(z, scaled, tl.exp(-nearest), weights), tl.where(most, u, level)


@triton.jit(do_not_specialize=["rows", "segments"])
def gain_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    u_given,
    joined,
    gains,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Per segment: <v, u>, with u measured from its level."""
    row, segment = this_place(segments)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset, reference = field_of(offset_given, 0, row, rows), field_of(reference_given, 0, row, rows)
    gained = tl.zeros([1, 1, BLOCK], tl.float32)
    begin, end = segment_of(segment, n, row >= 0, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        kept = load_kept(where, row, column, inside, where_step)
        x = load_tile(x_given, row, column, kept, n, -INFINITY).to(tl.float32)
        z = log_odds(x, reference, tau, offset)
        weights = None
        if weights_given is not None:
            weights = load_tile(weights_given, row, column, inside, weights_step, 0.0)
        u = load_cotangent(u_given, row, column, kept, n)
        _, gain, level = rule_of(x, z, u, inside, weights, joined, reference, tau, offset, row, rows, SIDES)
        gained += (u - level) * gain
    hand_on(gains, 0, row, rows, segment, segments, sum_of(gained))


@triton.jit(do_not_specialize=["rows", "segments"])
def pull_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    u_given,
    c_given,
    joined,
    gains,
    of_x,
    of_weights,
    moments,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Per segment: the cotangents of the scores and of the weights, and <z - z_ref, xbar>."""
    row, segment = this_place(segments)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset, reference = field_of(offset_given, 0, row, rows), field_of(reference_given, 0, row, rows)
    normal, hbar = field_of(joined, 2, row, rows), field_of(joined, 5, row, rows)
    origin = field_of(joined, 10, row, rows)
    # p g cancels the rest of the weighted mean of u, and adds the cotangent c of the offset.
    g = -sum_of(parts_of(gains, 0, row, rows, segments, SEGMENTS, 0.0))
    if c_given is not None:
        g += field_of(c_given, 0, row, rows)
    bad = across(offset != offset)
    moment = tl.zeros([1, 1, BLOCK], tl.float32)
    begin, end = segment_of(segment, n, row >= 0, LENGTH)
    for start in range(begin, end, BLOCK):
        column = columns(start, 1, BLOCK)
        inside = column < n
        kept = load_kept(where, row, column, inside, where_step)
        x = load_tile(x_given, row, column, kept, n, -INFINITY).to(tl.float32)
        z = log_odds(x, reference, tau, offset)
        weights = None
        if weights_given is not None:
            weights = load_tile(weights_given, row, column, inside, weights_step, 0.0)
        u = load_cotangent(u_given, row, column, kept, n)
        scaled, gain, level = rule_of(x, z, u, inside, weights, joined, reference, tau, offset, row, rows, SIDES)
        xbar = cotangent_of(x, u - level, gain, scaled, weights, normal, g, tau)
        place = across(row.to(tl.int64)) * n + column
        invalid = tl.where(kept, float("nan"), 0.0)
        if of_x is not None:
            tl.store(of_x + place, tl.where(bad, invalid, xbar), mask=inside)
        if of_weights is not None:
            abar = -sigmoid(z) * across(hbar)
            tl.store(of_weights + place, tl.where(bad, float("nan"), abar), mask=inside)
        if moments is not None:
            moment += spaced(x, origin, tau) * xbar
    if moments is not None:
        hand_on(moments, 0, row, rows, segment, segments, sum_of(moment))


@triton.jit(do_not_specialize=["rows", "segments"])
def temperature_rows(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    c_given,
    joined,
    moments,
    of_tau,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    segments,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Per row: the cotangent of the temperature."""
    row = tl.program_id(0) + tl.arange(0, 1)
    tau, offset = load_per_row(tau_given, row, rows, tau_step, 1.0), field_of(offset_given, 0, row, rows)
    taubar = -sum_of(parts_of(moments, 0, row, rows, segments, SEGMENTS, 0.0))
    if c_given is not None:
        origin, reference = field_of(joined, 10, row, rows), field_of(reference_given, 0, row, rows)
        taubar -= field_of(c_given, 0, row, rows) * level_of(origin, reference, tau) / tau
    keep(of_tau, 0, row, rows, tl.where(offset == offset, taubar, float("nan")), 0)
