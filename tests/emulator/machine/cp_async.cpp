// cp.async: copies to shared memory in groups. Until it lands, its destination holds NaN.
#include "build.h"
#include "memory.h"

#include <algorithm>

static void copy_run(Warp &w, const Copy &c) {
  u8 *to = at_shared(w, c.dst);
  touch(w, c.dst, c.size, true, true, false, true);
  if (c.n) memcpy(to, c.src, c.n);
  memset(to + c.n, 0, c.size - c.n);
}

// a: size; o[0]: bytes to read, or NONE; base: shared, base2: global.
void copy_async(Warp &w, const Instr &i) {
  u32 *dst = R<u32>(w, i.base), *n = i.o[0] == NONE ? nullptr : R<u32>(w, i.o[0]);
  u64 *src = R<u64>(w, i.base2);
  Counters &c = w.cta->grid->c;
  u64 at[32];
  u32 at32[32], m = w.m, reading = 0;
  w.cta->clock++;
  for (int l = 0; l < 32; l++)
    at[l] = src[l] + i.off2, at32[l] = dst[l] + (u32)i.off, reading |= (m >> l & 1) && (!n || n[l]) ? 1u << l : 0;
  banks(w, m, at32, i.a, c.wave_cp, c.ideal_cp);
  if (reading) {
    w.m = reading;
    c.greq_cp++;
    c.gsectors_cp += sectors(w, at, i.a);
    w.m = m;
  }
  c.gread += i.a * __builtin_popcount(reading);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      Copy one{at32[l], (const u8 *)at[l], (u8)i.a, (u8)(n ? std::min<u32>(n[l], i.a) : i.a)};
      if (!in_shared(w, one.dst, i.a, "cp.async writes") || !aligned(w, one.dst, i.a, "cp.async writes")) continue;
      if (one.n && (!aligned(w, at[l], i.a, "cp.async reads") || !inside(&w, at[l], one.n, "cp.async reads")))
        one.n = 0;
      if (one.n) own_stores(w, at[l], one.n), order_read(w, at[l], one.n);
      touch(w, one.dst, i.a, true, true, false, true);
      if (options.mode == EARLY || (options.mode == RANDOM && rng() % 2))
        copy_run(w, one);
      else {
        memset(at_shared(w, one.dst), 0xff, one.size);
        w.copies.push_back(one);
      }
    }
}

void copy_commit(Warp &w, const Instr &) {
  w.copy_groups.push_back(std::move(w.copies));
  w.copies.clear();
}

void copy_wait(Warp &w, const Instr &i) {
  if (i.a < 0) copy_commit(w, i);
  w.cta->clock++;
  while (w.copy_groups.size() > (size_t)std::max(i.a, 0)) {
    for (auto &c : w.copy_groups.front()) copy_run(w, c);
    w.copy_groups.pop_front();
  }
}
