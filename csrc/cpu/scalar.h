// Scalar conversions of the 16-bit formats (memory.h). Included inside the namespace of the instruction set that uses
// them, so that no copy compiled for another one is linked in its place.

template <class A>
static inline A min_of(A a, A b) {
  return a < b ? a : b;
}
template <class A>
static inline A max_of(A a, A b) {
  return a > b ? a : b;
}
static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// ---- scalar conversions, for edges and states ------------------------------------------------------------------

static inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
static inline double to_double(double v) { return v; }
static inline double to_double(float v) { return v; }
static inline double to_double(bf16_t v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
static inline double to_double(f16_t v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent from the half's bias to the float's, denormals included.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));
}
static inline void from_double(double v, double& out) { out = v; }
static inline void from_double(double v, float& out) { out = static_cast<float>(v); }
static inline void from_double(double v, bf16_t& out) {
  const uint32_t bits = as_bits(static_cast<float>(v));
  // A NaN whose payload is all in the low half would round to infinity.
  out.bits = (bits & 0x7fffffff) > 0x7f800000 ? static_cast<uint16_t>(bits >> 16 | 0x40)
                                              : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_double(double v, f16_t& out) {
  const uint32_t bits = as_bits(static_cast<float>(v)), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00 | (rest >> 13 & 0x3ff);
  } else if (rest >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (rest < 0x38800000) {  // denormal half: adding 1/2 aligns its last bit with the float's
    half = as_bits(as_float(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

static inline double load_any(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::bf16: return to_double(static_cast<const bf16_t*>(data)[i]);
    default: return to_double(static_cast<const f16_t*>(data)[i]);
  }
}
static inline void store_any(void* data, DType dtype, int64_t i, double v) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[i] = v; break;
    case DType::f32: from_double(v, static_cast<float*>(data)[i]); break;
    case DType::bf16: from_double(v, static_cast<bf16_t*>(data)[i]); break;
    default: from_double(v, static_cast<f16_t*>(data)[i]); break;
  }
}
