// Vectors of `vector_bytes` in the compiler's own terms: loads and stores of all number formats, and activations. Included inside
// the namespace of an instruction set, after scalar.h and a constant vector_bytes, so that each gets its own copy (see scalar.h).
//
// exp_of and what is made of it are accurate to about 2 ulp of fp32; fp64 goes through the C library, lane by lane.

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

// The first `count` lanes from memory, the others 0; count is the number of lanes, known to the compiler, in all but a run's end.
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

// e^x: x = n ln 2 + r, a polynomial in r (Cephes), and 2^n in two factors, so that results run through the denormals to 0 and
// through the largest number to infinity. NaN stays.
static inline Floats exp_of(Floats x) {
  x = x > 105.0f ? Floats{} + 105.0f : x;
  x = x < -105.0f ? Floats{} - 105.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; a NaN's bits give some n, and the product below is NaN.
  const Floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints whole = bits_as<Ints>(shifted) - 0x4b400000, half = whole >> 1;
  return p * bits_as<Floats>((half + 127) << 23) * bits_as<Floats>((whole - half + 127) << 23);
}
static inline Doubles exp_of(Doubles x) {
  for (int i = 0; i < Vector<double>::L; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class R>
static inline R sigmoid_of(R x) {
  return 1 / (1 + exp_of(-x));
}

static inline Floats tanh_of(Floats x) {
  const Floats magnitude = bits_as<Floats>(bits_as<Bits>(x) & 0x7fffffff), square = x * x;
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // below 0.625, where 1 - 2 / (e^2x + 1) would cancel
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats small = p * square * x + x, large = 1 - 2 / (exp_of(2 * magnitude) + 1);
  const Floats with_sign = bits_as<Floats>(bits_as<Bits>(large) | (bits_as<Bits>(x) & 0x80000000));
  return magnitude < 0.625f ? small : with_sign;
}
static inline Doubles tanh_of(Doubles x) {
  for (int i = 0; i < Vector<double>::L; ++i) x[i] = std::tanh(x[i]);
  return x;
}
