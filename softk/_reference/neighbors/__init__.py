r"""Nearest neighbours as primitives: queries beside keys, a block of queries at a time.

The scores of a query are minus its squared distances to the keys, up to a shift, and the mask m is that of
`softk.topk`. Three things are read off it, each with its derivative in both directions:

    weights          m                                           (q, n)
    votes            o = m V / k                                 (q, c)
    log likelihood   l = log(sum_j m_j a_j + f k) - log k        (q, 1)

with the keys' values V (n, c), the floor f, and a_j the agreement of a query's label with that of key j: whether two
integers are equal, or the inner product of two rows. The likelihood is formed from log m, which does not underflow, so
that a query among strangers has a gradient that leads it home. For cotangents u,

    votes            mbar = u V^T / k,   Vbar = m^T u / k,   kbar = -<u, o> / k
    log likelihood   (log m)bar_j = u s_j,   abar_j = u s_j / a_j,   kbar = -u sum_j s_j / k,
                     s_j = m_j a_j / (sum m a + f k)

and the rule of the threshold says what the mask passes on. With the cotangent X of the scores x_ij = -|q_i - y_j|^2,

    qbar = 2 (X Y - diag(X 1) Q),   ybar = 2 (X^T Q - diag(X^T 1) Y).

**Memory.** Every query is a slice of its own, so nothing is shared between blocks but the keys, whose cotangents add
up. The rules compute each block anew from the points and from the two numbers that solve it, which is all that is
kept.

**Accuracy.** In few dimensions the distances are sums of squared differences, right to a few eps of themselves. In
more they are one matrix product, 2 <q, y> - |y|^2, with an error of a few eps (|q| + |y|) |y|; there the term |q|^2,
the same for all keys, is left out. The origin is the mean of the keys, so that an offset which all points share costs
nothing. It is a constant: no distance depends on it.

Inputs: queries (..., q, d), keys (..., n, d), then what the primitive reads, then k and temperature (..., q, 1) or (),
where (..., 1 or q, 1 or n) or None, and exclude (..., q, 1) or None: the index of one key that the query may not have.
The outputs end as those of the masks do, with the offset and the reference of every query.
"""
