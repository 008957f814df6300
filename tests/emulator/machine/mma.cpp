// mma.sync: m16n8k16 of halves, m16n8k8 of TF32; sums in fp32 by fused multiply-adds, in order of K.
#include "build.h"
#include "memory.h"

static inline float half_of(u32 pair, int which, int type) {
  u16 h = which ? pair >> 16 : pair;
  return type == BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

float tf32(u32 u) {
  u &= 0xffffe000;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

void fragment(const u32 *const *regs, int type, float (*A)[16]) {
  for (int k = 0; k < 4; k++) {
    const u32 *r = regs[k];
    for (int l = 0; l < 32; l++) {
      int g = l / 4 + (k & 1) * 8, t = l % 4;
      if (type == TF32)
        A[g][t + (k >> 1) * 4] = tf32(r[l]);
      else
        A[g][t * 2 + (k >> 1) * 8] = half_of(r[l], 0, type), A[g][t * 2 + 1 + (k >> 1) * 8] = half_of(r[l], 1, type);
    }
  }
}

// v: d(4), a(4), b(2), c(4); a: type; b: K.
void mma(Warp &w, const Instr &i) {
  float A[16][16], B[16][8], D[16][8];
  const u32 *regs[4] = {R<u32>(w, i.v[4]), R<u32>(w, i.v[5]), R<u32>(w, i.v[6]), R<u32>(w, i.v[7])};
  fragment(regs, i.a, A);
  if (w.m != ~0u) problem(&w, "mma of a part of a warp");
  for (int k = 0; k < 2; k++) {
    u32 *r = R<u32>(w, i.v[8 + k]);
    for (int l = 0; l < 32; l++) {
      int n = l / 4, t = l % 4;
      if (i.a == TF32)
        B[t + k * 4][n] = tf32(r[l]);
      else
        B[t * 2 + k * 8][n] = half_of(r[l], 0, i.a), B[t * 2 + 1 + k * 8][n] = half_of(r[l], 1, i.a);
    }
  }
  for (int k = 0; k < 4; k++) {
    float *c = R<float>(w, i.v[10 + k]);
    for (int l = 0; l < 32; l++) D[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)] = c[l];
  }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < i.b; k++) {
      float a = A[r][k];
      for (int n = 0; n < 8; n++) D[r][n] = __builtin_fmaf(a, B[k][n], D[r][n]);
    }
  for (int k = 0; k < 4; k++) {
    float t[32];
    for (int l = 0; l < 32; l++) t[l] = D[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)];
    put(w, i.v[k], t);
  }
  w.cta->grid->c.mma_flops += 2 * 16 * 8 * i.b;
}
