// Global memory: its bounds, and stores that wait until a release makes them seen.
#include "memory.h"

#include <cstdio>

u8 *arena_base = nullptr, *arena_shadow = nullptr;
u32 *arena_since = nullptr;
u64 arena_size = 0;

bool inside(const Warp *w, u64 at, u32 n, const char *what) {
  if (!arena_base) return true;
  u64 off = at - (u64)arena_base;
  if (off < arena_size) {
    bool ok = true;
    for (u32 k = 0; k < n; k++) ok &= arena_shadow[off + k];
    if (ok) return true;
  }
  // The parameters may be read through an address.
  Grid *g = w ? w->cta->grid : nullptr;
  if (g && at >= (u64)g->params() && at + n <= (u64)g->params() + g->kernel->param_bytes) return true;
  char text[160];
  snprintf(text, sizeof text, "%s %u bytes of global memory that are nobody's (%s)", what, n,
           off < arena_size ? "beside a tensor" : "far from any tensor");
  problem(w, text);
  return false;
}

// 16-byte words of global memory that hold stores not seen by all, and how many.
static std::unordered_map<u64, int> unseen;

void flush(vector<Store> &stores) {
  for (auto &s : stores) {
    memcpy((void *)s.at, s.data, s.n);
    auto it = unseen.find(s.at / 16);
    if (!--it->second) unseen.erase(it);
  }
  stores.clear();
}

void publish(Warp &w) {
  flush(w.cta->stores);
  flush(w.stores);
}

void publish_to_cta(Warp &w) {
  auto &to = w.cta->stores;
  to.insert(to.end(), w.stores.begin(), w.stores.end());
  w.stores.clear();
}

void own_stores(Warp &w, u64 at, u32 n) {
  // Accesses are aligned: none lies in two words.
  if (unseen.empty() || !unseen.count(at / 16)) return;
  auto overlaps = [&](vector<Store> &v) {
    for (auto &s : v)
      if (s.at < at + n && at < s.at + s.n) return true;
    return false;
  };
  if (w.stores.size() && overlaps(w.stores))
    publish(w);
  else if (w.cta->stores.size() && overlaps(w.cta->stores))
    flush(w.cta->stores);
}

u32 sectors(Warp &w, const u64 *at, u32 n) {
  u64 seen[128];
  u32 count = 0;
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1)
      for (u64 s = at[l] / 32; s <= (at[l] + n - 1) / 32; s++) {
        bool found = false;
        for (u32 k = count; k-- && !found;) found = seen[k] == s;
        if (!found && count < 128) seen[count++] = s;
      }
  Tally &tally = w.cta->grid->tally[w.pc];
  tally.requests++;
  tally.sectors += count;
  return count;
}

bool aligned(Warp &w, u64 at, u32 n, const char *what) {
  if (at % n == 0) return true;
  problem(&w, string(what) + " an address that is not a multiple of its size");
  return false;
}

void hold(Warp &w, const Store &s) {
  w.stores.push_back(s);
  unseen[s.at / 16]++;
}
