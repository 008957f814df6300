"""Time and memory, the shapes they are taken of, and the machine they are taken on."""
