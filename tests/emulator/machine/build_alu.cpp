// Between registers: what is no plain arithmetic (packing, shuffles, votes), and all of it from text.
#include "build.h"

// a, b: bits of the destination's and of the source's type; c, d: signs.
static void convert_integers(Warp &w, const Instr &i) {
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      u64 v = get(w, i.o[1], i.w[1], l);
      if (i.b < 64) {
        v &= (1ull << i.b) - 1;
        if (i.d && v >> (i.b - 1)) v |= ~0ull << i.b;
      }
      if (i.a < 64) {
        v &= (1ull << i.a) - 1;
        if (i.c && v >> (i.a - 1)) v |= ~0ull << i.a;
      }
      set(w, i.o[0], i.w[0], l, v);
    }
}

static void lop3(Warp &w, const Instr &i) {
  u32 t[32], *a = R<u32>(w, i.o[1]), *b = R<u32>(w, i.o[2]), *c = R<u32>(w, i.o[3]);
  for (int l = 0; l < 32; l++) {
    u32 r = 0;
    for (int k = 0; k < 8; k++)
      if (i.a >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    t[l] = r;
  }
  put(w, i.o[0], t);
}

// mov.bN d, {a, b, ...}.
static void pack(Warp &w, const Instr &i) {
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      u64 r = 0;
      for (size_t k = 0; k < i.v.size(); k++) r |= get(w, i.v[k], i.a, l) << (i.a * k);
      set(w, i.o[0], i.w[0], l, r);
    }
}

static void unpack(Warp &w, const Instr &i) {
  for (int l = 0; l < 32; l++)
    if (w.m >> l & 1) {
      u64 v = get(w, i.o[0], i.w[0], l);
      for (size_t k = 0; k < i.v.size(); k++) set(w, i.v[k], i.a, l, v >> (i.a * k));
    }
}

// a: which way; o: d, p, a, b, c.
static void shuffle(Warp &w, const Instr &i) {
  u32 t[32], p[32], *a = R<u32>(w, i.o[2]), *b = R<u32>(w, i.o[3]), *c = R<u32>(w, i.o[4]);
  for (int l = 0; l < 32; l++) {
    int clamp = c[l] & 31, seg = c[l] >> 8 & 31, bl = b[l] & 31, top = (l & seg) | (clamp & ~seg), low = l & seg, j;
    bool in;
    if (i.a == 0)
      j = low | (bl & ~seg), in = j <= top;
    else if (i.a == 1)
      j = l ^ bl, in = j <= top;
    else if (i.a == 2)
      j = l - bl, in = j >= top;
    else
      j = l + bl, in = j <= top;
    if (!in) j = l;
    if (!(w.active >> j & 1)) problem(&w, "a shuffle from a lane that is not there");
    t[l] = a[j];
    p[l] = in ? ~0u : 0;
  }
  put(w, i.o[0], t);
  if (i.o[1] != NONE) put(w, i.o[1], p);
}

static void elect(Warp &w, const Instr &i) {
  u32 leader = w.m ? __builtin_ctz(w.m) : 0, t[32], p[32];
  for (int l = 0; l < 32; l++) t[l] = leader, p[l] = l == (int)leader ? ~0u : 0;
  put(w, i.o[0], t);
  put(w, i.o[1], p);
}

static void vote(Warp &w, const Instr &i) {
  u32 *a = R<u32>(w, i.o[1]), bits = 0, t[32];
  for (int l = 0; l < 32; l++)
    if ((w.m >> l & 1) && a[l]) bits |= 1u << l;
  u32 r = i.a == 0 ? bits : i.a == 1 ? (bits ? ~0u : 0) : (bits == w.m ? ~0u : 0);
  for (int l = 0; l < 32; l++) t[l] = r;
  put(w, i.o[0], t);
}

// The sum over the lanes of a mask, given to each; o: d, a, mask.
static void reduce(Warp &w, const Instr &i) {
  u32 *a = R<u32>(w, i.o[1]), *mask = R<u32>(w, i.o[2]), t[32];
  for (int l = 0; l < 32; l++) {
    if ((w.m >> l & 1) && (mask[l] & ~w.active)) problem(&w, "a reduction over a lane that is not there");
    t[l] = 0;
    for (int j = 0; j < 32; j++)
      if (mask[l] >> j & 1) t[l] += a[j];
  }
  put(w, i.o[0], t);
}

static void activemask(Warp &w, const Instr &i) {
  u32 t[32];
  for (int l = 0; l < 32; l++) t[l] = w.active;
  put(w, i.o[0], t);
}

static void param_address(Warp &w, const Instr &i) {
  u64 t[32], *a = R<u64>(w, i.o[1]);
  for (int l = 0; l < 32; l++) t[l] = a[l] + (u64)w.cta->grid->params();
  put(w, i.o[0], t);
}

static int bits_of(const string &t) {
  return atoi(t.c_str() + 1);
}

bool build_alu(Instr &i, Statement &s) {
  const string &op = s.parts[0];
  auto classify = [&] {
    bool f = s.parts.back() == "f32" || s.parts.back() == "f64";
    i.cls = op == "mov"                                ? MOVE
            : op == "setp" || s.parts.back() == "pred" ? PRED
            : op == "cvt"                              ? CONVERT
            : f                                        ? FLOAT
                                                       : ALU;
  };
  if (op == "mov" && s.args.size() == 2 && (s.args[1].kind == Arg::VEC || s.args[0].kind == Arg::VEC)) {
    bool packs = s.args[1].kind == Arg::VEC;
    auto &v = s.args[packs ? 1 : 0];
    int all = bits_of(s.parts.back());
    i.a = all / (int)v.v.size();
    i.w[0] = all;
    i.o[0] = s.reg(packs ? 0 : 1, all);
    i.cls = MOVE;
    i.fn = packs ? pack : unpack;
    i.c = !packs;
    Statement inner = s;
    inner.args = v.v;
    for (size_t k = 0; k < v.v.size(); k++) i.v.push_back(inner.reg(k, i.a));
    return true;
  }
  if (op == "cvta") {
    // To a global or shared address nothing changes; of parameters the engine makes an address.
    int width = bits_of(s.parts.back());
    i.o[0] = s.reg(0, width);
    i.o[1] = s.reg(1, width);
    i.cls = MOVE;
    i.fn = s.has("param") ? param_address : arithmetic(width == 64 ? "mov.b64" : "mov.b32")->first;
    return true;
  }
  if (op == "lop3") {
    i.a = (int)s.args[4].imm;
    for (int k = 0; k < 4; k++) i.o[k] = s.reg(k, 32);
    i.fn = lop3;
    i.cls = ALU;
    return true;
  }
  if (op == "shfl") {
    bool p = s.args.size() == 6;
    const char *ways[] = {"idx", "bfly", "up", "down"};
    for (int k = 0; k < 4; k++)
      if (s.has(ways[k])) i.a = k;
    i.o[0] = s.reg(0, 32);
    if (p) i.o[1] = s.reg(1, 1);
    for (int k = 0; k < 3; k++) i.o[2 + k] = s.reg(1 + p + k, 32);
    i.cls = SHFL;
    i.fn = shuffle;
    return true;
  }
  if (op == "redux") {
    // Triton's sums of integers; a minimum or a maximum is not there.
    if (!s.has("add")) return false;
    for (int k = 0; k < 3; k++) i.o[k] = s.reg(k, 32);
    i.cls = SHFL;
    i.fn = reduce;
    return true;
  }
  if (op == "elect") {
    i.o[0] = s.reg(0, 32);
    i.o[1] = s.reg(1, 1);
    i.cls = OTHER;
    i.fn = elect;
    return true;
  }
  if (op == "activemask") {
    i.o[0] = s.reg(0, 32);
    i.fn = activemask;
    return true;
  }
  if (op == "vote") {
    i.a = s.has("ballot") ? 0 : s.has("any") ? 1 : 2;
    i.o[0] = s.reg(0, i.a ? 1 : 32);
    i.o[1] = s.reg(1, 1);
    i.fn = vote;
    return true;
  }
  string key = op;
  for (size_t k = 1; k < s.parts.size(); k++) {
    const string &p = s.parts[k];
    bool drop = p == "rn" || p == "rz" || p == "rna" || p == "rni" || p == "ftz" || p == "sat" || p == "approx" ||
                p == "full" || p == "satfinite" || p == "relu" || p == "sync" || p == "aligned";
    if (p == "rz" || p == "rni" || p == "relu" || (p == "sat" && op != "cvt")) return false;
    if (!drop) key += "." + p;
  }
  bool combined = op == "setp" && s.args.size() == 4 && key.find(".and.") + key.find(".or.") != 2 * string::npos &&
                  (s.has("and") || s.has("or") || s.has("xor"));
  if (combined) return false;
  if (op == "cvt" && !arithmetic(key) && s.parts.size() == 3) {
    i.a = bits_of(s.parts[1]);
    i.b = bits_of(s.parts[2]);
    i.c = s.parts[1][0] == 's';
    i.d = s.parts[2][0] == 's';
    if (!strchr("usb", s.parts[1][0]) || !strchr("usb", s.parts[2][0]) || s.parts[1].size() > 3 ||
        s.parts[2].size() > 3)
      return false;
    i.w[0] = s.args[0].width;
    i.w[1] = s.args[1].kind == Arg::REG ? s.args[1].width : 64;
    i.o[0] = s.reg(0, i.w[0]);
    i.o[1] = s.reg(1, i.w[1]);
    i.cls = CONVERT;
    i.fn = convert_integers;
    return true;
  }
  auto *known = arithmetic(key);
  if (!known) return false;
  auto &[fn, widths] = *known;
  if (s.args.size() != widths.size()) return false;
  for (size_t k = 0; k < widths.size(); k++) {
    u8 width = widths[k] == 'd' ? 64 : widths[k] == 'h' ? 16 : 32;
    bool pred = s.parts.back() == "pred" || (op == "setp" && k == 0) || (op == "selp" && k == 3);
    if (s.args[k].kind == Arg::REG && s.args[k].width != (pred ? 1 : width) && !(op == "cvt")) return false;
    if (op == "cvt" && s.args[k].kind == Arg::REG && s.args[k].width != width) {
      if (s.parts.size() != 3 || !strchr("usb", s.parts[1][0]) || !strchr("usb", s.parts[2][0])) return false;
      i.a = bits_of(s.parts[1]);
      i.b = bits_of(s.parts[2]);
      i.c = s.parts[1][0] == 's';
      i.d = s.parts[2][0] == 's';
      i.w[0] = s.args[0].width;
      i.w[1] = s.args[1].width;
      i.o[0] = s.args[0].reg;
      i.o[1] = s.args[1].reg;
      i.cls = CONVERT;
      i.fn = convert_integers;
      return true;
    }
    i.o[k] = s.reg(k, pred ? 1 : width);
    i.w[k] = width;
  }
  i.fn = fn;
  classify();
  return true;
}
