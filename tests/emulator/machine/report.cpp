// What a run leaves: problems, each with its place and how often, and a line of JSON with each launch's counters.
#include <algorithm>
#include <map>

#include "machine.h"

static std::map<string, int> problems;

// A line of JSON a launch.
static vector<string> finished;

void problem(const string &what) {
  problems[what]++;
}

void problem(const Warp *w, const string &what) {
  if (!w) return problem(what);
  const Kernel &k = *w->cta->grid->kernel;
  const Instr &i = k.code[std::min<size_t>(w->pc, k.code.size() - 1)];
  problem(k.name + " " + i.loc + " (ptx " + std::to_string(i.line) + ": " + i.text.substr(0, 90) + "): " + what);
}

static const char *const class_names[] = {"alu", "float", "convert", "move",     "pred",     "branch",  "ldg",
                                          "stg", "lds",   "sts",     "ldmatrix", "stmatrix", "cpasync", "tma",
                                          "mma", "wgmma", "sync",    "shfl",     "atom",     "other"};

void report(Grid &g) {
  Counters &c = g.c;
  string s = "{\"kernel\": \"" + g.kernel->name + "\", \"ctas\": " + std::to_string(g.total) +
             ", \"threads\": " + std::to_string(g.threads) + ", \"shared\": " + std::to_string(g.shared);
  auto add = [&](const char *n, u64 v) {
    s += string(", \"") + n + "\": " + std::to_string(v);
  };
  add("dependent", g.dependent);
  add("overlapped", g.early);
  add("instructions", c.instructions);
  for (int k = 0; k < CLASSES; k++)
    if (c.n[k]) add(class_names[k], c.n[k]);
  add("mma_flops", c.mma_flops);
  add("bytes_read", c.gread);
  add("bytes_written", c.gwrite);
  add("tma_read", c.tma_read);
  add("tma_written", c.tma_write);
  add("requests_ldg", c.greq_ld);
  add("sectors_ldg", c.gsectors_ld);
  add("requests_stg", c.greq_st);
  add("sectors_stg", c.gsectors_st);
  add("sectors_cp", c.gsectors_cp);
  add("waves_lds", c.wave_ld);
  add("ideal_lds", c.ideal_ld);
  add("waves_sts", c.wave_st);
  add("ideal_sts", c.ideal_st);
  add("waves_ldmatrix", c.wave_ldm);
  add("ideal_ldmatrix", c.ideal_ldm);
  add("waves_stmatrix", c.wave_stm);
  add("ideal_stmatrix", c.ideal_stm);
  add("waves_cp", c.wave_cp);
  add("ideal_cp", c.ideal_cp);
  add("divergent", c.divergent);
  finished.push_back(s + "}");
}

static string joined;

extern "C" {
// A line a problem: how often, and what. They are forgotten then.
const char *emu_problems() {
  joined.clear();
  for (auto &p : problems) joined += std::to_string(p.second) + " x " + p.first + "\n";
  problems.clear();
  return joined.c_str();
}
// A line of JSON a launch; likewise.
const char *emu_launches() {
  joined.clear();
  for (auto &s : finished) joined += s + "\n";
  finished.clear();
  return joined.c_str();
}
}
