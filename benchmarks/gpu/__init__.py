"""Benchmarks on a CUDA device, compared with a copy, softmax and the hard top-k: `python -m benchmarks.gpu`.

`cases` has the problems, `drivers` and `on_*` the functions of each framework. `worker` measures one framework in its
own process, `__main__` runs all workers, and `report` writes the results.
"""
