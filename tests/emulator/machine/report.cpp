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

// By class of instruction and line of Python, what the instructions of both did: "lds wgrad.py:158:20": [passes, fewest,
// requests, sectors].
static string by_line(const Grid &g) {
  std::map<string, Tally> lines;
  for (size_t n = 0; n < g.tally.size(); n++) {
    const Tally &t = g.tally[n];
    if (!t.passes && !t.requests) continue;
    const Instr &i = g.kernel->code[n];
    Tally &sum = lines[string(class_names[i.cls]) + " " + i.loc];
    sum.passes += t.passes, sum.fewest += t.fewest, sum.requests += t.requests, sum.sectors += t.sectors;
  }
  string s;
  for (auto &[place, t] : lines) {
    s += (s.empty() ? "\"" : ", \"") + place + "\": [";
    for (u64 v : {t.passes, t.fewest, t.requests}) s += std::to_string(v) + ", ";
    s += std::to_string(t.sectors) + "]";
  }
  return s;
}

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
  add("requests_cp", c.greq_cp);
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
  s += ", \"lines\": {" + by_line(g) + "}";
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
