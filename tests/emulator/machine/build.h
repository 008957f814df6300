// What the builders of instructions get from the parser. A builder says false where it does not know the instruction.
#pragma once
#include "registers.h"

struct Arg {
  enum Kind { REG, IMM, VEC, MEM, SINK, LABEL } kind = REG;
  // REG, or the base of MEM.
  u32 reg = NONE;
  u8 width = 0;
  // IMM, or the offset of MEM.
  bool is_float = false;
  s64 imm = 0;
  // VEC; of MEM the coordinates.
  vector<Arg> v;
  string label;
  // Of MEM: in the parameters.
  bool param = false;
};
struct Parser;
// A statement as text in pieces: `cp.async.ca.shared.global [a], [b], 16;` has the parts cp, async, ... and three
// arguments.
struct Statement {
  string op;
  vector<string> parts;
  vector<Arg> args;
  Parser *parser;

  bool has(const char *part) const {
    for (auto &p : parts)
      if (p == part) return true;
    return false;
  }
  // The register of an operand; an immediate gets one of its own.
  u32 reg(size_t i, u8 width);
};

u32 temporary(Parser *p, u8 width);

// By opcode: build_alu.cpp, build_memory.cpp, build_async.cpp.
bool build_alu(Instr &i, Statement &s);

bool build_memory(Instr &i, Statement &s);

bool build_async(Instr &i, Statement &s);

// Arithmetic by name, with the widths of its operands as letters (d: 64 bits, w: 32, h: 16); null where there is none.
const std::pair<Fn, string> *arithmetic(const string &name);

// Pieces that the builders share.
// An instruction is executed by this function and counted as of this class; true.
bool execute_by(Instr &i, Fn fn, Class cls);
void memory_operand(Instr &i, Arg &a, bool second = false);

void register_operands(vector<u32> &to, Arg &a, Statement &s, u8 width);

// What executes an instruction; each is described where it is defined.
void load_param(Warp &, const Instr &);

void load_global(Warp &, const Instr &);

void store_global(Warp &, const Instr &);

void load_shared(Warp &, const Instr &);

void store_shared(Warp &, const Instr &);

void atomic(Warp &, const Instr &);

void load_matrix(Warp &, const Instr &);

void store_matrix(Warp &, const Instr &);

void mma(Warp &, const Instr &);

void wgmma(Warp &, const Instr &);

void wgmma_commit(Warp &, const Instr &);

void wgmma_wait(Warp &, const Instr &);

void wgmma_fence(Warp &, const Instr &);

void copy_async(Warp &, const Instr &);

void copy_commit(Warp &, const Instr &);

void copy_wait(Warp &, const Instr &);

void tma(Warp &, const Instr &);

void bulk_commit(Warp &, const Instr &);

void bulk_wait(Warp &, const Instr &);

void mbar_init(Warp &, const Instr &);

void mbar_inval(Warp &, const Instr &);

void mbar_arrive(Warp &, const Instr &);

void mbar_wait(Warp &, const Instr &);

void bar_sync(Warp &, const Instr &);

void fence_proxy(Warp &, const Instr &);

void fence_global(Warp &, const Instr &);

void grid_wait(Warp &, const Instr &);

void grid_launch(Warp &, const Instr &);

void nothing(Warp &, const Instr &);
