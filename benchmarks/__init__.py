"""Benchmarks of softk's speed and accuracy, compared with softmax, the hard top-k and other libraries: `make bench`.

`cases` has the problems, `candidates_*` the functions that are timed, `sorting_*` those that sort, `timing` the clock,
`truth` and `truth_sorted` the exact solutions, and `memory` the memory measurements. `worker` measures one framework in
its own process, `__main__` runs all workers, and `report` and `plots` write the results. `benchmarks.gpu`, which
measures a CUDA device, also uses `machine` and `processes`.
"""
