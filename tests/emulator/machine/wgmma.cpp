// wgmma: a warp's 16 rows of m64nNk16, from shared memory by matrix descriptors or with A in registers, in groups that
// are waited for. Where the mode is late, it reads its operands at its wait.
#include "build.h"
#include "memory.h"

// v: accumulators; v2: A in registers; a: type, b: N, c: bits: A, B transposed; o: see build.
static void wgmma_run(Warp &w, const Product &p) {
  const Instr &i = *p.i;
  int N = i.b, K = i.a == TF32 ? 8 : 16, size = i.a == TF32 ? 4 : 2;
  static thread_local float A[16][16], B[16][256], D[16][256];
  auto fetch = [&](u64 desc, bool turned, int rows, int from, auto to) {
    // Rows from `from` on, each K elements.
    u32 start = (desc & 0x3fff) << 4, lead = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    // Bytes of a row of an atom.
    int mode = desc >> 62, span = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;
    if (desc >> 49 & 7) problem(&w, "a wgmma descriptor with a base offset");
    if (!turned) {
      for (int r = 0; r < rows; r++)
        for (int chunk = 0; chunk < 2; chunk++) {
          int row = r + from;
          u32 at = start + row / 8 * stride + row % 8 * span + (mode == 0 ? chunk * lead : chunk * 16);
          at = swizzled(at, mode ? span : 0);
          if (!in_shared(w, at, 16, "wgmma reads")) continue;
          touch(w, at, 16, false, false);
          const u8 *src = at_shared(w, at);
          for (int e = 0; e < 16 / size; e++) {
            int k = chunk * (16 / size) + e;
            if (size == 4) {
              u32 u;
              memcpy(&u, src + 4 * e, 4);
              to(r, k, tf32(u));
            } else {
              u16 h;
              memcpy(&h, src + 2 * e, 2);
              to(r, k, i.a == BF16 ? bf16_to_f32(h) : f16_to_f32(h));
            }
          }
        }
    } else {
      // 16 bytes hold 8 rows of one k; an atom has so many rows.
      int per = span / 2;
      for (int r = from; r < from + rows; r += 8)
        for (int k = 0; k < K; k++) {
          u32 at = mode == 0 ? start + r / 8 * stride + k / 8 * lead + k % 8 * 16
                             : start + r / per * lead + k / 8 * stride + k % 8 * span + r % per * 2;
          at = swizzled(at, mode ? span : 0);
          if (!in_shared(w, at, 16, "wgmma reads")) continue;
          touch(w, at, 16, false, false);
          const u8 *src = at_shared(w, at);
          for (int e = 0; e < 8; e++) {
            u16 h;
            memcpy(&h, src + 2 * e, 2);
            to(r + e - from, k, i.a == BF16 ? bf16_to_f32(h) : f16_to_f32(h));
          }
        }
    }
  };
  memset(A, 0, sizeof A);
  if (i.v2.size()) {
    // PTX lets nobody write these registers before the wait; hardware may have read them long ago.
    const u32 *regs[4];
    for (int k = 0; k < 4; k++) {
      if (w.written[i.v2[k] / 64] > p.stamp)
        problem(&w, "note: registers were written while a wgmma in flight has them as its A");
      regs[k] = options.registers ? R<u32>(w, i.v2[k]) : p.regs[k];
    }
    fragment(regs, i.a, A);
  } else
    fetch(p.a, i.c & 1, 16, w.id % 4 * 16, [&](int r, int k, float f) { A[r][k] = f; });
  fetch(p.b, i.c & 2, N, 0, [&](int r, int k, float f) { B[k][r] = f; });
  for (int j = 0; j < N / 8; j++)
    for (int k = 0; k < 4; k++) {
      float *d = R<float>(w, i.v[4 * j + k]);
      for (int l = 0; l < 32; l++) D[l / 4 + (k >> 1) * 8][8 * j + l % 4 * 2 + (k & 1)] = p.scale_d ? d[l] : 0.0f;
    }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++) {
      float a = A[r][k];
      float *d = D[r];
      const float *b = B[k];
      for (int n = 0; n < N; n++) d[n] = __builtin_fmaf(a, b[n], d[n]);
    }
  for (int j = 0; j < N / 8; j++)
    for (int k = 0; k < 4; k++) {
      float *d = R<float>(w, i.v[4 * j + k]);
      for (int l = 0; l < 32; l++) d[l] = D[l / 4 + (k >> 1) * 8][8 * j + l % 4 * 2 + (k & 1)];
    }
}

void wgmma(Warp &w, const Instr &i) {
  if (w.m != ~0u) problem(&w, "wgmma of a part of a warp");
  Product p{
      &i, i.o[0] == NONE ? 0 : R<u64>(w, i.o[0])[0], R<u64>(w, i.o[1])[0], R<u32>(w, i.o[2])[0] != 0, w.cta->clock, {}};
  for (size_t k = 0; k < i.v2.size(); k++) memcpy(p.regs[k], R<u32>(w, i.v2[k]), 128);
  for (auto r : i.v)
    if (w.written[r / 64] > w.wg_fence) {
      problem(&w, "wgmma over accumulators written since the last wgmma.fence");
      break;
    }
  for (auto r : i.v2)
    if (w.written[r / 64] > w.wg_fence) {
      problem(&w, "wgmma of an A in registers written since the last wgmma.fence");
      break;
    }
  w.cta->grid->c.mma_flops += 2ull * 16 * i.b * (i.a == TF32 ? 8 : 16);
  bool now = options.mode == EARLY || w.cta->grid->kernel->serial ||
             (options.mode == RANDOM && w.products.empty() && w.product_groups.empty() && rng() % 2);
  if (now)
    wgmma_run(w, p);
  else
    w.products.push_back(p);
}

void wgmma_commit(Warp &w, const Instr &) {
  if (w.products.size() || w.product_groups.size()) w.product_groups.push_back(std::move(w.products));
  w.products.clear();
}

void wgmma_wait(Warp &w, const Instr &i) {
  while (w.product_groups.size() > (size_t)i.a) {
    for (auto &p : w.product_groups.front()) wgmma_run(w, p);
    w.product_groups.pop_front();
  }
}

void wgmma_fence(Warp &w, const Instr &) {
  w.wg_fence = w.cta->clock++;
}
