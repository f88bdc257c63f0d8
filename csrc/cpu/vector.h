// Vectors of `vector_bytes` in the compiler's own terms: loads and stores of all number formats, and activations.
// Included inside the namespace of an instruction set, after scalar.h and a constant vector_bytes, so that each gets
// its own copy (see scalar.h).
//
// Activations are accurate to about 2 ulp of fp32; fp64 goes through the C library, lane by lane.

template <class S>
struct Vector {
  typedef S R __attribute__((vector_size(vector_bytes)));
  static constexpr int L = vector_bytes / static_cast<int>(sizeof(S));
};
typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));
using Floats = Vector<float>::R;
using Doubles = Vector<double>::R;

template <class To, class From>
static inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

// The first `count` lanes from memory, the others 0; count is the number of lanes, known to the compiler, in all but a
// run's end.
template <class R, class E>
static inline R read_lanes(const E* from, int count) {
  R v{};
  memcpy(&v, from, static_cast<size_t>(count) * sizeof(E));
  return v;
}

template <class S>
static inline typename Vector<S>::R load_vector(const S* from, int count) {
  return read_lanes<typename Vector<S>::R>(from, count);
}
template <class S>
static inline Floats load_vector(const bf16_t* from, int count) {
  return bits_as<Floats>(__builtin_convertvector(read_lanes<HalfBits>(from, count), Bits) << 16);
}
template <class S>
static inline Floats load_vector(const f16_t* from, int count) {
  const Bits half = __builtin_convertvector(read_lanes<HalfBits>(from, count), Bits), rest = half & 0x7fff;
  const Bits normal = bits_as<Bits>(bits_as<Floats>(rest << 13) * as_float(0x77800000));  // see to_double(f16_t)
  const Bits special = rest << 13 | 0x7f800000;
  return bits_as<Floats>((rest >= 0x7c00 ? special : normal) | (half & 0x8000) << 16);
}

template <class S>
static inline void store_vector(S* to, typename Vector<S>::R v, int count) {
  memcpy(to, &v, static_cast<size_t>(count) * sizeof(S));
}
template <class S>
static inline void store_vector(bf16_t* to, Floats v, int count) {
  const Bits bits = bits_as<Bits>(v), high = bits >> 16;
  const Bits rounded = (bits + 0x7fff + (high & 1)) >> 16;
  const HalfBits half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? high | 0x40 : rounded, HalfBits);
  memcpy(to, &half, static_cast<size_t>(count) * sizeof(bf16_t));
}
template <class S>
static inline void store_vector(f16_t* to, Floats v, int count) {
  const Bits bits = bits_as<Bits>(v), rest = bits & 0x7fffffff;  // see from_double(double, f16_t&)
  const Bits nan = (rest >> 13 & 0x3ff) | 0x7e00;
  const Bits denormal = bits_as<Bits>(bits_as<Floats>(rest) + 0.5f) - 0x3f000000;
  const Bits normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
  Bits half = rest < 0x38800000 ? denormal : normal;
  half = rest >= 0x477ff000 ? Bits{} + 0x7c00 : half;
  half = rest > 0x7f800000 ? nan : half;
  const HalfBits out = __builtin_convertvector(half | (bits >> 16 & 0x8000), HalfBits);
  memcpy(to, &out, static_cast<size_t>(count) * sizeof(f16_t));
}

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
