// Arithmetic between registers, by name.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "build.h"

// By name: the function, and the widths of its operands as letters.
static std::unordered_map<string, std::pair<Fn, string>> table;

template <class T>
constexpr char letter() {
  return sizeof(T) == 8 ? 'd' : sizeof(T) == 2 ? 'h' : 'w';
}

// An instruction with a result of type D and operands of types A, which is f lane by lane.
template <class D, class F, class... A, size_t... K>
static void execute(Warp &w, const Instr &i, std::index_sequence<K...>) {
  std::tuple<const A *...> operands{R<A>(w, i.o[1 + K])...};
  D t[32];
  for (int l = 0; l < 32; l++) t[l] = F{}(std::get<K>(operands)[l]...);
  put(w, i.o[0], t);
}

template <class D, class... A, class F>
static void add(const string &name, F) {
  Fn fn = [](Warp &w, const Instr &i) {
    execute<D, F, A...>(w, i, std::index_sequence_for<A...>{});
  };
  table[name] = {fn, {letter<D>(), letter<A>()...}};
}

// Types of the result and of the operands, the name, and an expression of a, b and c.
#define ONE(D, A, NAME, E) add<D, A>(NAME, [](A a) -> D { return (D)(E); })
#define TWO(D, A, B, NAME, E) add<D, A, B>(NAME, [](A a, B b) -> D { return (D)(E); })
#define THREE(D, A, B, C, NAME, E) add<D, A, B, C>(NAME, [](A a, B b, C c) -> D { return (D)(E); })

// The type that holds a product of two.
template <class T>
struct Wide;
#define WIDE(NARROW, WIDER) \
  template <>               \
  struct Wide<NARROW> {     \
    using type = WIDER;     \
  }
WIDE(u16, u32);
WIDE(s16, s32);
WIDE(u32, u64);
WIDE(s32, s64);
WIDE(u64, unsigned __int128);
WIDE(s64, __int128);

// bfe: `length` bits of a from `position` on; signed, those beyond are copies of the highest.
template <class T>
static T bit_field(T a, u32 position, u32 length) {
  constexpr u32 bits = sizeof(T) * 8;
  if (!length) return 0;
  u32 highest = std::min(position + length - 1, bits - 1);
  T sign = std::is_signed<T>::value && a >> highest & 1 ? (T)-1 : (T)0;
  T low = position >= bits ? sign : (T)(a >> position);
  if (length >= bits) return low;
  T mask = ((T)1 << length) - 1;
  return (T)((low & mask) | (sign & ~mask));
}

template <class T>
static void integers(const string &t) {
  using W = typename Wide<T>::type;
  constexpr int bits = sizeof(T) * 8;
  TWO(T, T, T, "add." + t, a + b);
  TWO(T, T, T, "sub." + t, a - b);
  TWO(T, T, T, "mul.lo." + t, a * b);
  TWO(T, T, T, "mul.hi." + t, ((W)a * (W)b) >> bits);
  TWO(T, T, T, "div." + t, b ? (std::is_signed<T>::value && b == (T)-1 ? (T)(0 - a) : a / (b ? b : 1)) : (T)-1);
  TWO(T, T, T, "rem." + t, b ? (std::is_signed<T>::value && b == (T)-1 ? (T)0 : a % (b ? b : 1)) : a);
  TWO(T, T, T, "min." + t, a < b ? a : b);
  TWO(T, T, T, "max." + t, a > b ? a : b);
  THREE(T, T, T, T, "mad.lo." + t, a * b + c);
  THREE(T, T, T, T, "mad.hi." + t, (((W)a * (W)b) >> bits) + c);
  TWO(T, T, u32, "shr." + t, b >= bits ? (a < 0 ? (T)-1 : (T)0) : (T)(a >> (b & (bits - 1))));
  ONE(T, T, "neg." + t, 0 - a);
  ONE(T, T, "abs." + t, a < 0 ? 0 - a : a);
  if constexpr (sizeof(T) < 8) {
    TWO(W, T, T, "mul.wide." + t, (W)a * (W)b);
    THREE(W, T, T, W, "mad.wide." + t, (W)a * (W)b + c);
  }
  if constexpr (sizeof(T) >= 4) THREE(T, T, u32, u32, "bfe." + t, bit_field(a, b & 255, c & 255));
}

template <class T>
static void bitwise(const string &t) {
  constexpr int bits = sizeof(T) * 8;
  TWO(T, T, T, "and." + t, a & b);
  TWO(T, T, T, "or." + t, a | b);
  TWO(T, T, T, "xor." + t, a ^ b);
  ONE(T, T, "not." + t, ~a);
  TWO(T, T, u32, "shl." + t, b >= bits ? 0 : a << (b & (bits - 1)));
  TWO(T, T, u32, "shr." + t, b >= bits ? 0 : a >> (b & (bits - 1)));
}

// Comparisons give lanes of ones or zeros.
template <class T>
static void comparisons(const string &t) {
#define CMP(NAME, E) TWO(u32, T, T, "setp." NAME "." + t, (E) ? ~0u : 0u)
  CMP("eq", a == b);
  CMP("ne", a != b);
  CMP("lt", a < b);
  CMP("le", a <= b);
  CMP("gt", a > b);
  CMP("ge", a >= b);
  if constexpr (std::is_floating_point<T>::value) {
    CMP("equ", !(a < b || a > b));
    CMP("neu", !(a == b));
    CMP("ltu", !(a >= b));
    CMP("leu", !(a > b));
    CMP("gtu", !(a <= b));
    CMP("geu", !(a < b));
    CMP("num", a == a && b == b);
    CMP("nan", a != a || b != b);
  } else {
    CMP("lo", a < b);
    CMP("ls", a <= b);
    CMP("hi", a > b);
    CMP("hs", a >= b);
  }
}

template <class T>
static void select(const string &t) {
  THREE(T, T, T, u32, "selp." + t, c ? a : b);
}

static u32 prmt(u32 a, u32 b, u32 c) {
  u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = c >> 4 * i & 15;
    u8 byte = both >> 8 * (s & 7);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= (u32)byte << 8 * i;
  }
  return r;
}

// What is there for several types.
static void families() {
  integers<u16>("u16");
  integers<s16>("s16");
  integers<u32>("u32");
  integers<s32>("s32");
  integers<u64>("u64");
  integers<s64>("s64");
  bitwise<u16>("b16");
  bitwise<u32>("b32");
  bitwise<u64>("b64");
  TWO(u32, u32, u32, "and.pred", a & b);
  TWO(u32, u32, u32, "or.pred", a | b);
  TWO(u32, u32, u32, "xor.pred", a ^ b);
  ONE(u32, u32, "not.pred", ~a);
  ONE(u32, u32, "mov.pred", a);
  comparisons<u16>("u16");
  comparisons<s16>("s16");
  comparisons<u32>("u32");
  comparisons<s32>("s32");
  comparisons<u64>("u64");
  comparisons<s64>("s64");
  comparisons<u16>("b16");
  comparisons<u32>("b32");
  comparisons<u64>("b64");
  comparisons<float>("f32");
  comparisons<double>("f64");
  for (auto t : {"b16", "u16", "s16"}) select<u16>(t);
  for (auto t : {"b32", "u32", "s32", "f32"}) select<u32>(t);
  for (auto t : {"b64", "u64", "s64", "f64"}) select<u64>(t);
  for (auto t : {"b16", "u16", "s16", "f16", "bf16"}) ONE(u16, u16, string("mov.") + t, a);
  for (auto t : {"b32", "u32", "s32", "f32"}) ONE(u32, u32, string("mov.") + t, a);
  for (auto t : {"b64", "u64", "s64", "f64"}) ONE(u64, u64, string("mov.") + t, a);
}

static void floats() {
  TWO(float, float, float, "add.f32", a + b);
  TWO(float, float, float, "sub.f32", a - b);
  TWO(float, float, float, "mul.f32", a *b);
  TWO(float, float, float, "div.f32", a / b);
  THREE(float, float, float, float, "fma.f32", __builtin_fmaf(a, b, c));
  THREE(float, float, float, float, "mad.f32", __builtin_fmaf(a, b, c));
  TWO(float, float, float, "min.f32", b != b ? a : a != a ? b : a < b ? a : b);
  TWO(float, float, float, "max.f32", b != b ? a : a != a ? b : a > b ? a : b);
  ONE(float, float, "neg.f32", -a);
  ONE(float, float, "abs.f32", std::fabs(a));
  ONE(float, float, "ex2.f32", std::exp2(a));
  ONE(float, float, "lg2.f32", std::log2(a));
  ONE(float, float, "rcp.f32", 1.0f / a);
  ONE(float, float, "sqrt.f32", std::sqrt(a));
  ONE(float, float, "rsqrt.f32", 1.0f / std::sqrt(a));
  ONE(float, float, "tanh.f32", std::tanh(a));
  ONE(float, float, "sin.f32", std::sin(a));
  ONE(float, float, "cos.f32", std::cos(a));
  TWO(u32, u32, u32, "copysign.f32", (a & 0x80000000) | (b & 0x7fffffff));
  TWO(double, double, double, "add.f64", a + b);
  TWO(double, double, double, "mul.f64", a *b);
  THREE(double, double, double, double, "fma.f64", __builtin_fma(a, b, c));
}

static void bits() {
  THREE(u32, u32, u32, u32, "prmt.b32", prmt(a, b, c));
  ONE(u32, u32, "popc.b32", __builtin_popcount(a));
  ONE(u32, u32, "clz.b32", a ? __builtin_clz(a) : 32);
  ONE(u32, u64, "popc.b64", __builtin_popcountll(a));
  THREE(u32, u32, u32, u32, "shf.l.wrap.b32", (u32)(((u64)b << 32 | a) << (c & 31) >> 32));
  THREE(u32, u32, u32, u32, "shf.r.wrap.b32", (u32)(((u64)b << 32 | a) >> (c & 31)));
  THREE(u32, u32, u32, u32, "shf.l.clamp.b32", (u32)(c > 31 ? a : ((u64)b << 32 | a) << c >> 32));
  THREE(u32, u32, u32, u32, "shf.r.clamp.b32", (u32)(((u64)b << 32 | a) >> (c > 32 ? 32 : c)));
}

// bf16 and f16, one and two in a register; TF32.
static void halves() {
  ONE(u16, float, "cvt.bf16.f32", f32_to_bf16(a));
  ONE(u16, float, "cvt.f16.f32", f32_to_f16(a));
  ONE(float, u16, "cvt.f32.bf16", bf16_to_f32(a));
  ONE(float, u16, "cvt.f32.f16", f16_to_f32(a));
  TWO(u32, float, float, "cvt.bf16x2.f32", (u32)f32_to_bf16(a) << 16 | f32_to_bf16(b));
  TWO(u32, float, float, "cvt.f16x2.f32", (u32)f32_to_f16(a) << 16 | f32_to_f16(b));
  TWO(u16, u16, u16, "max.bf16", f32_to_bf16(std::fmax(bf16_to_f32(a), bf16_to_f32(b))));
  TWO(u16, u16, u16, "min.bf16", f32_to_bf16(std::fmin(bf16_to_f32(a), bf16_to_f32(b))));
  TWO(u16, u16, u16, "max.f16", f32_to_f16(std::fmax(f16_to_f32(a), f16_to_f32(b))));
  TWO(u16, u16, u16, "min.f16", f32_to_f16(std::fmin(f16_to_f32(a), f16_to_f32(b))));
#define PAIRS(NAME, TO, FROM, F) \
  TWO(u32, u32, u32, NAME, (u32)TO(F(FROM(a >> 16), FROM(b >> 16))) << 16 | TO(F(FROM(a), FROM(b))))
  PAIRS("max.bf16x2", f32_to_bf16, bf16_to_f32, std::fmax);
  PAIRS("min.bf16x2", f32_to_bf16, bf16_to_f32, std::fmin);
  PAIRS("max.f16x2", f32_to_f16, f16_to_f32, std::fmax);
  PAIRS("min.f16x2", f32_to_f16, f16_to_f32, std::fmin);
  // .rna: to the nearest, ties away from zero.
  ONE(u32, u32, "cvt.tf32.f32", (a & 0x7fffffff) >= 0x7f800000 ? a : (a + 0x1000) & 0xffffe000);
}

static void conversions() {
  ONE(float, s16, "cvt.f32.s16", a);
  ONE(float, s32, "cvt.f32.s32", a);
  ONE(float, u32, "cvt.f32.u32", a);
  ONE(float, s64, "cvt.f32.s64", a);
  ONE(float, u64, "cvt.f32.u64", a);
  ONE(double, float, "cvt.f64.f32", a);
  ONE(float, double, "cvt.f32.f64", a);
  ONE(u64, u32, "cvt.u64.u32", a);
  ONE(s64, s32, "cvt.s64.s32", a);
  ONE(u32, u64, "cvt.u32.u64", a);
}

const std::pair<Fn, string> *arithmetic(const string &name) {
  if (table.empty()) {
    families();
    floats();
    bits();
    halves();
    conversions();
  }
  auto it = table.find(name);
  return it == table.end() ? nullptr : &it->second;
}
