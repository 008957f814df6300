// Where lanes that diverge meet again.
#include "program.h"

// Where the two ways of each conditional branch meet for sure: the branch's nearest post-dominator.
void joins(vector<Instr> &code) {
  // One past the last stands for the exit.
  int n = code.size(), end = n;
  auto successors = [&](int i, int out[2]) {
    const Instr &c = code[i];
    int count = 0;
    bool branch = c.cls == BRANCH;
    if (!branch || c.pred != NONE) out[count++] = i + 1;
    if (branch && c.a == 1) out[count++] = c.target;
    if (branch && c.a == 2) out[count++] = end;
    return count;
  };
  vector<int> up(n + 1, -1);
  up[end] = end;
  // Successors before those that lead to them, but for loops
  vector<int> order, place(n + 1, -1), state(n, 0), stack;
  stack.push_back(0);
  while (stack.size()) {
    int i = stack.back();
    if (state[i] == 0) {
      state[i] = 1;
      int s[2], count = successors(i, s);
      for (int k = 0; k < count; k++)
        if (s[k] != end && state[s[k]] == 0) stack.push_back(s[k]);
    } else {
      stack.pop_back();
      if (state[i] == 1) {
        state[i] = 2;
        place[i] = order.size();
        order.push_back(i);
      }
    }
  }
  place[end] = -1;
  auto nearest = [&](int a, int b) {
    while (a != b) {
      if (place[a] > place[b])
        a = up[a];
      else
        b = up[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (int i : order) {
      int s[2], count = successors(i, s), now = -1;
      for (int k = 0; k < count; k++)
        if (up[s[k]] != -1 || s[k] == end) now = now == -1 ? s[k] : nearest(now, s[k]);
      if (now != -1 && up[i] != now) up[i] = now, changed = true;
    }
  }
  for (int i = 0; i < n; i++) {
    if (code[i].cls != BRANCH || code[i].pred == NONE) continue;
    code[i].b = up[i] < 0 || up[i] == end ? -1 : up[i];
  }
}
