// Vectors of `vector_bytes` in the compiler's own terms: activations.
// Included inside the namespace of an instruction set, after scalar.h and a constant vector_bytes, so that each gets
// its own copy (see scalar.h).
//
// Activations are accurate to about 2 ulp of fp32; fp64 goes through the C library, lane by lane.

#include "vector_formats.h"

using Floats = Vector<float>::R;
using Doubles = Vector<double>::R;

// An instruction set that does the next two faster brings functions of its own, which are taken for the templates here.
//
// p 2^n for whole n of -152 to 0.
template <class V>
static inline V times_power_of_two(V p, V n) {
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;  // two factors, none of which is a denormal
  return p * bits_as<V>((half + 127) << 23) * bits_as<V>((whole - half + 127) << 23);
}
// 1 / d for d of 1 to 2.
template <class V>
static inline V reciprocal_of(V d) {
  return 1 / d;
}

// e^-|x|: x = n ln 2 + r, a polynomial in r (Cephes), and 2^n, through the denormals to 0. NaN stays.
static inline Floats decay_of(Floats x) {
  x = bits_as<Floats>(bits_as<Bits>(x) | 0x80000000);
  x = x < -105.0f ? Floats{} - 105.0f : x;
  // Adding 1.5 * 2^23 rounds to the nearest whole number.
  const Floats n = x * 1.44269504f + 12582912.0f - 12582912.0f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return times_power_of_two(p, n);
}

// With e^-|x| nothing overflows, and what is divided by is between 1 and 2.
static inline Floats sigmoid_of(Floats x) {
  const Floats e = decay_of(x), positive = reciprocal_of(1 + e);
  return x < 0 ? e * positive : positive;
}
static inline Doubles sigmoid_of(Doubles x) {
  for (int i = 0; i < Vector<double>::L; ++i) x[i] = 1 / (1 + std::exp(-x[i]));
  return x;
}

static inline Floats tanh_of(Floats x) {
  const Floats magnitude = bits_as<Floats>(bits_as<Bits>(x) & 0x7fffffff), square = x * x;
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // below 0.625, where 1 - 2 e / (1 + e) would cancel
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats e = decay_of(x + x), small = p * square * x + x, large = 1 - (e + e) * reciprocal_of(1 + e);
  const Floats with_sign = bits_as<Floats>(bits_as<Bits>(large) | (bits_as<Bits>(x) & 0x80000000));
  return magnitude < 0.625f ? small : with_sign;
}
static inline Doubles tanh_of(Doubles x) {
  for (int i = 0; i < Vector<double>::L; ++i) x[i] = std::tanh(x[i]);
  return x;
}
