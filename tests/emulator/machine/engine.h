// What the engine asks of its parts.
#pragma once
#include "machine.h"

// A CTA of a grid, with its warps at the kernel's start.
std::unique_ptr<Cta> make_cta(Grid &g);

// Let a warp run so many instructions, or until it waits.
void run(Warp &w, int quantum);
