"""Measurement of time and memory: the timer, the shapes to measure, and the facts of the machine."""
