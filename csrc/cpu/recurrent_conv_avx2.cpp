// recurrent_conv for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2::recurrent_conv_kernels {

static inline void copy_row(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

// Whole lines past the caches, the ends of the run as usual.
static void copy_around(void* to, const void* from, size_t bytes) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  const size_t head = -reinterpret_cast<uintptr_t>(dst) & 63;
  if (head >= bytes) {
    copy_row(dst, src, bytes);
    return;
  }
  copy_row(dst, src, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64)
    for (int half = 0; half < 64; half += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + half),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + half)));
  copy_row(dst + i, src + i, bytes - i);
}
static void end_around() { _mm_sfence(); }

#include "scalar.h"
#include "recurrent_conv_transport.h"

#include "vectors_avx2.h"

struct F32 : Floats {
  static constexpr int planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
};
struct F64 : Doubles {
  static constexpr int planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
};

#include "recurrent_conv_core.h"

}  // namespace rcu_ops::cpu::avx2::recurrent_conv_kernels
#endif
