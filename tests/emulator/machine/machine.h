// What a machine is: warps, CTAs, grids of a stream, what is on its way in each, and counters.
// A warp executes an instruction for 32 lanes at once; a register is an array of 32 lanes.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>

#include "order.h"
#include "program.h"

// When asynchronous work takes effect.
enum Mode { EARLY, LATE, RANDOM };

struct Cta;
struct Grid;

// What cuTensorMapEncodeTiled was asked for.
struct TensorMap {
  u64 base;
  u32 rank;
  u64 dims[5], strides[5];
  u32 box[5];
  u32 elem, swizzle;
  bool nan;
};
extern std::deque<TensorMap> tensor_maps;
// What a CUtensorMap of ours begins with; its third word is the number of the map.
constexpr u64 TENSOR_MAP = 0x70616d726f736e74ull;

// Of a launch. `passes` over the banks of shared memory, and the fewest possible; sectors of 32 bytes of global memory.
struct Counters {
  u64 n[CLASSES] = {};
  u64 instructions = 0, divergent = 0, mma_flops = 0;
  u64 gread = 0, gwrite = 0, tma_read = 0, tma_write = 0;
  u64 gsectors_ld = 0, gsectors_st = 0, gsectors_cp = 0, greq_ld = 0, greq_st = 0;
  u64 wave_ld = 0, ideal_ld = 0, wave_st = 0, ideal_st = 0, wave_ldm = 0, ideal_ldm = 0, wave_stm = 0, ideal_stm = 0;
  u64 wave_cp = 0, ideal_cp = 0, greq_cp = 0;
};
// Of one instruction of a launch: passes over the banks and the fewest possible; requests of global memory and sectors.
struct Tally {
  u64 passes = 0, fewest = 0, requests = 0, sectors = 0;
};

// cp.async of one lane.
struct Copy {
  u32 dst;
  const u8 *src;
  u8 size, n;
};
// A wgmma: its descriptors, and its A in registers as it was at issue.
struct Product {
  const Instr *i;
  u64 a, b;
  bool scale_d;
  u64 stamp;
  u32 regs[4][32];
};
// A copy by TMA, either way.
struct Bulk {
  const TensorMap *map;
  s64 at[5];
  u32 shared, bar;
};
// Lanes that wait for others to come to the place where all meet.
struct Group {
  u32 pc, mask, join;
};
// A store to global memory that not everybody sees yet.
struct Store {
  u64 at;
  u8 n;
  u8 data[16];
};

enum State { READY, AT_BAR, AT_MBAR, AT_GRID, DONE };
struct Warp {
  Cta *cta;
  int id;
  // The registers.
  u8 *r;
  u32 pc = 0;
  // Lanes that go on together, and those that the instruction's guard leaves.
  u32 active = ~0u, m = ~0u;
  State state = READY;
  u32 wait_bar = 0, wait_parity = 0;
  bool triggered = false;
  // Where lanes that diverged meet; who has exited; who waits meanwhile.
  u32 join = NONE, gone = 0;
  vector<Group> others;
  // What is on its way: not committed yet, and by group.
  vector<Copy> copies;
  std::deque<vector<Copy>> copy_groups;
  vector<Product> products;
  std::deque<vector<Product>> product_groups;
  vector<Bulk> bulks;
  std::deque<vector<Bulk>> bulk_groups;
  // The CTA's clock at the last fence.proxy.async and wgmma.fence, and at the last write of each register.
  u64 proxy_fence = 0, wg_fence = 0;
  vector<u64> written;
  vector<Store> stores;
  Known known;
};

struct MBar {
  u32 expected, pending, phase;
  s64 tx;
};
// Who wrote and read two bytes of shared memory, in which interval between barriers. `generic` is 0 or says when ld, st
// or cp.async wrote it (clock << 9 | cp.async << 8 | warp): the asynchronous proxy may not see that. `generic_read` says
// likewise when ld read it last: the asynchronous proxy may write too early.
struct Shadow {
  u32 write_epoch, read_epoch;
  u32 readers;
  u8 writer;
  u8 set;
  u8 pad[2];
  u64 generic, generic_read;
};
// In the place of a shadow's writer.
constexpr u8 BY_TMA = 255;

struct Cta {
  Grid *grid;
  u32 id[3];
  vector<u8> shared;
  vector<Shadow> shadow;
  vector<Warp> warps;
  // The registers of all warps.
  vector<u8> files;
  std::map<u32, vector<int>> bars;
  std::map<u32, MBar> mbars;
  // TMA loads on their way.
  std::deque<Bulk> loads;
  // The interval between barriers.
  u32 epoch = 1;
  int live = 0;
  bool triggered = false;
  u64 clock = 1;
  vector<Store> stores;
  // For the race detector of global memory: a number of its own, and its time, which goes on at barriers and releases.
  u32 serial = 0, tick = 1, barrier_tick = 0;
  Known known;
};

struct alignas(128) Line {
  u8 bytes[128];
};
struct Grid {
  Kernel *kernel;
  u32 dim[3];
  u32 threads, shared;
  bool dependent;
  // The parameters, on 128 bytes.
  vector<Line> lines;
  u64 next = 0, total, done = 0, triggered = 0;
  Counters c;
  // By instruction.
  vector<Tally> tally;
  vector<u64> order;
  // Whether a CTA came up before the grid before was over.
  bool early = false;
  // Whether nothing was pending when it was launched.
  bool alone = false;
  int index;

  u8 *params() { return (u8 *)lines.data(); }
};

struct Options {
  int mode = LATE;
  // CTAs at once.
  int resident = 6;
  // Whether the race detector watches.
  int race = 1;
  // The most instructions of a warp's turn.
  int quantum = 64;
  int arch = 90, sms = 3;
  // Whether global stores wait for a release.
  int weak = 1;
  // Whether wgmma reads an A in registers as late as PTX allows.
  int registers = 0;
  // After how many turns whatever still runs is given up; 0: never.
  int turns = 0;
  u64 seed = 0;
};
extern Options options;
extern std::mt19937_64 rng;

// Note what is wrong (or, where the text begins with "note: ", of interest), and where a warp is.
void problem(const Warp *w, const string &what);

void problem(const string &what);

// Keep a launch's counters for `emu_launches`.
void report(Grid &grid);

void enqueue(Grid *grid);

void drain();
