// vector.h for AVX-512. Included inside the namespace of an instruction set, after scalar.h.

static constexpr int vector_bytes = 64;

// A division of 16 numbers takes as long as a dozen other operations; an approximation to 14 bits and one
// step of Newton's are within 1 ulp.
typedef float Lanes __attribute__((vector_size(vector_bytes)));
static inline Lanes times_power_of_two(Lanes p, Lanes n) { return _mm512_scalef_ps(p, n); }
static inline Lanes reciprocal_of(Lanes d) {
  const Lanes near = _mm512_rcp14_ps(d);
  return near + near * (1 - d * near);
}

#include "vector.h"
