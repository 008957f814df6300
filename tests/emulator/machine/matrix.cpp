// ldmatrix and stmatrix: matrices of 8 x 8 halves, a row's address from each lane. v: the registers, b: transposed.
#include "build.h"
#include "memory.h"

void load_matrix(Warp &w, const Instr &i) {
  u32 *base = R<u32>(w, i.base);
  Counters &c = w.cta->grid->c;
  size_t x = i.v.size();
  u16 rows[32][8];
  for (size_t r = 0; r < 8 * x; r++) {
    u32 at = base[r] + i.off;
    if (!in_shared(w, at, 16, "reads") || !aligned(w, at, 16, "reads")) {
      memset(rows[r], 255, 16);
      continue;
    }
    touch(w, at, 16, false, true);
    memcpy(rows[r], at_shared(w, at), 16);
  }
  u32 at32[32];
  for (int l = 0; l < 32; l++) at32[l] = base[l] + i.off;
  banks(w, x == 4 ? ~0u : x == 2 ? 0xffff : 0xff, at32, 16, c.wave_ldm, c.ideal_ldm);
  for (size_t k = 0; k < x; k++) {
    u32 t[32];
    int o = 8 * k;
    for (int l = 0; l < 32; l++)
      t[l] = i.b ? rows[o + l % 4 * 2][l / 4] | (u32)rows[o + l % 4 * 2 + 1][l / 4] << 16
                 : rows[o + l / 4][l % 4 * 2] | (u32)rows[o + l / 4][l % 4 * 2 + 1] << 16;
    put(w, i.v[k], t);
  }
}

void store_matrix(Warp &w, const Instr &i) {
  u32 *base = R<u32>(w, i.base);
  Counters &c = w.cta->grid->c;
  size_t x = i.v.size();
  u16 rows[32][8];
  for (size_t k = 0; k < x; k++) {
    u32 *v = R<u32>(w, i.v[k]);
    int o = 8 * k;
    for (int l = 0; l < 32; l++) {
      if (i.b)
        rows[o + l % 4 * 2][l / 4] = v[l], rows[o + l % 4 * 2 + 1][l / 4] = v[l] >> 16;
      else
        rows[o + l / 4][l % 4 * 2] = v[l], rows[o + l / 4][l % 4 * 2 + 1] = v[l] >> 16;
    }
  }
  u32 at32[32];
  for (int l = 0; l < 32; l++) at32[l] = base[l] + i.off;
  banks(w, x == 4 ? ~0u : x == 2 ? 0xffff : 0xff, at32, 16, c.wave_stm, c.ideal_stm);
  w.cta->clock++;
  for (size_t r = 0; r < 8 * x; r++) {
    u32 at = base[r] + i.off;
    if (!in_shared(w, at, 16, "writes") || !aligned(w, at, 16, "writes")) continue;
    touch(w, at, 16, true, true, !memcmp(at_shared(w, at), rows[r], 16));
    memcpy(at_shared(w, at), rows[r], 16);
  }
}
