// Who runs when: grids of a stream, CTAs of a grid, warps of a CTA; in an order that a seed decides.
#include "engine.h"

#include <algorithm>

#include "memory.h"

Options options;
std::mt19937_64 rng;

// Launched and not over, in order.
static std::deque<std::unique_ptr<Grid>> stream;

static vector<std::unique_ptr<Cta>> resident;

static int launches = 0;

// Stores of CTAs that are over, of a grid that is not.
static std::map<Grid *, vector<Store>> unreleased;

// Keeps PyTorch off the memory that pending launches are to write.
static void (*protect)(int) = nullptr;

// Whether CTAs of the n-th grid of the stream may come up.
static bool may_start(size_t n) {
  Grid &g = *stream[n];
  if (g.next == g.total) return false;
  if (!n) return true;
  Grid &before = *stream[n - 1];
  if (!g.dependent || before.next < before.total) return false;
  for (size_t k = 0; k + 1 < n; k++)
    if (!stream[k + 1]->dependent) return false;
  // Each has triggered, or is over.
  return before.triggered == before.total;
}

// Warps go on whose mbarrier has completed, or whose grid's predecessor is over.
static void wake(Cta &c) {
  for (auto &w : c.warps) {
    if (w.state == AT_MBAR) {
      auto it = c.mbars.find(w.wait_bar);
      if (it == c.mbars.end() || (it->second.phase & 1) != w.wait_parity) w.state = READY;
    } else if (w.state == AT_GRID) {
      // Until the grid before is over, though not those before that.
      size_t n = 0;
      while (stream[n].get() != c.grid) n++;
      if (n && stream[n - 1]->done == stream[n - 1]->total) flush(unreleased[stream[n - 1].get()]);
      if (!n || stream[n - 1]->done == stream[n - 1]->total) w.state = READY, order_waited(w);
    }
  }
}

static void end_of_cta(Cta &c) {
  if (c.loads.size()) problem(c.grid->kernel->name + ": a program ends while TMA loads are on their way to it");
  for (auto &w : c.warps) publish_to_cta(w);
  // Nobody need see these before the grid's end.
  auto &late = unreleased[c.grid];
  late.insert(late.end(), c.stores.begin(), c.stores.end());
  c.stores.clear();
  c.grid->done++;
}

// CTAs come up: of later grids first, for these are the ones that may come too early.
static void bring_up() {
  while ((int)resident.size() < options.resident) {
    size_t pick = stream.size();
    for (size_t n = stream.size(); n-- && pick == stream.size();)
      if (may_start(n)) pick = n;
    if (pick == stream.size()) return;
    if (pick) stream[pick]->early = true;
    resident.push_back(make_cta(*stream[pick]));
    order_start(*resident.back());
  }
}

// One of a CTA's TMA loads arrives.
static void land(Cta &c) {
  size_t k = rng() % c.loads.size();
  Bulk b = c.loads[k];
  c.loads.erase(c.loads.begin() + k);
  load_run(c, b);
}

// Nobody can go on, or it takes too long: say who waits where, and give up all that was launched.
static void give_up(bool stuck) {
  bool left = resident.empty();
  string where;
  for (auto &c : resident)
    for (auto &w : c->warps) {
      if (w.state == DONE || where.size() >= 400) continue;
      const Kernel &k = *c->grid->kernel;
      const char *waits[] = {"its turn", "bar.sync", "mbarrier", "griddepcontrol.wait"}, *what = waits[w.state];
      where += " " + k.name + " cta " + std::to_string(c->id[0]) + " warp " + std::to_string(w.id) + " at " + what +
               " (ptx " + std::to_string(k.code[w.pc ? w.pc - 1 : 0].line) + ")";
    }
  problem(!stuck ? "it goes on and on:" + where : left ? "nothing may start" : "deadlock:" + where);
  resident.clear();
  stream.clear();
  unreleased.clear();
}

// A CTA is over, and with it perhaps its grid.
static void retire(Cta *c) {
  end_of_cta(*c);
  for (size_t k = 0; k < resident.size(); k++)
    if (resident[k].get() == c) {
      resident.erase(resident.begin() + k);
      break;
    }
  while (!stream.empty() && stream.front()->done == stream.front()->total) {
    flush(unreleased[stream.front().get()]);
    unreleased.erase(stream.front().get());
    report(*stream.front());
    stream.pop_front();
  }
}

// Run all that was launched: a turn of one warp at a time.
static void run_all() {
  for (int turn = 0; !stream.empty(); turn++) {
    if (options.turns && turn > options.turns) return give_up(false);
    bring_up();
    vector<Warp *> ready;
    vector<Cta *> loading;
    for (auto &c : resident) {
      wake(*c);
      for (auto &w : c->warps)
        if (w.state == READY) ready.push_back(&w);
      if (c->loads.size()) loading.push_back(c.get());
    }
    // At random, or as late as can be: a CTA whose warps all wait gets one of its loads.
    bool random = options.mode == RANDOM && loading.size() && rng() % 4 == 0;
    if (random || (ready.empty() && loading.size())) {
      land(*loading[rng() % loading.size()]);
      continue;
    }
    if (ready.empty()) return give_up(true);
    Warp *w = ready[rng() % ready.size()];
    // Dependents run ahead.
    if (rng() % 2)
      for (int k = 0; k < 8 && w->cta->grid != stream.back().get(); k++) w = ready[rng() % ready.size()];
    run(*w, 1 + rng() % options.quantum);
    Cta *c = w->cta;
    // In the late mode loads land only where nothing else of their CTA can go on.
    if (options.mode == LATE && c->loads.size()) {
      wake(*c);
      bool can = false;
      for (auto &x : c->warps) can |= x.state == READY;
      if (!can) land(*c);
    }
    if (!c->live) retire(c);
  }
}

void enqueue(Grid *g) {
  g->total = (u64)g->dim[0] * g->dim[1] * g->dim[2];
  g->index = launches++;
  for (u64 k = 0; k < g->total; k++) g->order.push_back(k);
  if (options.seed)
    for (u64 k = 0; k < g->total; k++) {
      // Nearly in order.
      u64 j = k + rng() % std::min<u64>(g->total - k, 8);
      std::swap(g->order[k], g->order[j]);
    }
  if (!g->dependent) drain();
  order_enqueue(*g, stream.empty());
  stream.emplace_back(g);
  if (protect) protect(1);
}

void drain() {
  if (protect) protect(0);
  run_all();
  order_forget();
}

extern "C" {
// Set one of the options.
void emu_set(const char *name, long v) {
  const std::map<string, int *> places = {
      {"mode", &options.mode},       {"resident", &options.resident},   {"race", &options.race},
      {"quantum", &options.quantum}, {"arch", &options.arch},           {"sms", &options.sms},
      {"weak", &options.weak},       {"registers", &options.registers}, {"turns", &options.turns}};
  if (string(name) == "seed") {
    options.seed = v;
    rng.seed(v);
  } else
    *places.at(name) = v;
}

void emu_drain() {
  drain();
}
// Grids that are launched and not over.
int emu_pending() {
  return stream.size();
}

// Where arena.cpp keeps tensors, and what closes that memory to PyTorch.
void emu_arena(void *base, void *shadow, u32 *since, u64 size, void (*keep_off)(int)) {
  arena_base = (u8 *)base;
  arena_shadow = (u8 *)shadow;
  arena_since = since;
  arena_size = size;
  protect = keep_off;
}
}
