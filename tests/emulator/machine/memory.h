// What the files about memory share: bounds, stores that wait to be seen, the race detector, banks.
#pragma once
#include "registers.h"

// ---- global memory (global.cpp)

// Memory of tensors: arena.cpp has the bounds; without it every address will do.
extern u8 *arena_base, *arena_shadow;
extern u64 arena_size;
// Of each so many bytes: up to which launch their memory may still be in use by whoever had it before.
extern u32 *arena_since;
constexpr u64 ARENA_ROUND = 512;

// Whether bytes of global memory are somebody's; notes it where not. `what`: "reads" and the like.
bool inside(const Warp *w, u64 at, u32 n, const char *what);

bool aligned(Warp &w, u64 at, u32 n, const char *what);

// Keep a store until it is released.
void hold(Warp &w, const Store &s);

// Carry out stores.
void flush(vector<Store> &stores);

// A release: what this warp stored, and what it knows of its CTA's stores, is there for all.
void publish(Warp &w);

void publish_to_cta(Warp &w);

// A thread sees what it stored itself.
void own_stores(Warp &w, u64 at, u32 n);

// Sectors of 32 bytes that a request of the instruction at hand touches.
u32 sectors(Warp &w, const u64 *at, u32 n);

// ---- shared memory (shared.cpp)

bool in_shared(Warp &w, u32 at, u32 n, const char *what);
inline u8 *at_shared(Warp &w, u32 at) {
  return w.cta->shared.data() + (at - SHARED_BASE);
}

// The race detector: a warp reads or writes bytes. `generic`: by the proxy of ld and st. `same`: a write that changes
// nothing, as of threads that hold copies of one element; whoever is first is right. `copied`: by cp.async.
void touch(Warp &w, u32 at, u32 n, bool writes, bool generic, bool same = false, bool copied = false);

// Bytes were written by TMA.
void arrived(Cta &c, u32 at, u32 n);

// Passes over the 32 banks that a request of `n` bytes a lane takes, and the fewest it could, at the instruction at hand.
void banks(Warp &w, u32 mask, const u32 *at, u32 n, u64 &passes, u64 &ideal);
// An address in a tile whose 16-byte chunks are permuted by the bits above its rows of 32, 64 or 128 bytes.
inline u32 swizzled(u32 at, int bytes) {
  int rows = bytes == 128 ? 7 : bytes == 64 ? 3 : bytes == 32 ? 1 : 0;
  return at ^ (at >> 7 & rows) << 4;
}

// ---- tensor cores (mma.cpp)

float tf32(u32 bits);

// A fragment of 16 rows: 16 of K in halves or 8 of K in singles.
void fragment(const u32 *const *regs, int type, float (*A)[16]);

// ---- what is on its way (tma.cpp, barriers.cpp)

// Land a TMA load.
void load_run(Cta &c, const Bulk &b);

// At a warp's end whatever it left is done.
void leave(Warp &w);

void try_complete(MBar &b);

// Dependents may come up once every warp of every CTA has said so, or is over.
void trigger(Cta &c);
