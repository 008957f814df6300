// What happened before what in global memory. Of two accesses to one place, one of them a write, by warps of different
// CTAs, of different launches, or of one CTA, one must happen before the other: by a barrier of the CTA, by atomics of
// which one releases and the other acquires, or because a launch is over before the other begins or goes on. Whoever
// breaks this reads what is not there yet, on some GPU on some day, whatever the order was here.
#pragma once
#include <map>
#include <set>

#include "program.h"

struct Grid;

// Of another CTA of the same launch: its accesses up to this tick, and those of some warps up to others.
struct Seen {
  u32 all = 0;
  std::map<int, u32> warps;
};
// What is known to have happened: launches that are over (all with lower numbers than `below`, and some), and what was
// acquired of other CTAs, by their serial numbers.
struct Known {
  int below = 0;
  std::set<int> over;
  std::map<u32, Seen> ctas;

  bool is_over(int grid) const { return grid < below || over.count(grid); }
  void join_grids(const Known &k);
  void join(const Known &k);
};
struct Warp;
struct Cta;

// A CTA comes up: it knows what each warp of the launch before knew when it let dependents in.
void order_start(Cta &c);

// A launch is enqueued. `alone`: the host has seen all before it end.
void order_enqueue(Grid &g, bool alone);

// A warp has waited for the launch before; has let dependents in; is over.
void order_waited(Warp &w);

void order_triggered(Warp &w);

void order_left(Warp &w);

// All warps of a CTA have met.
void order_barrier(Cta &c);

// All that was launched is over.
void order_forget();

void order_read(Warp &w, u64 at, u32 n);

enum How { PLAIN, BY_ATOMIC, BY_BULK };
void order_write(Warp &w, u64 at, u32 n, How how);

// An atomic operation at an address releases what its warp knows, or acquires what was released there.
void order_release(Warp &w, u64 at);

void order_acquire(Warp &w, u64 at);
