"""The scores of a slice that matter for its boundaries, in descending order."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .cache import compiled
from .operations import EXACT, FAST, larger, smaller
from .pointers import behind, pointer_to
from .vectors import INLINED

#: Runs of so many scores are sorted by insertion. So are all scores, if no bucket has more of them.
RUN = 16
#: How many samples there are for each score that is looked for.
SAMPLES = 8


class Room(NamedTuple):
    """Room for sorting."""

    index: Any  # where the scores come from
    others: Any  # integers
    starts: Any
    scores: Any


@compiled(EXACT)
def sizes_of(n, b):
    """How many integers and how many numbers `room_of` needs for n scores and b boundaries."""
    return 3 * (n + 2), max(n, SAMPLES * b) + 2


@compiled(EXACT)
def room_of(integers, numbers, n):
    """Room for n scores, from the items of two arrays."""
    start = pointer_to(integers)
    return Room(start, behind(start, n + 2), behind(start, 2 * (n + 2)), pointer_to(numbers))


# --- which scores


@compiled(FAST)
def survey(x):
    """How many scores can be selected, how many are +inf, the lowest, the largest size, and whether none is NaN."""
    count = infinite = numbers = 0
    lowest, size = math.inf, 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        able = value > -math.inf
        count += able
        infinite += value == math.inf
        numbers += value == value
        lowest = smaller(lowest, value if able else math.inf)
        size = larger(size, math.fabs(value) if able else 0.0)
    return count, infinite, lowest, size, numbers == x.shape[0]


@compiled(EXACT)
def beneath(score, reach):
    """A number that lies below a score by at least `reach`, or by a few roundings if these are more."""
    return score - max(reach, 2.0**-50 * math.fabs(score))


@compiled(FAST)
def write_samples(x, count, samples):
    """The largest score of every so many."""
    for i in range(count):
        samples[i] = x[i]
    for start in range(count, x.shape[0] - count + 1, count):
        for i in range(count):
            samples[i] = larger(samples[i], np.float64(x[start + i]))


@compiled(INLINED)
def level_of(x, rank, reach, largest, room):
    """A level below which no score matters: `reach` below a lower bound of the score of a rank; -inf for all scores.

    The score of that rank among a sample is not above the one among all.
    """
    count, samples = SAMPLES * rank, room.scores
    if 2 * count > x.shape[0]:
        return -math.inf
    write_samples(x, count, samples)
    # The first places become the largest samples.
    for i in range(1, count):
        found = samples[i]
        place = min(i, rank)
        if place == rank:
            if not found > samples[rank - 1]:
                continue
            place -= 1
        while place > 0 and samples[place - 1] < found:
            samples[place] = samples[place - 1]
            place -= 1
        samples[place] = found
    return beneath(min(samples[rank - 1], largest), reach)


@compiled(FAST)
def nearest_below(x, threshold, largest):
    """The largest score that is not above a threshold. +inf counts as the largest number."""
    nearest = -math.inf
    for i in range(x.shape[0]):
        value = smaller(np.float64(x[i]), largest)
        nearest = larger(nearest, value if value <= threshold else -math.inf)
    return nearest


@compiled(INLINED)
def nearest_level(x, threshold, reach, largest):
    """The level for a boundary that is known: `reach` below it, or below the score next to it in a wide gap."""
    return beneath(min(threshold, nearest_below(x, threshold, largest)), reach)


# --- their order


@compiled(INLINED)
def gather(x, level, infinite, largest, into, room):
    """The scores above a level in descending order, in float64, and where they come from.

    +inf counts as the largest number of the dtype. `infinite` is how many of them there are; they come first.
    """
    scores, others = room.scores, room.others
    count = 0
    for i in range(x.shape[0]):
        scores[count], others[count] = x[i], i
        count += 1 if x[i] > level else 0
    most = scatter(count, largest, scores, others, into, room.index, room.starts)
    insert(into, room.index, count, max(count, RUN) if most <= RUN else RUN)
    if most > RUN:
        merge(into, room.index, count, scores, others)
    for i in range(infinite):
        into[i] = largest
    return count


@compiled(FAST)
def range_of(scores, count, largest):
    """The lowest and the highest of the first scores."""
    low, high = math.inf, -math.inf
    for i in range(count):
        value = smaller(scores[i], largest)
        low, high = smaller(low, value), larger(high, value)
    return low, high


@compiled(INLINED)
def scatter(count, largest, scores, others, into, index, starts):
    """Put scores and index into buckets of equal width, the highest first; returns how many the fullest has."""
    low, high = range_of(scores, count, largest)
    width = count / (high - low) if count > RUN and high > low else 0.0
    if not (0.0 < width < math.inf):
        for i in range(count):
            into[i], index[i] = scores[i], others[i]
        return count
    for i in range(count + 2):
        starts[i] = 0
    for i in range(count):
        starts[np.int64((high - min(scores[i], largest)) * width) + 1] += 1
    most = total = 0
    for i in range(count + 2):
        most, total = max(most, starts[i]), total + starts[i]
        starts[i] = total
    for i in range(count):
        bucket = np.int64((high - min(scores[i], largest)) * width)
        place = starts[bucket]
        into[place], index[place] = scores[i], others[i]
        starts[bucket] = place + 1
    return most


@compiled(INLINED)
def insert(into, index, count, run):
    """Sort runs by insertion."""
    for start in range(0, count, run):
        for i in range(start + 1, min(start + run, count)):
            value, place, j = into[i], index[i], i
            while j > start and into[j - 1] < value:
                into[j], index[j] = into[j - 1], index[j - 1]
                j -= 1
            into[j], index[j] = value, place


@compiled(EXACT)
def merge(into, index, count, scores, others):
    """Merge the runs."""
    width = RUN
    while width < count:
        for start in range(0, count, 2 * width):
            middle, stop = min(start + width, count), min(start + 2 * width, count)
            one, other = start, middle
            for i in range(start, stop):
                if one < middle and (other >= stop or into[one] >= into[other]):
                    scores[i], others[i] = into[one], index[one]
                    one += 1
                else:
                    scores[i], others[i] = into[other], index[other]
                    other += 1
        for i in range(count):
            into[i], index[i] = scores[i], others[i]
        width *= 2
