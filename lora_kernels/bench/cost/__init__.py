"""Costs by arithmetic: FLOPs, bytes, the traffic of each launch."""
