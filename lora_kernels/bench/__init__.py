"""The benchmark engine: cases, what they compare, what they cost, and how results are shown."""
