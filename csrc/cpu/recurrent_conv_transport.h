// recurrent_conv: the way between tensors and stages. Included inside each instruction set's namespace, after
// scalar.h, copy_row and copy_around.
//
// Kernels read x and write y through stages, dense [rows][width] pieces of a frame in the first-level cache. A stage is
// filled and emptied row by row in runs of adjacent elements, as long as the tensor has them: memory sees a few long
// sequential accesses, whatever the shape of the register blocks, and odd tails or strides end here.

// Calls call(number) with a number of the type that memory holds, `dtype`: of the kernels only what reads and writes it
// is made for every type. S is what is added up in, fp64 for fp64 and fp32 for all else.
template <class Call>
[[gnu::always_inline]] static inline void as_narrow(DType dtype, Call call) {
  if (dtype == DType::bf16)
    call(bf16_t());
  else
    call(f16_t());
}
template <class S, class Call>
[[gnu::always_inline]] static inline void as_numbers(DType dtype, Call call) {
  if constexpr (sizeof(S) == 4) {
    if (dtype != DType::f32) return as_narrow(dtype, call);
  }
  call(S());
}

// Offsets of `count` columns q = ((n * G + g) * H + h) * W + w from q0 on.
static void column_offsets(const Scan& p, const View& v, int64_t q0, int64_t count, int64_t* out) {
  int64_t w = q0 % p.W, h = q0 / p.W % p.H, g = q0 / p.W / p.H % p.G, n = q0 / p.W / p.H / p.G;
  for (int64_t i = 0; i < count;) {
    const int64_t row = n * v.n + g * v.g + h * v.h;
    for (; w < p.W && i < count; ++w, ++i) out[i] = row + w * v.w;
    w = 0;
    if (++h == p.H) {
      h = 0;
      if (++g == p.G) g = 0, ++n;
    }
  }
}

// One strided tensor seen by a task: element (frame, row, lane) at base[frame * t + rows[row] + lanes[lane]].
template <class T>
struct Stream {
  T* base = nullptr;
  int64_t t = 0;
  const int64_t *rows = nullptr, *lanes = nullptr;
  const int64_t* ends = nullptr;  // of each lane's run of adjacent lanes
};

// The end of the run of adjacent lanes that begins at `lane`.
static inline int64_t run_end(const int64_t* lanes, int64_t lane, int64_t end) {
  const int64_t base = lanes[lane] - lane;
  for (++lane; lane < end && lanes[lane] == base + lane; ++lane) {
  }
  return lane;
}

template <class T>
static void copy_in(const T* frame, const int64_t* rows, int64_t row_count, const int64_t* lanes, int64_t lane_count,
                    T* stage, int64_t width) {
  if (row_count > 1 && rows[1] - rows[0] == 1 && lane_count > 1 && lanes[1] - lanes[0] != 1) {
    for (int64_t l = 0; l < lane_count; ++l)
      for (int64_t m = 0; m < row_count; ++m) stage[m * width + l] = frame[rows[m] + lanes[l]];
    return;
  }
  for (int64_t l = 0; l < lane_count;) {
    const int64_t end = run_end(lanes, l, lane_count);
    const T* src = frame + lanes[l];
    if (end - l < 4)
      for (int64_t m = 0; m < row_count; ++m)
        for (int64_t i = l; i < end; ++i) stage[m * width + i] = src[rows[m] + i - l];
    else
      for (int64_t m = 0; m < row_count; ++m) copy_row(stage + m * width + l, src + rows[m], (end - l) * sizeof(T));
    l = end;
  }
}

// `around` the caches where whole lines are written and the tensor is too large to be found there again: a scattered
// store that first reads its line costs several times the store.
template <class T>
static void copy_out(T* frame, const int64_t* rows, int64_t row_count, const int64_t* lanes, int64_t lane_count,
                     const T* stage, int64_t width, bool around) {
  if (row_count > 1 && rows[1] - rows[0] == 1 && lane_count > 1 && lanes[1] - lanes[0] != 1) {
    for (int64_t l = 0; l < lane_count; ++l)
      for (int64_t m = 0; m < row_count; ++m) frame[rows[m] + lanes[l]] = stage[m * width + l];
    return;
  }
  for (int64_t l = 0; l < lane_count;) {
    const int64_t end = run_end(lanes, l, lane_count);
    T* dst = frame + lanes[l];
    if (end - l < 4)
      for (int64_t m = 0; m < row_count; ++m)
        for (int64_t i = l; i < end; ++i) dst[rows[m] + i - l] = stage[m * width + i];
    else
      for (int64_t m = 0; m < row_count; ++m) {
        if (around)
          copy_around(dst + rows[m], stage + m * width + l, (end - l) * sizeof(T));
        else
          copy_row(dst + rows[m], stage + m * width + l, (end - l) * sizeof(T));
      }
    l = end;
  }
}

// Calls visit(address) for every line that `row_count` rows of a piece of a frame of elements of `size` bytes touch.
template <class Visit>
static inline void each_line(int64_t size, const void* frame, const int64_t* rows, int64_t row_count,
                             int64_t first_lane, int64_t lane_count, Visit visit) {
  for (int64_t m = 0; m < row_count; ++m) {
    const char* const from = static_cast<const char*>(frame) + (rows[m] + first_lane) * size;
    const char* const end = from + lane_count * size;
    for (const char* line = from - reinterpret_cast<uintptr_t>(from) % 64; line < end; line += 64) visit(line);
  }
}
