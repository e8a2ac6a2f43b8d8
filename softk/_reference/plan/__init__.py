r"""The transport plan between scores and any number of anchors.

For anchors y_1 > ... > y_m of masses c_1, ..., c_m, the plan of entropic optimal transport is

    P_ij = softmax_j((2 x_i y_j - y_j^2 + g_j) / epsilon),   sum_i a_i P_ij = c_j,

with one dual potential g_j per anchor (Xie et al., NeurIPS 2020, equation (4)). The solver works with the log-odds of
neighboring anchors instead:

    log(P_ij / P_i,j+1) = z_ij = (x_i - t_j) / tau_j,   tau_j = epsilon / (2 (y_j - y_j+1)).

The m - 1 thresholds t_j, one per boundary between neighboring anchors, are the unknowns. For two anchors there is one
threshold, and the columns of P are the mask of the top-k and its complement.

**In two parts.** t_j = r_j + tau_j s_j, as for the mask: the reference r_j is a score or the midpoint of a gap, and the
offset s_j is the unknown. The potentials, of the size of y^2 / epsilon, would lose all accuracy in float32.

**One equation per boundary.** Let Q_ij be the share of score i above boundary j and R_ij = 1 - Q_ij the share below,
both running sums of P. Then sum_i a_i Q_ij = C_j = c_1 + ... + c_j, and because

    dQ_ij / dz_il = Q_i,min(j,l) R_i,max(j,l) = (M_i)_jl,

the Jacobian J = sum_i a_i M_i is symmetric, positive definite and a sum of positive numbers. The excess sum a Q - C is
computed from the tails, as for the mask.

`system` has the plan for given boundaries and its Jacobian. `newton` and `sinkhorn` find the boundaries. `rule` is the
derivative. `sorting`, `ranking` and `transport` are the operators based on a plan.
"""
