"""How fast softk is on a CUDA device, beside a copy, softmax and the hard top-k: `python -m benchmarks.gpu`.

`cases` says what is measured, `drivers` and `on_*` what each framework supplies, `worker` measures one framework in a
process of its own, `__main__` runs them all, and `report` shows the result.
"""
