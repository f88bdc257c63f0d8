// fast_gru on CUDA devices: the fused passes between its matrix products (common/fast_gru.h).
#include "cuda/fast_gru.h"

#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {
namespace {

using fast_gru::Elementwise;
using fast_gru::Pass;

constexpr int pass_threads = 256;

// V adjacent numbers, read and written as 16-byte words.
template <typename T, int V>
struct alignas(V * sizeof(T) > 16 ? 16 : V * sizeof(T)) Pack {
  T v[V];
};

template <typename S>
__device__ __forceinline__ S sigmoid(S x) {
  return 1 / (1 + exp(-x));
}

// A pass over elements, T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S = Accumulator<T>.
//
// Work.     Thread i owns elements [i V, i V + V) of the flattened rows x segments x length and nobody else touches
//           them; V is 16 bytes of T where every operand's runs are that aligned, else 1.
// Memory.   No shared memory; every operand is read once and written once.
// Aliasing. In-and-out operands are changed in place by their owner; no others overlap but what the pass allows.
// Bound.    By memory: up to 8 operands of 2 to 8 bytes per element, one or two exponentials and divisions. For the few
//           thousand positions of a step it is the launch, about 2 us.
template <typename T, int V>
__global__ void __launch_bounds__(pass_threads) fast_gru_pass(const Elementwise p) {
  using S = Accumulator<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * pass_threads + threadIdx.x, per_run = p.length / V;
  if (i >= p.rows * p.segments * per_run) return;
  const int64_t run = i / per_run, row = run / p.segments, segment = run % p.segments, first = i % per_run * V;
  const auto offset = [&](int k) { return row * p.plane[k].row + segment * p.plane[k].segment + first; };
  const bool bf16 = p.dtype == DType::bf16;
  const auto has = [&](int k) { return p.plane[k].data != nullptr; };
  const auto get = [&](int k, S(&out)[V]) {
    const Pack<T, V> values = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.plane[k].data) + offset(k));
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widen(values.v[j], bf16);
  };
  const auto get_wide = [&](int k, S(&out)[V]) {
    const Pack<S, V> values = *reinterpret_cast<const Pack<S, V>*>(static_cast<const S*>(p.plane[k].data) + offset(k));
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = values.v[j];
  };
  const auto put = [&](int k, const S(&in)[V]) {
    Pack<T, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = narrow<T>(in[j], bf16);
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.plane[k].data) + offset(k)) = values;
  };
  const auto put_wide = [&](int k, const S(&in)[V]) {
    Pack<S, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = in[j];
    *reinterpret_cast<Pack<S, V>*>(static_cast<S*>(p.plane[k].data) + offset(k)) = values;
  };

  S a[V], b[V], c[V], d[V], e[V];
  switch (p.pass) {
    case Pass::hidden:
      get(0, a);
      if (has(1)) {
        get(1, b);
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] += b[j];
      }
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (a[j] < 0) a[j] = 0;  // NaN stays
      put(0, a);
      break;
    case Pass::gates: get(0, a), get_wide(2, c);
#pragma unroll
      for (int j = 0; j < V; ++j) a[j] = sigmoid(a[j]), c[j] *= a[j];
      put(3, c);
      if (!p.keep) break;
      get(1, b);
#pragma unroll
      for (int j = 0; j < V; ++j) b[j] = sigmoid(b[j]);
      put(0, a), put(1, b);
      break;
    case Pass::output:
      get(0, a);
      if (has(1)) {
        get(1, b);
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] += b[j];
      }
#pragma unroll
      for (int j = 0; j < V; ++j) a[j] = tanh(a[j]);
      if (p.keep) put(0, a);
      get(2, b), get_wide(3, c);
      if (!p.keep) {
#pragma unroll
        for (int j = 0; j < V; ++j) b[j] = sigmoid(b[j]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) c[j] = (1 - b[j]) * c[j] + b[j] * a[j];
      put_wide(3, c);
      if (has(4)) put(4, c);
      if (has(5)) put(5, c);
      break;
    case Pass::d_output:
      get_wide(0, a);
      if (has(1)) {
        get(1, b);
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] += b[j];
      }
      if (has(2)) {
        get(2, b);
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] += b[j];
      }
      get(3, b), get(4, c), get(5, d);  // z, candidate, before
#pragma unroll
      for (int j = 0; j < V; ++j) {
        e[j] = a[j] * (c[j] - d[j]) * b[j] * (1 - b[j]);
        d[j] = a[j] * b[j] * (1 - c[j] * c[j]);
        a[j] *= 1 - b[j];
      }
      put(6, d), put(7, e), put_wide(0, a);
      break;
    case Pass::d_gates: get_wide(0, a), get(1, b), get(2, c), get(3, d);  // carry, q, r, before
#pragma unroll
      for (int j = 0; j < V; ++j) {
        a[j] += b[j] * c[j];
        b[j] *= d[j] * c[j] * (1 - c[j]);
        d[j] *= c[j];
      }
      put_wide(0, a), put(4, b), put(5, d);
      break;
    case Pass::d_hidden: get(0, a), get(1, b);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (b[j] <= 0) a[j] = 0;  // NaN passes
      put(0, a);
      break;
    case Pass::sum:
#pragma unroll
      for (int j = 0; j < V; ++j) a[j] = 0;
      if (has(1)) get_wide(1, a);
#pragma unroll
      for (int k = 2; k < 4; ++k)
        if (has(k)) {
          get(k, b);
#pragma unroll
          for (int j = 0; j < V; ++j) a[j] += b[j];
        }
      p.wide ? put_wide(0, a) : put(0, a);
      break;
  }
}

// Whether every operand can be read and written `bytes` at a time, in numbers of `size` bytes.
bool aligned(const Elementwise& p, int64_t bytes, int64_t size) {
  const int64_t count = bytes / size;
  if (p.length % count) return false;
  for (const fast_gru::Plane& plane : p.plane)
    if (plane.data && (reinterpret_cast<uintptr_t>(plane.data) % bytes || (p.rows > 1 && plane.row % count) ||
                       (p.segments > 1 && plane.segment % count)))
      return false;
  return true;
}

template <typename T>
Error launch_pass(Elementwise p, Stream stream) {
  constexpr int V = 16 / sizeof(T);
  fast_gru::merge(p);
  const bool wide = aligned(p, 16, sizeof(T));
  const int64_t blocks = (fast_gru::elements(p) / (wide ? V : 1) + pass_threads - 1) / pass_threads;
  if (blocks > 0x7fffffff) return "fast_gru: too many positions for one launch";
  return launch("fast_gru pass", wide ? fast_gru_pass<T, V> : fast_gru_pass<T, 1>, dim3(static_cast<unsigned>(blocks)),
                dim3(pass_threads), 0, stream, p);
}

}  // namespace

Text elementwise(const Elementwise& p, Stream stream) {
  if (fast_gru::elements(p) == 0) return {};
  switch (p.dtype) {
    case DType::f64: return launch_pass<double>(p, stream);
    case DType::f32: return launch_pass<float>(p, stream);
    default: return launch_pass<uint16_t>(p, stream);
  }
}

}  // namespace rcu_ops::cuda
