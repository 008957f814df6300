// From text: the ends of a program, ld, st, atom, red, ldmatrix, stmatrix, mma, wgmma.
#include <cstdlib>
#include <stdexcept>

#include "build.h"

void memory_operand(Instr &i, Arg &a, bool second) {
  if (a.kind != Arg::MEM) throw std::runtime_error("no address");
  (second ? i.base2 : i.base) = a.reg;
  (second ? i.off2 : i.off) = a.imm;
  if (!second) i.d = a.width;
}

void register_operands(vector<u32> &to, Arg &a, Statement &s, u8 width) {
  Statement inner = s;
  inner.args = a.kind == Arg::VEC ? a.v : vector<Arg>{a};
  for (size_t k = 0; k < inner.args.size(); k++) to.push_back(inner.reg(k, width));
}

bool execute_by(Instr &i, Fn fn, Class cls) {
  i.fn = fn;
  i.cls = cls;
  return true;
}

static u8 width_of(Arg &a, int bytes) {
  Arg &e = a.kind == Arg::VEC ? a.v[0] : a;
  return e.kind == Arg::REG ? e.width : bytes <= 2 ? 16 : bytes == 8 ? 64 : 32;
}

// ld and st: see access.cpp.
static bool access(Instr &i, Statement &s) {
  bool load = s.parts[0] == "ld";
  Arg &value = s.args[load ? 0 : 1], &address = s.args[load ? 1 : 0];
  const string &type = s.parts.back();
  i.a = atoi(type.c_str() + (type[0] == 'b' && type[1] == 'f' ? 2 : 1)) / 8;
  i.b = type[0] == 's';
  i.w[0] = width_of(value, i.a);
  memory_operand(i, address);
  register_operands(i.v, value, s, i.w[0]);
  size_t elements = s.has("v2") ? 2 : s.has("v4") ? 4 : s.has("v8") ? 8 : 1;
  if (i.v.size() != elements) return false;
  if (s.has("volatile") || s.has("acquire") || s.has("release") || s.has("local")) return false;
  if (s.has("param")) return load && address.reg == NONE && execute_by(i, load_param, MOVE);
  if (s.has("global")) return load ? execute_by(i, load_global, LDG) : execute_by(i, store_global, STG);
  bool shared = s.has("shared") || s.op.find("shared::cta") != string::npos;
  if (shared) return load ? execute_by(i, load_shared, LDS) : execute_by(i, store_shared, STS);
  return false;
}

// atom and red: see access.cpp.
static bool update(Instr &i, Statement &s) {
  if (!s.has("global") || !(s.has("gpu") || s.has("cta"))) return false;
  // By number, as `atomic` has them; 3 is the addition of floats.
  const char *operations[] = {"add", "exch", "cas", "", "max", "and"};
  i.b = -1;
  for (int k = 0; k < 6; k++)
    if (*operations[k] && s.has(operations[k])) i.b = k;
  const string &type = s.parts.back();
  i.a = atoi(type.c_str() + 1) / 8;
  if (i.b == 0 && type[0] == 'f') i.b = 3;
  if (i.b < 0 || type == "f16" || type == "f64") return false;
  size_t address = s.parts[0] == "atom";
  memory_operand(i, s.args[address]);
  i.w[0] = i.w[1] = i.a * 8;
  // Others than those of its CTA are nothing to an operation of that scope.
  if (s.has("gpu"))
    i.c = (s.has("acq_rel") || s.has("release") ? 1 : 0) | (s.has("acq_rel") || s.has("acquire") ? 2 : 0);
  if (address) i.o[0] = s.reg(0, i.w[0]);
  i.o[1] = s.reg(address + 1, i.w[1]);
  if (i.b == 2) i.o[2] = s.reg(address + 2, i.w[1]);
  return execute_by(i, atomic, ATOM);
}

// ldmatrix and stmatrix: see matrix.cpp.
static bool matrix(Instr &i, Statement &s) {
  bool load = s.parts[0] == "ldmatrix";
  if (!s.has("m8n8") || !s.has("b16")) return false;
  memory_operand(i, s.args[load ? 1 : 0]);
  register_operands(i.v, s.args[load ? 0 : 1], s, 32);
  i.b = s.has("trans");
  size_t matrices = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
  if (i.v.size() != matrices || i.base == NONE) return false;
  return load ? execute_by(i, load_matrix, LDM) : execute_by(i, store_matrix, STM);
}

// The element type of a product, or -1.
static int type_of(Statement &s) {
  return s.has("bf16") ? BF16 : s.has("f16") ? F16 : s.has("tf32") ? TF32 : -1;
}

// mma.sync: see mma.cpp.
static bool product(Instr &i, Statement &s) {
  i.a = type_of(s);
  i.b = s.has("m16n8k16") ? 16 : s.has("m16n8k8") ? 8 : 0;
  if (i.a < 0 || i.b != (i.a == TF32 ? 8 : 16)) return false;
  if (!s.has("row") || !s.has("col") || s.parts.back() != "f32") return false;
  for (auto &arg : s.args) register_operands(i.v, arg, s, 32);
  return i.v.size() == 14 && execute_by(i, mma, MMA);
}

// wgmma: see wgmma.cpp.
static bool group_product(Instr &i, Statement &s) {
  if (s.has("fence")) return execute_by(i, wgmma_fence, WGMMA);
  if (s.has("commit_group")) return execute_by(i, wgmma_commit, WGMMA);
  if (s.has("wait_group")) {
    i.a = s.args[0].imm;
    return execute_by(i, wgmma_wait, WGMMA);
  }
  i.a = type_of(s);
  size_t n = s.op.find(".m64n");
  if (i.a < 0 || n == string::npos || s.op.find(i.a == TF32 ? "k8.f32" : "k16.f32") == string::npos) return false;
  i.b = atoi(s.op.c_str() + n + 5);
  register_operands(i.v, s.args[0], s, 32);
  if (i.v.size() != (size_t)i.b / 2) return false;
  bool by_register = s.args[1].kind == Arg::VEC;
  if (by_register)
    register_operands(i.v2, s.args[1], s, 32);
  else
    i.o[0] = s.reg(1, 64);
  i.o[1] = s.reg(2, 64);
  i.o[2] = s.reg(3, 1);
  size_t k = 4;
  // The signs of A and B.
  for (size_t sign = 0; sign < 2; sign++)
    if (s.args.at(k++).imm != 1) return false;
  if (!by_register && i.a != TF32) i.c |= s.args.at(k++).imm ? 1 : 0;
  if (i.a != TF32) i.c |= s.args.at(k++).imm ? 2 : 0;
  return k == s.args.size() && execute_by(i, wgmma, WGMMA);
}

bool build_memory(Instr &i, Statement &s) {
  const string &op = s.parts[0];
  if (op == "ret" || op == "exit") {
    i.a = 2;
    return execute_by(i, nothing, BRANCH);
  }
  if (op == "ld" || op == "st") return access(i, s);
  if (op == "atom" || op == "red") return update(i, s);
  if (op == "ldmatrix" || op == "stmatrix") return matrix(i, s);
  if (op == "mma") return product(i, s);
  return op == "wgmma" && group_product(i, s);
}
