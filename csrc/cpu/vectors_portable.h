// Vectors of numbers for any processor, in 16-byte vectors of the compiler's own: what the CPU kernels are written in.
// Included, after scalar.h, inside the namespace.
//
// R is a register of L numbers S; memory may hold a 16-bit type instead. No alignment is asked for.

static constexpr int vector_bytes = 16;
#include "vector_formats.h"

template <class Scalar>
struct Portable {
  using S = Scalar;
  using R = typename Vector<S>::R;
  static constexpr int L = Vector<S>::L;
  static R set1(S v) { return v - R{}; }  // keeps -0
  template <class T>
  static R load(const T* p) {
    return load_vector<S>(p, L);
  }
  template <class T>
  static void store(T* p, R v) {
    store_vector<S>(p, v, L);
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
  static R sub(R a, R b) { return a - b; }
  static R div(R a, R b) { return a / b; }
  static R reciprocal(R d) { return 1 / d; }
  static R less(R a, R b, R yes, R no) {
    for (int i = 0; i < L; ++i) no[i] = a[i] < b[i] ? yes[i] : no[i];
    return no;
  }
  static R min(R a, R b) { return less(a, b, a, b); }  // b where either is NaN, max too
  static R max(R a, R b) { return less(b, a, a, b); }
  static R round(R v) {
    const R shift = set1(sizeof(S) == 8 ? S(0x1.8p52) : S(0x1.8p23));  // numbers beyond it have no fraction
    return (v + shift) - shift;
  }
  static R times_power(R v, R n) {  // v 2^n, n whole and in [-126, 127]; of fp32 alone
    return v * bits_as<R>((__builtin_convertvector(n, Ints) + 127) << 23);
  }
  static S sum(R v) {
    S all = v[0];
    for (int i = 1; i < L; ++i) all += v[i];
    return all;
  }
  static S largest(R v) {
    S all = v[0];
    for (int i = 1; i < L; ++i) all = v[i] > all ? v[i] : all;
    return all;
  }
  static void sums(R a, R b, R c, R d, S* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }
};
using Floats = Portable<float>;
using Doubles = Portable<double>;
