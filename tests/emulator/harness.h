// Runs cases against kernels that were compiled for the emulator: loading, launching, expecting.
//
// A case launches a kernel with a seed and a mistake, or with none (bug 0), and says what is wrong with the result:
// nothing, the emulator's message, or where the numbers differ. Without a mistake it must hold under all seeds; a
// mistake must be found under one of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "sim.h"

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum Kind { PLAIN, ASAN, RACE };

// What a mistake has to be called, and by which kind of build.
struct Mistake {
  int bug;
  Kind found_by;
  const char* message;
};
struct Case {
  const char* name;
  std::function<std::string(u32 seed, int bug)> run;
  std::vector<Mistake> mistakes;
};
std::vector<Case>& cases();
struct Add {
  Add(Case c) { cases().push_back(std::move(c)); }
};

// A function of the loaded kernels.
void* symbol(const std::string& name);
template <class F> F* function(const char* name) { return reinterpret_cast<F*>(symbol(name)); }

// Global memory for a launch: exactly as long as asked, poisoned, watched by the race detector.
void watch(const void* p, size_t bytes);
template <class T> struct Buffer {
  std::vector<T> data;
  T* pointer;
  explicit Buffer(size_t n) : data(n) {
    memset(static_cast<void*>(data.data()), 0xFF, n * sizeof(T));
    data.shrink_to_fit();
    pointer = data.data();
    watch(pointer, n * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) { std::copy(from.begin(), from.end(), data.begin()); }
  T& operator[](size_t i) { return data[i]; }
};
inline void* argument(int& x) { return &x; }
template <class T> void* argument(Buffer<T>& b) { return &b.pointer; }
struct Map {
  alignas(128) unsigned char bytes[128];
};
inline void* argument(Map& m) { return m.bytes; }

std::string launch(const char* kernel, const sim::Launch& l, std::vector<void*> args);
template <class... A>
std::string launch(const char* kernel, unsigned blocks, unsigned threads, unsigned shared, u32 seed, A&... args) {
  return launch(kernel, sim::Launch{{blocks, 1, 1}, {threads, 1, 1}, shared, seed}, {argument(args)...});
}
// A row-major matrix of bf16, moved in boxes. Fails the program where the map is refused.
Map tensor_map(Buffer<u16>& matrix, u64 rows, u64 cols, u32 box_rows, u32 box_cols, u32 swizzle);

// Numbers.
float random_number();  // uniform in [-1, 1)
std::vector<float> random_numbers(size_t n);
std::vector<u16> random_bf16(size_t n);
float from_bf16(u16 bits);
u16 to_bf16(float x);  // by comparing with both neighbours, unlike the kernels' way
u32 bits_of(float x);

// Says where `got` and `want` differ, or nothing. The bits must be the same; any NaN is like another.
template <class T>
std::string same(const char* what, size_t n, const std::function<T(size_t)>& got, const std::function<T(size_t)>& want) {
  for (size_t i = 0; i < n; i++) {
    const T g = got(i), w = want(i);
    if (memcmp(&g, &w, sizeof g) && !(g != g && w != w))
      return std::string("wrong: ") + what + "[" + std::to_string(i) + "] is " + std::to_string(g) + ", want " +
             std::to_string(w);
  }
  return "";
}
std::string near(const char* what, size_t n, const std::function<double(size_t)>& got, const std::function<double(size_t)>& want,
                 double tolerance);
