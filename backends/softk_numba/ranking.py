"""The ranks of the scores of one slice, from its plan: `softk._reference.plan.ranking` as loops.

The scores are sorted, the highest first, and all numbers are float64. `bands` has the plan. With fewer anchors than
scores, the ranks are interpolated between nodes: the largest score, the means of the anchors, and the smallest score.
"""

from __future__ import annotations

import math

from softk._reference.plan.ranking import CLOSE

from .cache import compiled
from .operations import EXACT

#: Which rank an anchor gives to a node: the first that it takes, that in the middle, or the last.
FIRST, MIDDLE, LAST = 0, 1, 2
#: A rounding of the numbers here.
EPS = 2.0**-52


# --- the nodes


@compiled(EXACT)
def fill_nodes(scores, means, nodes):
    """The scores of the nodes. A mean that is infinite counts as the outermost finite score.

    `scores` are the sorted scores, how many they are, and how many of them are infinite.
    """
    x, taken, infinite = scores
    top, low = (x[infinite], x[taken - 1]) if infinite < taken else (0.0, 0.0)
    last = nodes.shape[0] - 1
    nodes[0], nodes[last] = top, low
    for k in range(1, last):
        nodes[k] = min(max(means[k - 1], low), top)


@compiled(EXACT)
def ties_of(scores):
    """How many finite scores are the largest, and the smallest."""
    x, taken, infinite = scores
    stop, start = infinite, taken
    while stop < taken and x[stop] == x[infinite]:
        stop += 1
    while start > infinite and x[start - 1] == x[taken - 1]:
        start -= 1
    return stop - infinite, taken - start


@compiled(EXACT)
def kind_of(k, means):
    """Which of their ranks the anchors give to a node."""
    if k == 0 or (k <= means.shape[0] and means[k - 1] == math.inf):
        return FIRST
    return LAST if k > means.shape[0] or means[k - 1] == -math.inf else MIDDLE


@compiled(EXACT)
def rank_of(j, kind, anchors):
    """The rank that anchor j gives to a node of that kind.

    `anchors` are their mass, how many scores there are, how many are +inf, and how many of the others are the largest
    and the smallest.
    """
    unit, count, infinite, ties = anchors
    begin, end = min(max(unit * j, infinite), count), min(max(unit * (j + 1), infinite), count)
    middle = 0.5 * (begin + end) - 0.5
    if kind == FIRST and begin == infinite:
        return middle - max(0.5 * (end - begin - ties[0]), 0.0)
    return middle + max(0.5 * (end - begin - ties[1]), 0.0) if kind == LAST and end == count else middle


@compiled(EXACT)
def share_node(x, peak, boundaries, share):
    """The shares of a node, and the anchors from the first to the last that gets one.

    `peak` is a lower bound of the anchor that gets the largest share. That anchor is returned, too. `boundaries` are
    their temperature, reference, offset and number, and the least share beside the largest.
    """
    tau, reference, offset, active, cut = boundaries
    while peak < active and (x - reference[peak]) / tau < offset[peak]:
        peak += 1
    share[peak] = total = 1.0
    begin = end = peak
    while begin > 0:
        value = share[begin] * math.exp((x - reference[begin - 1]) / tau - offset[begin - 1])
        if value < cut:
            break
        begin -= 1
        share[begin] = value
        total += value
    while end < active:
        value = share[end] * math.exp(offset[end] - (x - reference[end]) / tau)
        if value < cut:
            break
        end += 1
        share[end] = value
        total += value
    for j in range(begin, end + 1):
        share[j] /= total
    return begin, end, peak


@compiled(EXACT)
def rank_nodes(nodes, means, anchors, boundaries, share, ranks, slopes):
    """The ranks of the nodes, and how fast they fall with the score: the covariance of j and the rank of anchor j."""
    peak = 0
    for k in range(nodes.shape[0]):
        begin, end, peak = share_node(nodes[k], peak, boundaries, share)
        kind, ranks[k], slopes[k] = kind_of(k, means), 0.0, 0.0
        number = 0.0
        for j in range(begin, end + 1):
            ranks[k] += share[j] * rank_of(j, kind, anchors)
            number += share[j] * j
        for j in range(begin, end + 1):
            slopes[k] += share[j] * (j - number) * (rank_of(j, kind, anchors) - ranks[k])
        slopes[k] /= boundaries[0]


@compiled(EXACT)
def place_between(x, k, nodes, ranks, slopes):
    """The place of a score between two nodes, from 0 to 1, and how fast its rank falls with it.

    A score that equals a node up to its rounding has what the node has.
    """
    least = CLOSE * EPS * max(math.fabs(nodes[0]), math.fabs(nodes[nodes.shape[0] - 1]))
    if nodes[k] - x <= least:
        return 0.0, slopes[k]
    if x - nodes[k + 1] <= least:
        return 1.0, slopes[k + 1]
    width = nodes[k] - nodes[k + 1]
    return (nodes[k] - x) / width, (ranks[k + 1] - ranks[k]) / width


@compiled(EXACT)
def interpolate(scores, nodes, ranks, slopes, found):
    """The ranks of the scores."""
    x, taken, infinite = scores
    k, last = 0, nodes.shape[0] - 2
    for i in range(infinite):
        found[i] = 0.5 * (infinite - 1.0)
    for i in range(infinite, taken):
        while k < last and nodes[k + 1] > x[i]:
            k += 1
        place, _ = place_between(x[i], k, nodes, ranks, slopes)
        found[i] = (1.0 - place) * ranks[k] + place * ranks[k + 1]


# --- their derivative


@compiled(EXACT)
def pull_scores(row, scores, nodes, ranks, slopes, index, ubar, xbar, by_node, by_rank):
    """The cotangents of the scores, of the nodes and of their ranks at constant nodes, from those of the ranks."""
    x, taken, infinite = scores
    k, last = 0, nodes.shape[0] - 2
    for one in range(nodes.shape[0]):
        by_node[one] = by_rank[one] = 0.0
    for i in range(infinite, taken):
        while k < last and nodes[k + 1] > x[i]:
            k += 1
        place, slope = place_between(x[i], k, nodes, ranks, slopes)
        value = ubar[row, index[i]]
        by_rank[k] += (1.0 - place) * value
        by_rank[k + 1] += place * value
        xbar[i] = -slope * value
        by_node[k] += (1.0 - place) * (slope * value)
        by_node[k + 1] += place * (slope * value)


@compiled(EXACT)
def pull_nodes(nodes, means, anchors, boundaries, share, room, by_rank, by_node, by_offset):
    """Add the cotangents of the nodes, and fill in those of the offsets, from those of the ranks of the nodes.

    Returns the cotangent of the temperature. `room` is room for two numbers for each anchor.
    """
    tau, reference, _, _, _ = boundaries
    for j in range(by_offset.shape[0]):
        by_offset[j] = 0.0
    before, behind = room[0], room[1]
    peak, taubar = 0, 0.0
    for k in range(nodes.shape[0]):
        begin, end, peak = share_node(nodes[k], peak, boundaries, share)
        kind = kind_of(k, means)
        above = total = 0.0
        for j in range(begin, end):
            above += share[j]
            rise = rank_of(j + 1, kind, anchors) - rank_of(j, kind, anchors)
            total += above * rise
            before[j] = total
        below = total = 0.0
        for j in range(end - 1, begin - 1, -1):
            # The shares below boundary j, and their products with what is behind it.
            below += share[j + 1]
            behind[j] = total
            rise = rank_of(j + 1, kind, anchors) - rank_of(j, kind, anchors)
            total += below * rise
            before[j] *= below
        above = 0.0
        for j in range(begin, end):
            above += share[j]
            zbar = -by_rank[k] * (before[j] + above * behind[j])
            by_node[k] += zbar / tau
            by_offset[j] -= zbar
            taubar -= zbar * ((nodes[k] - reference[j]) / tau) / tau
    return taubar


@compiled(EXACT)
def pull_means(scores, ties, means, by_node, vbar, xbar):
    """The cotangents of the means, and those of the outermost scores, which ties share, from those of the nodes."""
    last = means.shape[0] + 1
    top, low = by_node[0], by_node[last]
    for j in range(means.shape[0]):
        vbar[j] = 0.0
        if means[j] == math.inf:
            top += by_node[j + 1]
        elif means[j] == -math.inf:
            low += by_node[j + 1]
        else:
            vbar[j] = by_node[j + 1]
    _, taken, infinite = scores
    for i in range(infinite, infinite + ties[0]):
        xbar[i] += top / ties[0]
    for i in range(taken - ties[1], taken):
        xbar[i] += low / ties[1]
