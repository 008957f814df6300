"""What it costs by arithmetic: FLOPs, bytes, the traffic of each launch."""
