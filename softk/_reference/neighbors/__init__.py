r"""Nearest neighbors as primitives, computed for a block of queries at a time.

The scores of a query are its negative squared distances to the keys, up to a shift per query, and m is the mask of
`softk.topk`. Three primitives are computed from it, each with its derivative in both directions:

    weights          m                                           (q, n)
    votes            o = m V / k                                 (q, c)
    log likelihood   l = log(sum_j m_j a_j + f k) - log k        (q, 1)

with the values V (n, c) of the keys and the floor f. The agreement a_j of a query's label with the label of key j is 1
or 0 for equal or different integers, and the inner product for rows. The likelihood is computed from log m, which does
not underflow, so a query far from all keys of its class has a gradient towards them. For cotangents u,

    votes            mbar = u V^T / k,   Vbar = m^T u / k,   kbar = -<u, o> / k
    log likelihood   (log m)bar_j = u s_j,   abar_j = u s_j / a_j,   kbar = -u sum_j s_j / k,
                     s_j = m_j a_j / (sum m a + f k)

and the rule of the threshold maps the cotangent of the mask, or of its logarithm, to that of the scores, k and the
temperature. With the cotangent X of the scores x_ij = -|q_i - y_j|^2,

    qbar = 2 (X Y - diag(X 1) Q),   ybar = 2 (X^T Q - diag(X^T 1) Y).

**Memory.** Every query is a separate slice, so blocks share only the keys and their values, whose cotangents are summed
over the blocks. The rules recompute each block from the points and from the offset and reference of its queries, the
only arrays that are saved.

**Accuracy.** In few dimensions the distances are sums of squared differences, with a relative error of a few eps. In
more dimensions they are one matrix product, 2 <q, y> - |y|^2, with an error of a few eps (|q| + |y|) |y|. The term
|q|^2, the same for all keys, is left out there. The origin is the mean of the keys, so that an offset common to all
points costs no accuracy. The origin is a constant to every derivative, because no distance depends on it.

Inputs: queries (..., q, d), keys (..., n, d), then the inputs specific to the primitive, then k and temperature
(..., q, 1) or (), where (..., 1 or q, 1 or n) or None, and exclude (..., q, 1) or None: the index of one key that the
query may not select. The last outputs, as of the masks, are the offset and the reference of every query.
"""
