"""The parts of `lora-kernels demo`: its model, its text, its adapter, its chart."""
