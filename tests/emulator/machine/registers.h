// Registers of a warp, and halves as floats.
#pragma once
#include "machine.h"

template <class T>
inline T *R(Warp &w, u32 off) {
  return (T *)(w.r + off);
}
// Write the lanes that the instruction is for.
template <class D>
inline void put(Warp &w, u32 off, const D *t) {
  D *d = R<D>(w, off);
  if (w.m == ~0u) {
    memcpy(d, t, 32 * sizeof(D));
    return;
  }
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) d[l] = t[l];
}
inline u64 get(Warp &w, u32 off, u8 width, int l) {
  if (width == 64) return R<u64>(w, off)[l];
  return width == 16 ? R<u16>(w, off)[l] : R<u32>(w, off)[l];
}
inline void set(Warp &w, u32 off, u8 width, int l, u64 v) {
  if (width == 64)
    R<u64>(w, off)[l] = v;
  else if (width == 16)
    R<u16>(w, off)[l] = v;
  else
    R<u32>(w, off)[l] = v;
}

inline float bf16_to_f32(u16 h) {
  u32 u = (u32)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline u16 f32_to_bf16(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
#ifdef __F16C__
inline float f16_to_f32(u16 h) {
  using Halves = __attribute__((vector_size(16))) short;
  return __builtin_ia32_vcvtph2ps((Halves){(short)h, 0, 0, 0, 0, 0, 0, 0})[0];
}
inline u16 f32_to_f16(float f) {
  using Floats = __attribute__((vector_size(16))) float;
  return (u16)__builtin_ia32_vcvtps2ph((Floats){f, 0, 0, 0}, 0)[0];
}
#else
inline float f16_to_f32(u16 h) {
  _Float16 half;
  memcpy(&half, &h, 2);
  return half;
}
inline u16 f32_to_f16(float f) {
  _Float16 half = f;
  u16 h;
  memcpy(&h, &half, 2);
  return h;
}
#endif
