// ld, st and atom. Of these: a is bytes of an element, b whether its sign is extended, v the registers.
#include "build.h"
#include "memory.h"

#include <algorithm>

static void addresses(Warp &w, const Instr &i, u64 *at) {
  if (i.base == NONE) {
    for (int l = 0; l < 32; l++) at[l] = i.off;
    return;
  }
  if (i.d == 32) {
    u32 *b = R<u32>(w, i.base);
    for (int l = 0; l < 32; l++) at[l] = (u32)(b[l] + (u32)i.off);
  } else {
    u64 *b = R<u64>(w, i.base);
    for (int l = 0; l < 32; l++) at[l] = b[l] + i.off;
  }
}

void load_param(Warp &w, const Instr &i) {
  u64 v = 0;
  const u8 *p = w.cta->grid->params() + i.off;
  for (size_t k = 0; k < i.v.size(); k++) {
    v = 0;
    memcpy(&v, p + k * i.a, i.a);
    for (int l = 0; l < 32; l++)
      if (w.m >> l & 1) set(w, i.v[k], i.w[0], l, v);
  }
}

static inline u64 extend(u64 v, const Instr &i) {
  return i.b && i.a < 8 && v >> (i.a * 8 - 1) & 1 ? v | ~0ull << (i.a * 8) : v;
}

void load_global(Warp &w, const Instr &i) {
  u64 at[32];
  addresses(w, i, at);
  u32 n = i.a * i.v.size();
  Counters &c = w.cta->grid->c;
  c.greq_ld++;
  c.gsectors_ld += sectors(w, at, n);
  c.gread += n * __builtin_popcount(w.m);
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      if (!aligned(w, at[l], n, "reads") || !inside(&w, at[l], n, "reads")) continue;
      own_stores(w, at[l], n);
      order_read(w, at[l], n);
      for (size_t k = 0; k < i.v.size(); k++) {
        u64 v = 0;
        memcpy(&v, (u8 *)at[l] + k * i.a, i.a);
        set(w, i.v[k], i.w[0], l, extend(v, i));
      }
    }
}

void store_global(Warp &w, const Instr &i) {
  u64 at[32];
  addresses(w, i, at);
  u32 n = i.a * i.v.size();
  Counters &c = w.cta->grid->c;
  c.greq_st++;
  c.gsectors_st += sectors(w, at, n);
  c.gwrite += n * __builtin_popcount(w.m);
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      if (!aligned(w, at[l], n, "writes") || !inside(&w, at[l], n, "writes")) continue;
      order_write(w, at[l], n, PLAIN);
      Store s;
      s.at = at[l];
      s.n = n;
      for (size_t k = 0; k < i.v.size(); k++) {
        u64 v = get(w, i.v[k], i.w[0], l);
        memcpy(s.data + k * i.a, &v, i.a);
      }
      if (options.weak && options.mode != EARLY)
        hold(w, s);
      else
        memcpy((void *)s.at, s.data, n);
    }
}

void load_shared(Warp &w, const Instr &i) {
  u64 at[32];
  addresses(w, i, at);
  u32 n = i.a * i.v.size(), at32[32];
  Counters &c = w.cta->grid->c;
  for (int l = 0; l < 32; l++) at32[l] = at[l];
  banks(w, w.m, at32, n, c.wave_ld, c.ideal_ld);
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      if (!in_shared(w, at[l], n, "reads") || !aligned(w, at[l], n, "reads")) continue;
      touch(w, at[l], n, false, true);
      for (size_t k = 0; k < i.v.size(); k++) {
        u64 v = 0;
        memcpy(&v, at_shared(w, at[l]) + k * i.a, i.a);
        set(w, i.v[k], i.w[0], l, extend(v, i));
      }
    }
}

void store_shared(Warp &w, const Instr &i) {
  u64 at[32];
  addresses(w, i, at);
  u32 n = i.a * i.v.size(), at32[32];
  Counters &c = w.cta->grid->c;
  for (int l = 0; l < 32; l++) at32[l] = at[l];
  banks(w, w.m, at32, n, c.wave_st, c.ideal_st);
  w.cta->clock++;
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      if (!in_shared(w, at[l], n, "writes") || !aligned(w, at[l], n, "writes")) continue;
      u8 data[16], *to = at_shared(w, at[l]);
      for (size_t k = 0; k < i.v.size(); k++) {
        u64 v = get(w, i.v[k], i.w[0], l);
        memcpy(data + k * i.a, &v, i.a);
      }
      touch(w, at[l], n, true, true, !memcmp(to, data, n));
      memcpy(to, data, n);
    }
}

// a: bytes; b: which operation; o: old, operand, second operand; c: bits: releases, acquires.
void atomic(Warp &w, const Instr &i) {
  u64 at[32];
  addresses(w, i, at);
  if (i.c & 1) publish(w);
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      if (!aligned(w, at[l], i.a, "updates") || !inside(&w, at[l], i.a, "updates")) continue;
      order_write(w, at[l], i.a, BY_ATOMIC);
      if (i.c & 1) order_release(w, at[l]);
      if (i.c & 2) order_acquire(w, at[l]);
      u64 old = 0, x = get(w, i.o[1], i.w[1], l), now;
      memcpy(&old, (void *)at[l], i.a);
      float fo, fx;
      memcpy(&fo, &old, 4);
      memcpy(&fx, &x, 4);
      switch (i.b) {
        case 0: now = old + x; break;
        case 1: now = x; break;
        case 2: now = old == x ? get(w, i.o[2], i.w[1], l) : old; break;
        case 3:
          fo += fx;
          now = 0;
          memcpy(&now, &fo, 4);
          break;
        case 4: now = std::max<s64>((s32)old, (s32)x); break;
        default: now = old & x;
      }
      memcpy((void *)at[l], &now, i.a);
      if (i.o[0] != NONE) set(w, i.o[0], i.w[0], l, old);
    }
}
