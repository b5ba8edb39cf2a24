"""Times the attention ops beside other people's, on one GPU: ``make bench-kernels``.

A tool for whoever works on the kernels, and no part of the wheel. docs/kernels.md has what it
measured, and the targets.
"""
