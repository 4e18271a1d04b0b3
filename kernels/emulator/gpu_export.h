// GPU_EXPORT(k): `int k_sim(const sim::Launch*, void** args)` for a kernel `k`, with args as cuLaunchKernel takes them,
// and its name in the list.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "sim.h"

namespace sim {
template <class T> GPU_QUIET inline T argument(const void* p) {  // wherever the caller keeps it, aligned or not
  std::remove_cv_t<T> value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <auto KERNEL> struct Entry;
template <class... A, void (*KERNEL)(A...)> struct Entry<KERNEL> {
  template <size_t... I> static void call(void** args, std::index_sequence<I...>) { KERNEL(argument<A>(args[I])...); }
  static void run(void** args) { call(args, std::index_sequence_for<A...>{}); }
};
}  // namespace sim
#define GPU_EXPORT(k)                                                                            \
  extern "C" int k##_sim(const ::sim::Launch* launch, void** args) {                             \
    return ::sim::launch(*launch, ::sim::Entry<k>::run, args, reinterpret_cast<const void*>(k)); \
  }                                                                                              \
  static const ::sim::Registration k##_registration(#k);
