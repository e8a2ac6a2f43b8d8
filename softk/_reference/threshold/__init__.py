r"""The threshold of the soft top-k: how it is solved, and its derivative.

Entropic optimal transport between n scores and the two anchors 0 and 1 has one unknown, the threshold t
(Xie et al., NeurIPS 2020, section 3, in the limit of their iteration):

    mask_i = sigmoid(z_i),   z_i = (x_i - t) / tau,   tau = epsilon / 2,   sum_i a_i mask_i = k.

**Two parts.** One floating-point number cannot resolve t to a fraction of tau when the scores are large beside
tau. So t = r + tau s: the reference r is the k-th largest *score*, or for a whole k the middle between it and the next,
and x_i - r is exact or nearly so for the scores that matter; the offset s, in units of tau, is the unknown.

The modules, from the ground up:

- `limits`: what a dtype can hold, and the tolerances;
- `formulas`: what is computed once per slice;
- `problem`: the scores in units of tau, the weights, and sums over a slice;
- `ends`: the gap in which the threshold lies;
- `newton`: the steps to it;
- `window`: the scores near it;
- `solve`: the threshold, from all of these;
- `rule`: the derivative;
- `masks`, `quantile`: the operators that are made of a threshold;
- `pieces`, `split`, `segments`: slices whose items lie in several arrays;
- `passes`, `replay`: slices whose items are held one chunk at a time;
- `sparse`: the largest weights of a network, from the hard mask.
"""
