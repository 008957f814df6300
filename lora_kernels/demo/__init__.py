"""The parts of `lora-kernels demo`: a small model, its text, its adapter, its chart."""
