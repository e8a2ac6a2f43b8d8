r"""The balanced assignment of items to groups, for any affinities.

For scores S_ij, item weights a_i and masses c_j of the groups, the plan maximizes <S, plan> + epsilon * entropy among
all plans with the row sums a and the column sums c. It is

    plan_ij = a_i P_ij,   P_ij = softmax_j((S_ij + u_j) / epsilon),   sum_i a_i P_ij = c_j,

with one dual potential u_j per group. The rows hold for every u, so the K potentials are the unknowns.

**In two parts.** u_j = r_j + epsilon s_j: the reference r_j is in the units of the scores, and the offset s_j in those
of the exponent. S_ij + r_j is computed with its rounding error. Differences of exponents of the order of 1 are
therefore exact to rounding for any epsilon that is used in practice.

**A graph Laplacian.** The derivative of the column sums in s is diag(c) - P^T diag(a) P. Off its diagonal it is -W with
W_jl = sum_i a_i P_ij P_il, and its rows sum to 0. It is built from W, so that nothing cancels.

`system` has the plan for given potentials and its Laplacian. `solve` finds the potentials. `rule` is the derivative;
`network` is its part in the sums of the plan. `operator` is the primitive.
"""
