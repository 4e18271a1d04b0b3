// See harness.h.
#include "harness.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

static void* library = nullptr;

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void* symbol(const std::string& name) {
  void* p = dlsym(library, name.c_str());
  if (!p) {
    printf("there is no %s in the kernels\n", name.c_str());
    exit(2);
  }
  return p;
}

void watch(const void* p, size_t bytes) { function<void(const void*, u64)>("sim_track")(p, bytes); }

std::string launch(const char* kernel, const sim::Launch& l, std::vector<void*> args) {
  auto entry = function<int(const sim::Launch*, void**)>((std::string(kernel) + "_sim").c_str());
  return entry(&l, args.data()) ? function<const char*()>("sim_last_error")() : "";
}

Map tensor_map(Buffer<u16>& matrix, u64 rows, u64 cols, u32 box_rows, u32 box_cols, u32 swizzle) {
  Map m;
  if (function<decltype(sim_tensor_map)>("sim_tensor_map")(m.bytes, matrix.pointer, 2, rows, cols, cols * 2, box_rows, box_cols,
                                                           swizzle)) {
    printf("tensor map: %s\n", function<const char*()>("sim_last_error")());
    exit(2);
  }
  return m;
}

float random_number() {
  static u32 state = 12345;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 8)) / 8388608.0f - 1;
}
std::vector<float> random_numbers(size_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = random_number();
  return v;
}
std::vector<u16> random_bf16(size_t n) {
  std::vector<u16> v(n);
  for (u16& x : v) x = to_bf16(random_number());
  return v;
}
u32 bits_of(float x) {
  u32 u;
  memcpy(&u, &x, 4);
  return u;
}
float from_bf16(u16 bits) {
  const u32 u = static_cast<u32>(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
u16 to_bf16(float x) {
  if (x != x) return 0x7FFF;
  const u16 below = static_cast<u16>(bits_of(x) >> 16);
  if (std::isinf(x) || from_bf16(below) == x) return below;
  const u16 above = static_cast<u16>(below + 1);
  // The neighbour beyond the largest number stands where the next power of two would.
  const double up = std::isinf(from_bf16(above)) ? std::copysign(std::ldexp(1.0, 128), x) : from_bf16(above);
  const double to_below = std::fabs(static_cast<double>(x) - from_bf16(below)), to_above = std::fabs(up - x);
  return to_below < to_above || (to_below == to_above && below % 2 == 0) ? below : above;
}

std::string near(const char* what, size_t n, const std::function<double(size_t)>& got, const std::function<double(size_t)>& want,
                 double tolerance) {
  for (size_t i = 0; i < n; i++)
    if (!(std::fabs(got(i) - want(i)) <= tolerance))
      return std::string("wrong: ") + what + "[" + std::to_string(i) + "] is " + std::to_string(got(i)) + ", want " +
             std::to_string(want(i));
  return "";
}

constexpr u32 SEEDS = 8;

static std::string run(const Case& c, u32 seed, int bug) {
  function<void()>("sim_untrack_all")();
  return c.run(seed, bug);
}

// What the case prints and returns in a process of its own, which AddressSanitizer may end.
static std::string run_apart(const Case& c, u32 seed, int bug) {
  int ends[2];
  if (pipe(ends)) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    function<void(unsigned)>("sim_set_threads")(1);
    const std::string said = run(c, seed, bug);
    if (write(ends[1], said.data(), said.size()) < 0) _exit(1);
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) said.append(part, static_cast<size_t>(n));
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return said;
}

int main(int argc, char** argv) {
  const std::string word = argc > 1 ? argv[1] : "";
  const Kind kind = word == "asan" ? ASAN : word == "race" ? RACE : PLAIN;
  library = argc > 2 ? dlopen(argv[2], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library) {
    printf("usage: check plain|asan|race KERNELS.so: %s\n", argc > 2 ? dlerror() : "no kernels");
    return 2;
  }
  int failures = 0, lines = 0;
  auto line = [&](bool fine, const Case& c, const std::string& what, const std::string& why) {
    lines++;
    failures += !fine;
    printf("%s %-5s %s: %s%s%s\n", fine ? "ok  " : "FAIL", word.c_str(), c.name, what.c_str(), why.empty() ? "" : ": ",
           why.substr(0, 300).c_str());
    fflush(stdout);
  };
  for (const Case& c : cases()) {
    std::string wrong;
    for (u32 seed = 0; seed < SEEDS && wrong.empty(); seed++) {
      wrong = run(c, seed, 0);
      if (!wrong.empty()) wrong = "seed " + std::to_string(seed) + ": " + wrong;
    }
    line(wrong.empty(), c, "holds", wrong);
    for (const Mistake& m : c.mistakes) {
      if (m.found_by != kind) continue;
      std::string said, last;
      for (u32 seed = 0; seed < SEEDS && said.empty(); seed++) {
        last = kind == ASAN ? run_apart(c, seed, m.bug) : run(c, seed, m.bug);
        if (last.find(m.message) != std::string::npos) said = last;
      }
      line(!said.empty(), c, "mistake " + std::to_string(m.bug) + (said.empty() ? " is not found" : " is found"),
           said.empty() ? last : m.message);
    }
  }
  printf("%s: %d of %d cases failed\n", word.c_str(), failures, lines);
  return failures ? 1 : 0;
}
