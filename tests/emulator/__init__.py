"""Compiled kernels, executed: a PTX emulator under Triton's own launcher, the cases it runs, and faults to check it."""
