// A warp: how it starts, and how it goes on where its lanes diverge and meet again.
#include "engine.h"
#include "memory.h"

std::unique_ptr<Cta> make_cta(Grid &g) {
  auto c = std::make_unique<Cta>();
  c->grid = &g;
  u64 n = g.order[g.next++];
  c->id[0] = n % g.dim[0];
  c->id[1] = n / g.dim[0] % g.dim[1];
  c->id[2] = n / g.dim[0] / g.dim[1];
  c->shared.assign(g.shared, 0xff);
  c->shadow.assign(g.shared / 2 + 8, Shadow{});
  const Kernel &k = *g.kernel;
  u32 warps = (g.threads + 31) / 32;
  // Registers hold NaN before they hold anything.
  c->files.assign((u64)k.file * warps, 0xff);
  c->warps.resize(warps);
  c->live = warps;
  for (u32 id = 0; id < warps; id++) {
    Warp &w = c->warps[id];
    w.cta = c.get();
    w.id = id;
    w.r = c->files.data() + (u64)k.file * id;
    if (k.wgmma) w.written.assign(k.file / 64 + 1, 1);
    for (auto &q : k.consts)
      for (int l = 0; l < 32; l++) {
        u64 v = q.value;
        switch (q.special) {
          case 1: v = id * 32 + l; break;
          case 2: v = g.threads; break;
          case 3: v = c->id[0]; break;
          case 4: v = c->id[1]; break;
          case 5: v = c->id[2]; break;
          case 6: v = g.dim[0]; break;
          case 7: v = g.dim[1]; break;
          case 8: v = g.dim[2]; break;
          case 9: v = 0; break;
          case 10: v = l; break;
          case 11: v = id; break;
        }
        u8 *at = w.r + q.off;
        if (q.width == 64)
          ((u64 *)at)[l] = v;
        else if (q.width == 16)
          ((u16 *)at)[l] = v;
        else
          ((u32 *)at)[l] = v;
      }
  }
  return c;
}

// The next lanes that wait, where those that ran have come to the place where all meet, or have exited.
static bool turn(Warp &w) {
  while (w.others.size()) {
    Group g = w.others.back();
    w.others.pop_back();
    w.pc = g.pc;
    w.active = g.mask & ~w.gone;
    w.join = g.join;
    if (w.active) return true;
  }
  return w.active != 0;
}

void run(Warp &w, int quantum) {
  const Kernel &k = *w.cta->grid->kernel;
  Counters &c = w.cta->grid->c;
  const Instr *code = k.code.data();
  while (quantum-- > 0 && w.state == READY) {
    while (w.pc == w.join && w.others.size()) turn(w);
    const Instr &i = code[w.pc];
    u32 m = w.active;
    i.reached = true;
    c.instructions++;
    c.n[i.cls]++;
    if (i.pred != NONE) {
      const u32 *p = (const u32 *)(w.r + i.pred);
      u32 bits = 0;
      for (int l = 0; l < 32; l++) bits |= (p[l] & 1) << l;
      m &= i.negated ? ~bits : bits;
    }
    if (i.cls == BRANCH && i.a) {
      if (i.a == 2) {
        // The end.
        w.active &= ~m;
        w.gone |= m;
        if (w.active)
          w.pc++;
        else if (!turn(w)) {
          leave(w);
          order_left(w);
          w.state = DONE;
          w.cta->live--;
          trigger(*w.cta);
        }
      } else if (m == w.active)
        w.pc = i.target;
      else if (!m)
        w.pc++;
      else {
        // First those who go on, then those who jump, then all together.
        c.divergent++;
        if (i.b >= 0) w.others.push_back({(u32)i.b, w.active, w.join});
        w.others.push_back({i.target, m, i.b >= 0 ? (u32)i.b : w.join});
        w.active &= ~m;
        w.pc++;
        if (i.b >= 0) w.join = i.b;
      }
      continue;
    }
    if (m) {
      w.m = m;
      i.fn(w, i);
      if (k.wgmma)
        for (u32 r : i.writes) w.written[r / 64] = ++w.cta->clock;
    }
    w.pc++;
  }
}
