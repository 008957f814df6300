"""The cases that are timed: a layer, a block of layers, a single launch, a model."""
