// The race detector of global memory: order.h says what it holds programs to.
#include "order.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "memory.h"

// An access: by whom, and when by the ticks of the CTA.
struct Access {
  int grid = -1;
  u32 cta = 0, tick = 0;
  int warp = 0;
};
// Two bytes of global memory: who wrote each, and who has read them of whom nobody has heard since.
struct Place {
  Access write[2];
  How how[2] = {PLAIN, PLAIN};
  Access read;
  std::unique_ptr<vector<Access>> reads;
};
constexpr u64 PAGE = 4096;
// A copy by TMA is over at the grid's end: no release of its warp covers it.
constexpr u32 AT_THE_END = ~0u;

static std::unordered_map<u64, std::unique_ptr<Place[]>> pages;

// By address of an atomic: what was released there.
static std::map<u64, Known> released;

// By launch: what its warps knew when they let dependents in, and at their ends.
static std::map<int, Known> let_in, at_end;

// By address that a launch was given: the last launch that was.
static std::map<u64, int> users;

static u32 ctas = 0;

void Known::join_grids(const Known &k) {
  below = std::max(below, k.below);
  over.insert(k.over.begin(), k.over.end());
}

void Known::join(const Known &k) {
  join_grids(k);
  for (auto &[cta, seen] : k.ctas) {
    Seen &mine = ctas[cta];
    mine.all = std::max(mine.all, seen.all);
    for (auto &[warp, tick] : seen.warps) mine.warps[warp] = std::max(mine.warps[warp], tick);
  }
}

void order_start(Cta &c) {
  Grid &g = *c.grid;
  c.serial = ++ctas;
  if (g.alone || !g.dependent)
    c.known.below = g.index;
  else
    c.known.join_grids(let_in[g.index - 1]);
}

void order_enqueue(Grid &g, bool alone) {
  g.alone = alone;
  for (u32 at = 0; at + 8 <= g.kernel->param_bytes; at += 8) {
    u64 word, number;
    memcpy(&word, g.params() + at, 8);
    if (word == TENSOR_MAP && at + 24 <= g.kernel->param_bytes) {
      memcpy(&number, g.params() + at + 16, 8);
      if (number < tensor_maps.size()) word = tensor_maps[number].base;
    }
    if (word - (u64)arena_base < arena_size) users[word] = g.index;
  }
}

void order_waited(Warp &w) {
  int before = w.cta->grid->index - 1;
  w.known.join_grids(at_end[before]);
  w.known.over.insert(before);
}

void order_triggered(Warp &w) {
  Known &k = let_in[w.cta->grid->index];
  k.join_grids(w.known);
  k.join_grids(w.cta->known);
}

void order_left(Warp &w) {
  order_triggered(w);
  Known &k = at_end[w.cta->grid->index];
  k.join_grids(w.known);
  k.join_grids(w.cta->known);
}

void order_barrier(Cta &c) {
  c.barrier_tick = c.tick++;
  for (auto &w : c.warps) {
    c.known.join(w.known);
    w.known = Known{};
  }
}

void order_forget() {
  pages.clear();
  released.clear();
  let_in.clear();
  at_end.clear();
  users.clear();
}

// Accesses are aligned: all their places lie in one page.
static Place *places(u64 at) {
  auto &page = pages[at / PAGE];
  if (!page) page = std::make_unique<Place[]>(PAGE / 2);
  return &page[at % PAGE / 2];
}

static bool seen(const Known &k, const Access &a) {
  auto it = k.ctas.find(a.cta);
  if (it == k.ctas.end()) return false;
  if (a.tick <= it->second.all) return true;
  auto warp = it->second.warps.find(a.warp);
  return warp != it->second.warps.end() && a.tick <= warp->second;
}

// Whether an access happened before whatever this warp does now.
static bool before(const Access &a, const Warp &w) {
  const Cta &c = *w.cta;
  if (a.grid < 0) return true;
  if (a.grid != c.grid->index) return c.known.is_over(a.grid) || w.known.is_over(a.grid);
  if (a.cta == c.serial) return a.warp == w.id || a.tick <= c.barrier_tick;
  return seen(c.known, a) || seen(w.known, a);
}

static void race(Warp &w, const char *does, const Access &a, const char *did) {
  const Cta &c = *w.cta;
  string who = a.grid < c.grid->index   ? "a launch before, which may not be over,"
               : a.grid > c.grid->index ? "a later launch, which did not wait,"
               : a.cta == c.serial      ? "another warp, with no barrier between,"
                                        : "another CTA, with no release and acquire between,";
  problem(&w, string(does) + " global memory that " + who + " " + did);
}

// Memory that was handed out anew may be what a launch that is not over was given.
static void reused(Warp &w, u64 at) {
  if (!arena_since || at - (u64)arena_base >= arena_size) return;
  u32 since = arena_since[(at - (u64)arena_base) / ARENA_ROUND];
  const Cta &c = *w.cta;
  // Else it was handed out once more, after this launch.
  if ((int)since > c.grid->index) return;
  for (int g = c.known.below; g < (int)since; g++)
    if (!c.known.is_over(g) && !w.known.is_over(g)) {
      problem(&w, "touches memory that a launch before, which may not be over, has: it was freed and handed out again");
      return;
    }
}

// A read that happened before this one need not be kept.
static void keep(Place &p, const Access &now, const Warp &w) {
  if (before(p.read, w)) {
    p.read = now;
    return;
  }
  if (!p.reads) p.reads = std::make_unique<vector<Access>>();
  std::erase_if(*p.reads, [&](const Access &a) { return before(a, w); });
  p.reads->push_back(now);
}

void order_read(Warp &w, u64 at, u32 n) {
  if (!options.race) return;
  reused(w, at);
  Access now{w.cta->grid->index, w.cta->serial, w.cta->tick, w.id};
  Place *p = places(at);
  for (u64 b = at & ~1ull; b < at + n; b += 2, p++) {
    for (u64 k = b < at; k < 2 && b + k < at + n; k++)
      if (!before(p->write[k], w)) race(w, "reads", p->write[k], p->how[k] == BY_BULK ? "wrote by TMA" : "wrote");
    keep(*p, now, w);
  }
}

void order_write(Warp &w, u64 at, u32 n, How how) {
  if (!options.race) return;
  reused(w, at);
  Access now{w.cta->grid->index, w.cta->serial, how == BY_BULK ? AT_THE_END : w.cta->tick, w.id};
  Place *p = places(at);
  for (u64 b = at & ~1ull; b < at + n; b += 2, p++) {
    for (u64 k = b < at; k < 2 && b + k < at + n; k++) {
      bool atomics = how == BY_ATOMIC && p->how[k] == BY_ATOMIC;
      if (!atomics && !before(p->write[k], w)) race(w, "writes", p->write[k], "wrote");
      p->write[k] = now;
      p->how[k] = how;
    }
    if (!before(p->read, w)) race(w, "writes", p->read, "read");
    if (!p->reads) continue;
    for (auto &a : *p->reads)
      if (!before(a, w)) race(w, "writes", a, "read");
    p->reads.reset();
  }
}

void order_release(Warp &w, u64 at) {
  Cta &c = *w.cta;
  Known &k = released[at];
  k.join(c.known);
  k.join(w.known);
  Seen &mine = k.ctas[c.serial];
  mine.all = std::max(mine.all, c.barrier_tick);
  mine.warps[w.id] = c.tick++;
}

void order_acquire(Warp &w, u64 at) {
  auto it = released.find(at);
  if (it != released.end()) w.known.join(it->second);
}

extern "C" {
// A tensor is freed: the number of launches up to the last that was given it, or 0.
u32 emu_freed(u64 at, u64 n) {
  u32 since = 0;
  auto it = users.lower_bound(at);
  while (it != users.end() && it->first < at + n) {
    since = std::max<u32>(since, it->second + 1);
    it = users.erase(it);
  }
  return since;
}
}
