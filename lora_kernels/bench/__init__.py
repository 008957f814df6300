"""The benchmark engine: cases, the providers they compare, cost formulas, and tables of results."""
