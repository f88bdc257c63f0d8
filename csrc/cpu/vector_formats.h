// Vectors of `vector_bytes` in the compiler's own terms: loads and stores of all number formats.
// Included inside the namespace of an instruction set, after scalar.h and a constant vector_bytes.

template <class S>
struct Vector {
  typedef S R __attribute__((vector_size(vector_bytes)));
  static constexpr int L = vector_bytes / static_cast<int>(sizeof(S));
};
typedef Vector<float>::R Singles;
typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));

template <class To, class From>
static inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

// Numbers of 16 bits in lanes of 32, and their low halves back. Left to GCC 12, aarch64 does it lane by lane.
static inline Bits widened(HalfBits v) {
#if defined(__aarch64__)
  return vmovl_u16(v);
#else
  return __builtin_convertvector(v, Bits);
#endif
}
static inline HalfBits narrowed(Bits v) {
#if defined(__aarch64__)
  return vmovn_u32(v);
#else
  return __builtin_convertvector(v, HalfBits);
#endif
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
static inline Singles load_vector(const bf16_t* from, int count) {
  return bits_as<Singles>(widened(read_lanes<HalfBits>(from, count)) << 16);
}

template <class S>
static inline void store_vector(S* to, typename Vector<S>::R v, int count) {
  memcpy(to, &v, static_cast<size_t>(count) * sizeof(S));
}
template <class S>
static inline void store_vector(bf16_t* to, Singles v, int count) {
  const Bits bits = bits_as<Bits>(v), high = bits >> 16;
  const Bits rounded = (bits + 0x7fff + (high & 1)) >> 16;
  const HalfBits half = narrowed((bits & 0x7fffffff) > 0x7f800000 ? high | 0x40 : rounded);
  memcpy(to, &half, static_cast<size_t>(count) * sizeof(bf16_t));
}

#if defined(__aarch64__)  // each of these processors converts fp16
static_assert(vector_bytes == 16);
template <class S>
static inline Singles load_vector(const f16_t* from, int count) {
  return vcvt_f32_f16(read_lanes<float16x4_t>(from, count));
}
template <class S>
static inline void store_vector(f16_t* to, Singles v, int count) {
  const float16x4_t half = vcvt_f16_f32(v);
  memcpy(to, &half, static_cast<size_t>(count) * sizeof(f16_t));
}
#else
template <class S>
static inline Singles load_vector(const f16_t* from, int count) {
  const Bits half = widened(read_lanes<HalfBits>(from, count)), rest = half & 0x7fff;
  const Bits normal = bits_as<Bits>(bits_as<Singles>(rest << 13) * as_float(0x77800000));  // see to_double(f16_t)
  const Bits special = rest << 13 | 0x7f800000;
  return bits_as<Singles>((rest >= 0x7c00 ? special : normal) | (half & 0x8000) << 16);
}
template <class S>
static inline void store_vector(f16_t* to, Singles v, int count) {
  const Bits bits = bits_as<Bits>(v), rest = bits & 0x7fffffff;  // see from_double(double, f16_t&)
  const Bits nan = (rest >> 13 & 0x3ff) | 0x7e00;
  const Bits denormal = bits_as<Bits>(bits_as<Singles>(rest) + 0.5f) - 0x3f000000;
  const Bits normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
  Bits half = rest < 0x38800000 ? denormal : normal;
  half = rest >= 0x477ff000 ? Bits{} + 0x7c00 : half;
  half = rest > 0x7f800000 ? nan : half;
  const HalfBits out = narrowed(half | (bits >> 16 & 0x8000));
  memcpy(to, &out, static_cast<size_t>(count) * sizeof(f16_t));
}
#endif
