// Barriers of a CTA, mbarriers, fences, and the order of dependent grids.
#include "build.h"
#include "memory.h"

void try_complete(MBar &b) {
  if (!b.pending && !b.tx) b.phase++, b.pending = b.expected;
}

static MBar *mbarrier(Warp &w, u32 at) {
  auto it = w.cta->mbars.find(at);
  if (it != w.cta->mbars.end()) return &it->second;
  problem(&w, "an operation on what is no mbarrier");
  return nullptr;
}

static u32 first(Warp &w, const Instr &i) {
  return (i.base == NONE ? 0 : R<u32>(w, i.base)[__builtin_ctz(w.m)]) + (u32)i.off;
}

void mbar_init(Warp &w, const Instr &i) {
  u32 at = first(w, i), n = R<u32>(w, i.o[0])[__builtin_ctz(w.m)];
  if (!in_shared(w, at, 8, "an mbarrier") || !aligned(w, at, 8, "an mbarrier at")) return;
  for (auto &b : w.cta->loads)
    if (b.bar == at) problem(&w, "an mbarrier is made anew while a TMA load is on its way to it");
  touch(w, at, 8, true, true);
  w.cta->mbars[at] = {n, n, 0, 0};
}

void mbar_inval(Warp &w, const Instr &i) {
  u32 at = first(w, i);
  for (auto &b : w.cta->loads)
    if (b.bar == at) problem(&w, "an mbarrier is dropped while a TMA load is on its way to it");
  if (mbarrier(w, at)) w.cta->mbars.erase(at);
  touch(w, at, 8, true, true);
}

// a: expects bytes; o[0]: bytes or count.
void mbar_arrive(Warp &w, const Instr &i) {
  u32 at = first(w, i), lanes = __builtin_popcount(w.m);
  MBar *b = mbarrier(w, at);
  if (!b) return;
  if (i.a) b->tx += (s64)R<u32>(w, i.o[0])[__builtin_ctz(w.m)] * lanes;
  u32 count = i.a == 2 ? 0 : lanes;
  touch(w, at, 8, false, true);
  if (count > b->pending) {
    problem(&w, "more arrivals than an mbarrier expects");
    return;
  }
  b->pending -= count;
  try_complete(*b);
}

void mbar_wait(Warp &w, const Instr &i) {
  u32 at = first(w, i), parity = R<u32>(w, i.o[1])[__builtin_ctz(w.m)] & 1, t[32];
  MBar *b = mbarrier(w, at);
  bool done = !b || (b->phase & 1) != parity;
  touch(w, at, 8, false, true);
  for (int l = 0; l < 32; l++) t[l] = done ? ~0u : 0;
  put(w, i.o[0], t);
  // A loop that only asks again may as well sleep; anybody else goes on with the answer
  const vector<Instr> &code = w.cta->grid->kernel->code;
  const Instr &next = code[w.pc + 1];
  if (!done && next.cls == BRANCH && next.a == 1 && next.pred == i.o[0] && next.target <= w.pc)
    w.state = AT_MBAR, w.wait_bar = at, w.wait_parity = parity;
}

// a: which; b: threads or 0.
void bar_sync(Warp &w, const Instr &i) {
  if (w.m != ~0u) problem(&w, "a barrier of a part of a warp");
  publish_to_cta(w);
  auto &there = w.cta->bars[i.a];
  there.push_back(w.id);
  w.state = AT_BAR;
  size_t expected = i.b ? i.b / 32 : w.cta->warps.size();
  if (there.size() < expected) return;
  bool whole = expected == w.cta->warps.size();
  for (int id : there) w.cta->warps[id].state = READY;
  there.clear();
  if (whole) w.cta->epoch++, w.cta->clock++, order_barrier(*w.cta);
}

void nothing(Warp &, const Instr &) {}

void fence_proxy(Warp &w, const Instr &) {
  w.proxy_fence = w.cta->clock++;
}

void fence_global(Warp &w, const Instr &) {
  publish(w);
}

void grid_wait(Warp &w, const Instr &) {
  w.state = AT_GRID;
}

void trigger(Cta &c) {
  for (auto &w : c.warps)
    if (!w.triggered && w.state != DONE) return;
  if (!c.triggered) c.triggered = true, c.grid->triggered++;
}

void grid_launch(Warp &w, const Instr &) {
  w.triggered = true;
  order_triggered(w);
  trigger(*w.cta);
}
