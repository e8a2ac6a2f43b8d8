"""How fast softk is, beside softmax, the hard top-k and its peers, and how accurate: `make bench`.

`cases` says what is measured, `candidates_*` what is timed, `timing` how, `truth` what the right answer is, `memory`
what is held. `worker` measures one framework in a process of its own, `__main__` runs them all, and `report` and
`plots` show the result. `machine` and `processes` are shared with `benchmarks.gpu`, which measures a CUDA device.
"""
