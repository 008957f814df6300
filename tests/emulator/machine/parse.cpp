// From the text of a PTX module to instructions that a warp can execute.
#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "build.h"

struct Name {
  u32 off;
  u8 width;
};
struct Parser {
  Kernel *k;
  // Registers by name, of each block that is open; `%r<100>` gives a prefix.
  vector<std::map<string, Name>> scopes;
  std::map<string, u8> prefixes;
  // Labels of each open block, where they are, and the branches that go to them.
  vector<std::map<string, string>> labels;
  std::map<string, u32> at;
  vector<std::pair<size_t, string>> jumps;
  int blocks = 0;
  u32 top = 0;
  std::map<std::pair<u64, int>, u32> constants;
  std::map<string, u32> params;

  // A new register.
  u32 slot(u8 width) {
    u32 off = top;
    top += width == 64 ? 256 : width == 16 ? 64 : 128;
    return off;
  }
  // A register that holds a value, or a special one, when a warp starts.
  u32 constant(u64 value, u8 width, int special = 0) {
    auto key = std::make_pair(value ^ (u64)special << 56, width + (special ? 1000 + special : 0));
    auto it = constants.find(key);
    if (it != constants.end()) return it->second;
    u32 off = slot(width);
    k->consts.push_back({off, width, value, special});
    return constants[key] = off;
  }
  Name *find(const string &n) {
    for (size_t i = scopes.size(); i--;) {
      auto it = scopes[i].find(n);
      if (it != scopes[i].end()) return &it->second;
    }
    size_t e = n.size();
    while (e && isdigit(n[e - 1])) e--;
    auto it = prefixes.find(n.substr(0, e));
    if (it == prefixes.end() || e == n.size()) return nullptr;
    return &(scopes[0][n] = {slot(it->second), it->second});
  }
};

u32 temporary(Parser *p, u8 width) {
  return p->slot(width);
}

u32 Statement::reg(size_t i, u8 width) {
  Arg &a = args.at(i);
  if (a.kind == Arg::REG) return a.reg;
  if (a.kind == Arg::SINK) return temporary(parser, width);
  if (a.kind == Arg::IMM)
    return parser->constant(width == 1 ? (a.imm ? 0xffffffffu : 0) : a.imm, width == 1 ? 32 : width);
  throw std::runtime_error("an operand that is no register");
}

static string trim(const string &s) {
  size_t b = s.find_first_not_of(" \t\r\n"), e = s.find_last_not_of(" \t\r\n");
  return b == string::npos ? "" : s.substr(b, e - b + 1);
}

// At commas outside of brackets.
static vector<string> split_args(const string &s) {
  vector<string> out;
  int depth = 0;
  string cur;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == ',' && !depth)
      out.push_back(trim(cur)), cur.clear();
    else
      cur += c;
  }
  if (trim(cur).size()) out.push_back(trim(cur));
  return out;
}

// Numbers as `make_cta` has them; 9 is zero.
static const std::map<string, int> SPECIALS = {
    {"%tid.x", 1},   {"%tid.y", 9},   {"%tid.z", 9},           {"%ntid.x", 2},     {"%ctaid.x", 3},
    {"%ctaid.y", 4}, {"%ctaid.z", 5}, {"%nctaid.x", 6},        {"%nctaid.y", 7},   {"%nctaid.z", 8},
    {"%laneid", 10}, {"%warpid", 11}, {"%cluster_ctarank", 9}, {"%clusterid.x", 3}};

static Arg parse_arg(Parser &p, const string &text) {
  Arg a;
  string t = trim(text);
  if (t == "_") {
    a.kind = Arg::SINK;
    return a;
  }
  if (t[0] == '{') {
    a.kind = Arg::VEC;
    for (auto &e : split_args(t.substr(1, t.rfind('}') - 1))) a.v.push_back(parse_arg(p, e));
    return a;
  }
  if (t[0] == '[') {
    auto inner = split_args(t.substr(1, t.rfind(']') - 1));
    string addr = inner[0];
    s64 off = 0;
    size_t plus = addr.find('+');
    if (plus != string::npos)
      off = strtoll(trim(addr.substr(plus + 1)).c_str(), nullptr, 0), addr = trim(addr.substr(0, plus));
    Arg base = parse_arg(p, addr);
    a = base;
    a.kind = Arg::MEM;
    if (base.kind == Arg::IMM)
      a.reg = NONE, a.imm = base.imm + off;
    else
      a.imm = off;
    for (size_t i = 1; i < inner.size(); i++) a.v.push_back(parse_arg(p, inner[i]));
    return a;
  }
  auto special = SPECIALS.find(t);
  if (special != SPECIALS.end()) {
    a.reg = p.constant(0, 32, special->second);
    a.width = 32;
    return a;
  }
  if (t[0] == '%' || isalpha(t[0]) || t[0] == '_' || t[0] == '$') {
    if (Name *n = p.find(t)) {
      a.reg = n->off;
      a.width = n->width;
      return a;
    }
    if (t == "global_smem") {
      a.kind = Arg::IMM;
      a.imm = SHARED_BASE;
      return a;
    }
    auto param = p.params.find(t);
    if (param != p.params.end()) {
      a.kind = Arg::IMM;
      a.imm = param->second;
      a.param = true;
      return a;
    }
    a.kind = Arg::LABEL;
    a.label = t;
    return a;
  }
  a.kind = Arg::IMM;
  if (t[0] == '0' && (t[1] == 'f' || t[1] == 'F')) {
    a.imm = strtoull(t.c_str() + 2, nullptr, 16);
    a.is_float = true;
  } else if (t[0] == '0' && (t[1] == 'd' || t[1] == 'D')) {
    a.imm = strtoull(t.c_str() + 2, nullptr, 16);
    a.is_float = true;
  } else
    a.imm = t[0] == '-' ? strtoll(t.c_str(), nullptr, 0) : (s64)strtoull(t.c_str(), nullptr, 0);
  return a;
}

// `.reg .b32 %r<100>;` or `.reg .pred complete;`.
static void declare(Parser &p, const string &s) {
  if (s.compare(0, 4, ".reg") != 0) throw std::runtime_error("directive " + s);
  string rest = trim(s.substr(s.find_first_of(" \t")));
  size_t e = rest.find_first_of(" \t");
  string type = rest.substr(1, e - 1);
  u8 width = type == "pred" ? 1 : (u8)atoi(type.c_str() + 1);
  for (auto &n : split_args(rest.substr(e))) {
    size_t less = n.find('<');
    if (less != string::npos)
      p.prefixes[n.substr(0, less)] = width;
    else
      p.scopes.back()[n] = {p.slot(width), width};
  }
}

// Labels of an inner block are its own.
static string label_of(Parser &p, const string &name) {
  for (size_t d = p.labels.size(); d--;) {
    auto it = p.labels[d].find(name);
    if (it != p.labels[d].end()) return it->second;
  }
  return name;
}

// The registers that an instruction writes, for wgmma.fence.
static void note_writes(Instr &i) {
  if (i.cls == LDG || i.cls == LDS || i.cls == LDM || (i.cls == MOVE && i.c))
    i.writes = i.v;
  else if (i.cls == MMA)
    i.writes.assign(i.v.begin(), i.v.begin() + 4);
  else if ((i.cls < BRANCH || i.cls == SHFL || i.cls == OTHER || i.cls == ATOM) && i.o[0] != NONE)
    i.writes.push_back(i.o[0]);
}

static void branch(Warp &, const Instr &) {}

static void statement(Parser &p, string s, int line, const string &loc) {
  s = trim(s);
  if (s.empty() || s.compare(0, 7, ".pragma") == 0) return;
  if (s[0] == '.') {
    declare(p, s);
    return;
  }
  Instr i;
  i.text = s;
  i.line = line;
  i.loc = loc;
  if (s[0] == '@') {
    size_t e = s.find_first_of(" \t");
    string g = s.substr(1, e - 1);
    if (g[0] == '!') i.negated = true, g = g.substr(1);
    Name *n = p.find(g);
    if (!n) throw std::runtime_error("predicate " + g);
    i.pred = n->off;
    s = trim(s.substr(e));
  }
  Statement st;
  st.parser = &p;
  size_t e = s.find_first_of(" \t");
  st.op = s.substr(0, e);
  for (size_t b = 0;;) {
    size_t d = st.op.find('.', b);
    st.parts.push_back(st.op.substr(b, d - b));
    if (d == string::npos) break;
    b = d + 1;
  }
  string rest = e == string::npos ? "" : s.substr(e);
  if (st.parts[0] == "bra") {
    i.fn = branch;
    i.cls = BRANCH;
    i.a = 1;
    p.jumps.push_back({p.k->code.size(), label_of(p, trim(rest))});
    p.k->code.push_back(i);
    return;
  }
  for (auto &t : split_args(rest)) {
    size_t bar = t.find('|');
    if (bar != string::npos && t[0] != '[') {
      st.args.push_back(parse_arg(p, t.substr(0, bar)));
      st.args.push_back(parse_arg(p, t.substr(bar + 1)));
    } else
      st.args.push_back(parse_arg(p, t));
  }
  if (!build_alu(i, st) && !build_memory(i, st) && !build_async(i, st)) throw std::runtime_error("no such instruction");
  note_writes(i);
  p.k->code.push_back(i);
}

// `.param .u64 .ptr .global .align 1 name`, or `.param .align 64 .b8 name[128]`.
static void parameter(Parser &p, const string &declaration) {
  vector<string> words;
  string cur;
  for (char c : declaration + " ")
    if (isspace(c)) {
      if (cur.size()) words.push_back(cur);
      cur.clear();
    } else
      cur += c;
  u32 size = 0, align = 0;
  string name = words.back();
  for (size_t i = 0; i < words.size(); i++) {
    if (words[i] == ".align" && !align && size == 0) align = atoi(words[i + 1].c_str());
    if (words[i][0] == '.' && strchr("usbf", words[i][1]) && isdigit(words[i][2]))
      size = atoi(words[i].c_str() + 2) / 8;
  }
  size_t bracket = name.find('[');
  if (bracket != string::npos) {
    size *= atoi(name.c_str() + bracket + 1);
    name = name.substr(0, bracket);
  } else
    align = size;
  Kernel *k = p.k;
  k->param_bytes = (k->param_bytes + align - 1) / align * align;
  k->params.push_back({name, k->param_bytes, size});
  p.params[name] = k->param_bytes;
  k->param_bytes += size;
}

Kernel *parse(const char *text) {
  auto *k = new Kernel;
  Parser p;
  p.k = k;
  string src = text;
  k->source = src;
  size_t e = src.find(".entry"), open = src.find('(', e), close = src.find("\n)", open), body = src.find("\n{", close);
  if (e == string::npos) throw std::runtime_error("no kernel");
  k->name = trim(src.substr(e + 6, open - e - 6));
  for (auto &declaration : split_args(src.substr(open + 1, close - open - 1))) parameter(p, declaration);
  size_t req = src.find(".reqntid", close);
  k->threads = req == string::npos ? 0 : atoi(src.c_str() + req + 8);
  p.scopes.emplace_back();
  p.labels.emplace_back();
  string cur, loc;
  int depth = 0, line = 1, begun = 0;
  for (size_t i = 0; i < body; i++) line += src[i] == '\n';
  for (size_t i = body + 1; i < src.size();) {
    // Line by line: comments go, `.loc` is kept.
    size_t end = src.find('\n', i);
    string l = src.substr(i, end - i);
    i = end == string::npos ? src.size() : end + 1;
    line++;
    size_t comment = l.find("//");
    string note = comment == string::npos ? "" : trim(l.substr(comment + 2));
    if (comment != string::npos) l = l.substr(0, comment);
    if (trim(l).compare(0, 4, ".loc") == 0) {
      loc = note;
      continue;
    }
    for (char c : l) {
      string t = trim(cur);
      if (c == '{' && t.empty()) {
        depth++;
        p.scopes.emplace_back();
        p.labels.emplace_back();
        continue;
      }
      if (c == '}' && t.empty()) {
        depth--;
        p.scopes.pop_back();
        p.labels.pop_back();
        cur.clear();
        if (!depth) goto end;
        continue;
      }
      if (c == ';') {
        try {
          statement(p, cur, begun ? begun : line, loc);
        } catch (std::exception &ex) {
          throw std::runtime_error(string(ex.what()) + ": " + t + " (line " + std::to_string(line) + ")");
        }
        cur.clear();
        begun = 0;
        continue;
      }
      if (t.empty() && !isspace(c)) begun = line;
      cur += c;
    }
    // A label ends its line.
    string t = trim(cur);
    if (t.size() > 1 && t.back() == ':' && t.find_first_of(" \t") == string::npos) {
      t.pop_back();
      string unique = depth > 1 ? t + "#" + std::to_string(p.blocks++) : t;
      p.labels.back()[t] = unique;
      p.at[unique] = k->code.size();
      cur.clear();
    } else if (cur.size())
      cur += ' ';
  }
end:
  for (auto &j : p.jumps) {
    auto it = p.at.find(j.second);
    if (it == p.at.end()) throw std::runtime_error("no label " + j.second);
    k->code[j.first].target = it->second;
  }
  Instr stop;
  stop.text = "end";
  stop.a = 2;
  stop.cls = BRANCH;
  stop.fn = branch;
  k->code.push_back(stop);
  joins(k->code);
  k->file = p.top;
  for (auto &c : k->code) k->wgmma |= c.cls == WGMMA;
  return k;
}
