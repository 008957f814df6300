// Shared memory: its bounds, the race detector, and passes over its banks.
#include "memory.h"

#include <algorithm>

bool in_shared(Warp &w, u32 at, u32 n, const char *what) {
  if (at >= SHARED_BASE && at + n <= SHARED_BASE + w.cta->shared.size()) return true;
  problem(&w, string(what) + " outside of shared memory");
  return false;
}

void touch(Warp &w, u32 at, u32 n, bool writes, bool generic, bool same, bool copied) {
  if (!options.race) return;
  Cta &c = *w.cta;
  Shadow *s = &c.shadow[(at - SHARED_BASE) / 2];
  u32 me = 1u << w.id, e = c.epoch;
  for (u32 k = 0; k < (n + 1) / 2; k++, s++) {
    if (!writes) {
      if (!s->set)
        problem(&w, "reads shared memory that nobody has written");
      else if (s->write_epoch == e && s->writer != w.id && s->writer != BY_TMA)
        problem(&w, "reads shared memory that another warp wrote with no barrier between");
      if (!generic && s->generic) {
        // The asynchronous proxy sees what a fence has passed on.
        u64 clock = s->generic >> 9;
        int by = s->generic & 255;
        if (c.warps[by].proxy_fence < clock && w.proxy_fence < clock)
          problem(&w, s->generic & 256
                          ? "note: the asynchronous proxy reads what cp.async wrote with no fence.proxy.async since"
                          : "the asynchronous proxy reads what was written with no fence.proxy.async since");
      }
      if (generic) s->generic_read = c.clock << 9 | w.id;
      if (s->read_epoch != e) s->read_epoch = e, s->readers = 0;
      s->readers |= me;
    } else {
      if (!generic && s->generic_read && c.warps[s->generic_read & 255].proxy_fence < s->generic_read >> 9 &&
          w.proxy_fence < s->generic_read >> 9)
        problem(&w, "note: the asynchronous proxy writes what ld read with no fence.proxy.async since");
      if (!generic) s->generic_read = 0;
      if (same && s->set && s->write_epoch == e) continue;
      if (s->write_epoch == e && s->writer != w.id && s->writer != BY_TMA && s->set)
        problem(&w, "writes shared memory that another warp wrote with no barrier between");
      if (s->read_epoch == e && (s->readers & ~me))
        problem(&w, "writes shared memory that another warp read with no barrier between");
      s->write_epoch = e;
      s->writer = w.id;
      s->set = 1;
      s->generic = generic ? c.clock << 9 | (copied ? 256 : 0) | w.id : 0;
    }
  }
}

void arrived(Cta &c, u32 at, u32 n) {
  if (!options.race) return;
  Shadow *s = &c.shadow[(at - SHARED_BASE) / 2];
  for (u32 k = 0; k < n / 2; k++, s++) {
    s->write_epoch = c.epoch;
    s->writer = BY_TMA;
    s->set = 1;
    s->generic = 0;
  }
}

// In groups of lanes that fill 128 bytes.
void banks(Warp &w, u32 mask, const u32 *at, u32 n, u64 &passes, u64 &ideal) {
  Tally &tally = w.cta->grid->tally[w.pc];
  int lanes = n >= 16 ? 8 : n == 8 ? 16 : 32;
  for (int from = 0; from < 32; from += lanes) {
    u32 words[32][8];
    u8 count[32] = {};
    u32 most = 0;
    for (int l = from; l < from + lanes; l++)
      if (mask >> l & 1)
        for (u32 word = at[l] / 4; word <= (at[l] + n - 1) / 4; word++) {
          u32 b = word & 31;
          bool found = false;
          for (int k = 0; k < count[b] && k < 8; k++) found |= words[b][k] == word;
          if (!found) {
            if (count[b] < 8) words[b][count[b]] = word;
            count[b]++;
          }
        }
    for (int b = 0; b < 32; b++) most = std::max<u32>(most, count[b]);
    if (!most) continue;
    passes += most, ideal++;
    tally.passes += most, tally.fewest++;
  }
}
