// Adjacent numbers that one instruction moves, and the shapes in which tensors are walked through by such packs.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrent_conv.h"
#include "cuda/device/convert.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// V numbers, aligned to their size: one load or store of up to 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// All numbers of a pack from and to the arithmetic's type; `bf16`: what uint16_t stands for, asked once per pack.
template <typename T, int V>
__device__ __forceinline__ Pack<Accumulator<T>, V> widen(const Pack<T, V>& pack, bool bf16) {
  Pack<Accumulator<T>, V> wide;
  if (bf16) {
#pragma unroll
    for (int v = 0; v < V; ++v) wide.v[v] = widen(pack.v[v], true);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) wide.v[v] = widen(pack.v[v], false);
  }
  return wide;
}
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> narrow(const Pack<Accumulator<T>, V>& wide, bool bf16) {
  Pack<T, V> pack;
  if (bf16) {
#pragma unroll
    for (int v = 0; v < V; ++v) pack.v[v] = narrow<T>(wide.v[v], true);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) pack.v[v] = narrow<T>(wide.v[v], false);
  }
  return pack;
}

// The same of a format known when compiling; 16-bit numbers two by two.
template <typename T, int V>
__device__ __forceinline__ Pack<Accumulator<T>, V> widen(const Pack<T, V>& pack) {
  Pack<Accumulator<T>, V> wide;
  if constexpr (sizeof(T) == 2) {
    static_assert(V % 2 == 0);
    uint32_t pairs[V / 2];
    memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      const float2 pair = unpack<T>(pairs[v / 2]);
      wide.v[v] = pair.x, wide.v[v + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) wide.v[v] = widen(pack.v[v]);
  }
  return wide;
}
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> narrow(const Pack<Accumulator<T>, V>& wide) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.v[v] = narrow<T>(wide.v[v]);
  return pack;
}

// Numbers in a pack of a walk along adjacent numbers of `dtype`, if sizes and strides allow packs: 8 to 16 bytes.
constexpr int pack_numbers(DType dtype) { return dtype == DType::f64 ? 1 : 4; }

// A quotient whose operands mostly fit in 32 bits, where dividing takes a quarter of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// ---- host code: sizes T, H, W of [N,C,T,H,W] with the views of the tensors that a kernel walks through together ----

// One dimension of two, [outer,inner], if every view's numbers then still lie at even distances. `outer` becomes 1.
template <int Count>
bool merge_dimensions(int64_t& outer, int64_t& inner, int64_t View::* outer_stride, int64_t View::* inner_stride,
                      View* const (&views)[Count]) {
  if (outer == 1) return true;
  if (inner > 1)
    for (const View* view : views)
      if (view->data && view->*outer_stride != inner * (view->*inner_stride)) return false;
  if (inner == 1)
    for (View* view : views) view->*inner_stride = view->*outer_stride;
  inner *= outer;
  outer = 1;
  return true;
}

// Whether packs of V numbers along a dimension of stride 1 lie aligned in every view: `adjacent` is its stride, `size`
// its length, the others are all the other dimensions.
template <int Count, int Others>
bool can_pack(int V, int64_t size, int64_t View::* adjacent, const int64_t (&sizes)[Others],
              int64_t View::* const (&others)[Others], View* const (&views)[Count]) {
  if (V == 1 || size % V != 0) return V == 1;
  for (const View* view : views) {
    if (!view->data) continue;
    const int64_t bytes = V * element_size(view->dtype);
    if (view->*adjacent != 1 || reinterpret_cast<uintptr_t>(view->data) % static_cast<uintptr_t>(bytes) != 0)
      return false;
    for (int i = 0; i < Others; ++i)
      if (sizes[i] > 1 && view->*others[i] % V != 0) return false;
  }
  return true;
}

}  // namespace rcu_ops::cuda
