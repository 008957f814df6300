// From text: cp.async, TMA, mbarriers, barriers, fences, dependent launches.
#include "build.h"

// cp.async.bulk: see tma.cpp.
static bool bulk(Instr &i, Statement &s) {
  if (s.has("commit_group")) return execute_by(i, bulk_commit, TMA);
  if (s.has("wait_group")) {
    i.a = s.args[0].imm;
    i.b = s.has("read");
    return execute_by(i, bulk_wait, TMA);
  }
  bool load = s.op.find(".mbarrier::complete_tx::bytes") != string::npos;
  if (!s.has("tensor") || (!load && !s.has("bulk_group"))) return false;
  if (s.op.find("multicast") != string::npos || s.op.find("im2col") != string::npos) return false;
  if (s.args.size() != (load ? 3u : 2u)) return false;
  Arg &map = s.args[load ? 1 : 0], &shared = s.args[load ? 0 : 1];
  memory_operand(i, shared);
  memory_operand(i, map, true);
  register_operands(i.v, map.v[0], s, 32);
  i.a = load;
  if (load) {
    Arg &barrier = s.args[2];
    if (barrier.kind != Arg::MEM || barrier.imm || barrier.reg == NONE) return false;
    i.o[0] = barrier.reg;
  }
  return execute_by(i, tma, TMA);
}

// cp.async: see cp_async.cpp.
static bool copy(Instr &i, Statement &s) {
  if (s.parts.size() < 3 || s.parts[1] != "async") return false;
  if (s.parts[2] == "bulk") return bulk(i, s);
  if (s.has("commit_group")) return execute_by(i, copy_commit, CPASYNC);
  if (s.has("wait_group")) {
    i.a = s.args[0].imm;
    return execute_by(i, copy_wait, CPASYNC);
  }
  if (s.has("wait_all")) {
    i.a = -1;
    return execute_by(i, copy_wait, CPASYNC);
  }
  if (!s.has("ca") && !s.has("cg")) return false;
  memory_operand(i, s.args[0]);
  memory_operand(i, s.args[1], true);
  i.a = s.args[2].imm;
  if (s.args.size() > 3) i.o[0] = s.reg(3, 32);
  return s.args.size() <= 4 && i.base != NONE && i.base2 != NONE && execute_by(i, copy_async, CPASYNC);
}

// mbarrier: see barriers.cpp.
static bool memory_barrier(Instr &i, Statement &s) {
  if (s.has("init")) {
    memory_operand(i, s.args[0]);
    i.o[0] = s.reg(1, 32);
    return execute_by(i, mbar_init, SYNC);
  }
  if (s.has("inval")) {
    memory_operand(i, s.args[0]);
    return execute_by(i, mbar_inval, SYNC);
  }
  if (s.has("arrive")) {
    memory_operand(i, s.args[1]);
    i.a = s.has("expect_tx");
    if (i.a)
      i.o[0] = s.reg(2, 32);
    else if (s.args.size() > 2)
      return false;
    return execute_by(i, mbar_arrive, SYNC);
  }
  if (s.has("expect_tx")) {
    memory_operand(i, s.args[0]);
    i.a = 2;
    i.o[0] = s.reg(1, 32);
    return execute_by(i, mbar_arrive, SYNC);
  }
  if ((s.has("try_wait") || s.has("test_wait")) && s.has("parity")) {
    i.o[0] = s.reg(0, 1);
    memory_operand(i, s.args[1]);
    i.o[1] = s.reg(2, 32);
    return execute_by(i, mbar_wait, SYNC);
  }
  return false;
}

// bar: see barriers.cpp. Of a warp's own barrier nothing is modelled.
static bool barrier(Instr &i, Statement &s) {
  if (s.has("warp")) return execute_by(i, nothing, SYNC);
  if (!s.has("sync")) return false;
  for (auto &a : s.args)
    if (a.kind != Arg::IMM) return false;
  i.a = s.args.at(0).imm;
  i.b = s.args.size() > 1 ? s.args[1].imm : 0;
  return execute_by(i, bar_sync, SYNC);
}

bool build_async(Instr &i, Statement &s) {
  const string &op = s.parts[0];
  if (op == "cp") return copy(i, s);
  if (op == "mbarrier") return memory_barrier(i, s);
  if (op == "bar" || op == "barrier") return barrier(i, s);
  if (op == "fence" || op == "membar") {
    Fn of_proxies = s.has("async") ? fence_proxy : nothing;
    return execute_by(i, s.has("proxy") ? of_proxies : fence_global, SYNC);
  }
  if (op == "griddepcontrol") return execute_by(i, s.has("wait") ? grid_wait : grid_launch, SYNC);
  if (op == "nanosleep" || op == "prefetch" || op == "setmaxnreg") return execute_by(i, nothing, OTHER);
  return false;
}
