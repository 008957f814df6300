// What a program is: instructions that a warp executes, made from the text of PTX. Also the short names of all files.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using std::string;
using std::vector;

// No register, no program counter.
constexpr u32 NONE = ~0u;
// The first KiB of shared memory is the system's.
constexpr u32 SHARED_BASE = 1024;

struct Warp;
struct Instr;
using Fn = void (*)(Warp &, const Instr &);

// Classes of instructions, by which they are counted. `class_names` in report.cpp has them in this order.
enum Class {
  ALU,
  FLOAT,
  CONVERT,
  MOVE,
  PRED,
  BRANCH,
  LDG,
  STG,
  LDS,
  STS,
  LDM,
  STM,
  CPASYNC,
  TMA,
  MMA,
  WGMMA,
  SYNC,
  SHFL,
  ATOM,
  OTHER,
  CLASSES
};
// Element types of tensor cores' operands.
enum Type { BF16, F16, TF32 };

struct Instr {
  Fn fn = nullptr;
  // The guard: @p or @!p.
  u32 pred = NONE;
  bool negated = false;
  Class cls = OTHER;
  // Registers, as byte offsets in a warp's file, and their widths in bits (1: a predicate).
  u32 o[6] = {NONE, NONE, NONE, NONE, NONE, NONE};
  u8 w[6] = {0, 0, 0, 0, 0, 0};
  // Memory operands: a register and an offset.
  u32 base = NONE, base2 = NONE;
  s64 off = 0, off2 = 0;
  // Registers of vector operands; those written, for wgmma.fence.
  vector<u32> v, v2, writes;
  // Whatever else the opcode says; each function that executes one says what.
  int a = 0, b = 0, c = 0, d = 0;
  // Of a branch: where to.
  u32 target = 0;
  // Where it comes from: the line of PTX, the text, the place in Python.
  int line = 0;
  string text, loc;
  // Whether a warp has come to it.
  mutable bool reached = false;
};

struct Param {
  string name;
  u32 offset, size;
};
// A register that is filled when a warp starts: with a value, or with a special one such as %tid.x (see engine.cpp).
struct Const {
  u32 off;
  u8 width;
  u64 value;
  int special;
};
struct Kernel {
  string name, source;
  vector<Instr> code;
  vector<Param> params;
  vector<Const> consts;
  u32 param_bytes = 0;
  // Bytes of a warp's registers.
  u32 file = 0;
  int threads = 0;
  bool wgmma = false;
  // Whether ptxas waits after each wgmma.
  bool serial = false;
};

// Parse a module of one kernel; throws std::runtime_error for what is not known.
Kernel *parse(const char *text);

// Find where the two ways of each conditional branch meet for sure, and note it in the branch's b (-1: at the exit).
void joins(vector<Instr> &code);
