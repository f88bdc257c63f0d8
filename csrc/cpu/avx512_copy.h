// Copies of rows with AVX-512. Included inside the namespace of the instruction set that uses them.

static inline void copy_row(void* to, const void* from, size_t bytes) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  size_t i = 0;
  for (; i + 64 <= bytes; i += 64) _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + i));
  if (i < bytes) {
    const __mmask64 rest = (uint64_t(1) << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(dst + i, rest, _mm512_maskz_loadu_epi8(rest, src + i));
  }
}

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
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
  copy_row(dst + i, src + i, bytes - i);
}
static void end_around() { _mm_sfence(); }
