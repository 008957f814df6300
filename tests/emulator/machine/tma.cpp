// TMA (cp.async.bulk.tensor): loads that complete on an mbarrier, stores in groups. Swizzled by the bits of addresses,
// zeros beyond the tensor.
#include "build.h"
#include "memory.h"

#include <algorithm>

std::deque<TensorMap> tensor_maps;

// Each 16 bytes of a row: shared address, global address or 0, bytes of them inside.
template <class F>
static void tiles(const Bulk &b, F f) {
  const TensorMap &t = *b.map;
  int spans[] = {0, 32, 64, 128};
  u32 row_bytes = t.box[0] * t.elem, rows = 1;
  for (u32 d = 1; d < t.rank; d++) rows *= t.box[d];
  for (u32 r = 0; r < rows; r++) {
    u64 at = t.base;
    bool in = true;
    u32 rest = r;
    for (u32 d = 1; d < t.rank; d++) {
      s64 x = b.at[d] + rest % t.box[d];
      rest /= t.box[d];
      in &= x >= 0 && x < (s64)t.dims[d];
      at += x * t.strides[d - 1];
    }
    for (u32 o = 0; o < row_bytes; o += 16) {
      s64 x = b.at[0] + o / t.elem, left = ((s64)t.dims[0] - x) * t.elem;
      u32 n = !in || x < 0 || left <= 0 ? 0 : std::min<s64>(16, left);
      if (in && x < 0 && x > -(s64)(16 / t.elem)) problem("a TMA coordinate below 0 inside of 16 bytes");
      f(swizzled(b.shared + r * row_bytes + o, spans[t.swizzle]), at + x * t.elem, n);
    }
  }
}

static u32 box_bytes(const TensorMap &t) {
  u32 n = t.elem;
  for (u32 d = 0; d < t.rank; d++) n *= t.box[d];
  return n;
}

void load_run(Cta &c, const Bulk &b) {
  Warp &w = c.warps[0];
  u64 read = 0;
  tiles(b, [&](u32 to, u64 from, u32 n) {
    if (to < SHARED_BASE || to + 16 > SHARED_BASE + c.shared.size()) {
      problem("TMA writes outside of shared memory in " + c.grid->kernel->name);
      return;
    }
    if (n && !inside(&w, from, n, "TMA reads")) n = 0;
    u8 *p = at_shared(w, to);
    if (n) memcpy(p, (void *)from, n);
    memset(p + n, b.map->nan ? 255 : 0, 16 - n);
    arrived(c, to, 16);
    read += n;
  });
  c.grid->c.tma_read += read;
  auto it = c.mbars.find(b.bar);
  if (it == c.mbars.end()) {
    problem("TMA completes on what is no mbarrier in " + c.grid->kernel->name);
    return;
  }
  it->second.tx -= box_bytes(*b.map);
  try_complete(it->second);
}

static void bulk_run(Warp &w, const Bulk &b) {
  u64 written = 0;
  tiles(b, [&](u32 from, u64 to, u32 n) {
    if (!in_shared(w, from, 16, "TMA reads")) return;
    touch(w, from, 16, false, false);
    if (n && inside(&w, to, n, "TMA writes")) memcpy((void *)to, at_shared(w, from), n), written += n;
  });
  w.cta->grid->c.tma_write += written;
}

// a: 1 loads, 0 stores; base: shared, base2: the map; o[0]: mbarrier; v: coordinates.
void tma(Warp &w, const Instr &i) {
  if (!w.m) return;
  int l = __builtin_ctz(w.m);
  Bulk b{};
  u64 map = R<u64>(w, i.base2)[l];
  if (w.m & (w.m - 1)) problem(&w, "TMA by more than one lane");
  u64 index = 0;
  memcpy(&index, (void *)(map + 16), 8);
  u64 magic;
  memcpy(&magic, (void *)map, 8);
  if (magic != TENSOR_MAP || index >= tensor_maps.size()) {
    problem(&w, "TMA by what is no tensor map");
    return;
  }
  if (map % 64) problem(&w, "a tensor map that is not on 64 bytes");
  b.map = &tensor_maps[index];
  b.shared = (i.base == NONE ? 0 : R<u32>(w, i.base)[l]) + i.off;
  if (i.v.size() != b.map->rank) problem(&w, "TMA of another rank than its map");
  for (size_t d = 0; d < i.v.size(); d++) b.at[d] = (s32)R<u32>(w, i.v[d])[l];
  if (b.shared % 128) problem(&w, "TMA of shared memory that is not on 128 bytes");
  u32 n = box_bytes(*b.map);
  if (!in_shared(w, b.shared, n, "TMA touches")) return;
  Cta &c = *w.cta;
  if (i.a) {
    b.bar = R<u32>(w, i.o[0])[l];
    tiles(b, [&](u32, u64 from, u32 n) {
      if (n) order_read(w, from, n);
    });
    // Nobody may be reading it still.
    for (u32 k = 0; k < n; k += 64) touch(w, b.shared + k, 64, true, false);
    if (options.mode == EARLY)
      load_run(c, b);
    else {
      memset(at_shared(w, b.shared), 0xff, n);
      c.loads.push_back(b);
    }
    return;
  }
  tiles(b, [&](u32, u64 to, u32 n) {
    if (n) order_write(w, to, n, BY_BULK);
  });
  if (options.mode == EARLY)
    bulk_run(w, b);
  else {
    // What it will read has to be there by now.
    tiles(b, [&](u32 from, u64, u32) { touch(w, from, 16, false, false); });
    w.bulks.push_back(b);
  }
}

void bulk_commit(Warp &w, const Instr &) {
  w.bulk_groups.push_back(std::move(w.bulks));
  w.bulks.clear();
}

void bulk_wait(Warp &w, const Instr &i) {
  while (w.bulk_groups.size() > (size_t)i.a) {
    for (auto &b : w.bulk_groups.front()) bulk_run(w, b);
    w.bulk_groups.pop_front();
  }
}

void leave(Warp &w) {
  bool left = w.bulks.size();
  for (auto &g : w.bulk_groups) left |= g.size() > 0;
  if (left) problem(&w, "a program ends while TMA still reads its shared memory");
  w.bulk_groups.push_back(std::move(w.bulks));
  bulk_wait(w, Instr{});
  left = w.products.size();
  for (auto &g : w.product_groups) left |= g.size() > 0;
  if (left) problem(&w, "a program ends before its wgmma");
  publish_to_cta(w);
}
