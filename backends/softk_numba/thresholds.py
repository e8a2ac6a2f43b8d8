"""The derivative of the threshold as kernels over rows."""

from __future__ import annotations

from .loops import no_lanes, pull_loop, push_loop, row_cotangent
from .rule import pull_threshold_row, push_row

pull_threshold_rows = pull_loop("pull_threshold_rows", pull_threshold_row, row_cotangent, no_lanes)
push_threshold_rows = push_loop("push_threshold_rows", push_row)
