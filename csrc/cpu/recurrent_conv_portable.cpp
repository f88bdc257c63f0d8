// recurrent_conv for any processor: four-lane vectors of the compiler's own, products and sums rounded as it sees fit.
#include <cmath>
#include <cstring>

#include "recurrent_conv_kernels.h"

namespace rcu_ops::cpu::portable {

static inline void copy_row(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void copy_around(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void end_around() {}

#include "scalar.h"
#include "recurrent_conv_transport.h"

using float4 = float __attribute__((vector_size(16)));
using double2 = double __attribute__((vector_size(16)));

template <class Scalar, class Vector>
struct Portable {
  using S = Scalar;
  using R = Vector;
  static constexpr int L = sizeof(Vector) / sizeof(Scalar);
  static constexpr int planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
  static R set1(S v) { return v - R{}; }  // keeps -0
  static R load(const S* p) {
    R v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(S* p, R v) { memcpy(p, &v, sizeof v); }
  // Conversions of the 16-bit types are calls: unrolled into every block they would be most of the library.
  template <class T>
  [[gnu::noinline]] static R load(const T* p) {
    R v;
    for (int i = 0; i < L; ++i) v[i] = scalar(p[i]);
    return v;
  }
  template <class T>
  [[gnu::noinline]] static void store(T* p, R v) {
    for (int i = 0; i < L; ++i) from_double(v[i], p[i]);
  }
  template <class T>
  static S scalar(T v) {
    return static_cast<S>(to_double(v));
  }
  // out[i * step + l] = src[at[l] + i] for L x L values.
  template <class T>
  static void transpose(const T* src, const int64_t* at, S* out, int64_t step) {
    for (int i = 0; i < L; ++i)
      for (int l = 0; l < L; ++l) out[i * step + l] = scalar(src[at[l] + i]);
  }
  static R fma(R a, R b, R c) { return a * b + c; }
  static R add(R a, R b) { return a + b; }
  static R mul(R a, R b) { return a * b; }
  static R relu(R v) {
    for (int i = 0; i < L; ++i) v[i] = v[i] < 0 ? S(0) : v[i];  // NaN stays
    return v;
  }
};
using F32 = Portable<float, float4>;
using F64 = Portable<double, double2>;

#include "recurrent_conv_core.h"

}  // namespace rcu_ops::cpu::portable
