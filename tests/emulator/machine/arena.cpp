// PyTorch's CPU allocator for the test's process: an arena with a flag for every byte that is somebody's, NaN in what
// is new, and memory that is given out again as a caching allocator does: at once, in the order of the stream. While
// launches are pending nobody may touch it: whoever does waits for them first, as the stream has it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <signal.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

static const size_t SIZE = 16ull << 30, ROUND = 512;

static char *base, *shadow;

static size_t top = ROUND;

// By size; whether launches were pending when it was freed.
static std::unordered_map<size_t, std::vector<std::pair<size_t, bool>>> idle;

static std::unordered_map<size_t, size_t> sizes;

static std::mutex mutex;

static int (*pending)();

// Up to which launch a tensor that is freed is in use; the most of those freed so far; likewise by ROUND of memory what
// was the most when it was handed out. A caching allocator may cut whatever is free, so any of these may be there.
static unsigned (*freed)(char *, size_t);
static unsigned newest, *since;

static void (*drain)();

static bool closed;

static void protect(bool on) {
  if (closed != on) mprotect(base, (top + 0xfff) & ~0xfffull, on ? PROT_NONE : PROT_READ | PROT_WRITE);
  closed = on;
}

static void touched(int, siginfo_t *info, void *) {
  char *at = (char *)info->si_addr;
  if (closed && at >= base && at < base + SIZE) {
    protect(false);
    drain();
    return;
  }
  signal(SIGSEGV, SIG_DFL);
}

static void release(void *p) {
  if (!p) return;
  std::lock_guard<std::mutex> lock(mutex);
  size_t off = (char *)p - base, n = sizes[off], room = (n + ROUND) / ROUND * ROUND;
  bool busy = pending && pending();
  // Else the launches before may still touch it.
  if (!busy) memset(shadow + off, 0, n);
  if (busy) newest = std::max(newest, freed((char *)p, n));
  idle[room].push_back({off, busy});
  sizes.erase(off);
}
struct Arena final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    std::lock_guard<std::mutex> lock(mutex);
    // At least a byte beside it is nobody's.
    size_t room = (n + ROUND) / ROUND * ROUND, off;
    bool busy = false;
    auto &list = idle[room];
    if (list.size()) {
      off = list.back().first;
      busy = list.back().second && pending && pending();
      list.pop_back();
    } else {
      off = top;
      top += room;
      if (top > SIZE) abort();
    }
    if (!busy) {
      size_t page = off & ~0xfffull, span = ((off + room + 0xfff) & ~0xfffull) - page;
      if (closed) mprotect(base + page, span, PROT_READ | PROT_WRITE);
      memset(shadow + off, 0, room);
      memset(base + off, 0xff, room);
      if (closed) mprotect(base + page, span, PROT_NONE);
    }
    memset(shadow + off, 1, n);
    std::fill_n(since + off / ROUND, room / ROUND, newest);
    sizes[off] = n;
    return {base + off, base + off, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, std::size_t n) const override { memcpy(to, from, n); }
};
extern "C" {

void arena_protect(int on) {
  protect(on);
}

void arena_install(int (*is_pending)(), void (*run)(), unsigned (*is_freed)(char *, size_t)) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  base = (char *)mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
  shadow = (char *)mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
  since = (unsigned *)mmap(nullptr, SIZE / ROUND * sizeof *since, PROT_READ | PROT_WRITE, flags, -1, 0);
  pending = is_pending;
  drain = run;
  freed = is_freed;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = touched;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  static Arena arena;
  c10::SetCPUAllocator(&arena, 100);
}

void *arena_at() {
  return base;
}

void *arena_flags() {
  return shadow;
}
void *arena_since() {
  return since;
}
size_t arena_bytes() {
  return SIZE;
}
size_t arena_top() {
  return top;
}
}
