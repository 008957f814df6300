"""Inspection of compiled kernels: compile them without a GPU, read the binaries, and check them against budgets."""
