// fast_gru's products of panels in fp32 (fast_gru_columns.h). Included inside the namespace of an instruction set.

// out[rows][NR] = (or +=) weight[rows][inputs] in[inputs][NR], rows of the weight `pitch` apart.
template <int NV>
static void panel_product(float* out, const float* weight, int64_t pitch, int64_t rows, int64_t inputs, int64_t run,
                          const float* in, bool add) {
  constexpr int L = Vector<float>::L, NR = NV * L;
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = min_of<int64_t>(block_rows, rows - first);
    const float* a[block_rows];  // the last row again where there are no more
    for (int m = 0; m < block_rows; ++m) a[m] = weight + (first + min_of<int64_t>(m, count - 1)) * pitch;
    float* to = out + first * NR;
    for (int64_t k0 = 0; k0 < inputs; k0 += run) {
      Floats acc[block_rows][NV] = {};
      const float* b = in + k0 * NR;
      const int64_t end = min_of(inputs, k0 + run);
      for (int64_t k = k0; k < end; ++k, b += NR) {
        Floats bv[NV];
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) memcpy(&bv[v], b + v * L, sizeof(Floats));
#pragma GCC unroll 8
        for (int m = 0; m < block_rows; ++m) {
          const float w = a[m][k];
#pragma GCC unroll 3
          for (int v = 0; v < NV; ++v) acc[m][v] += w * bv[v];
        }
      }
      const bool more = add || k0 > 0;
#pragma GCC unroll 8
      for (int m = 0; m < block_rows; ++m)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) {
          if (m >= count) break;
          Floats before{};
          if (more) memcpy(&before, to + m * NR + v * L, sizeof(Floats));
          acc[m][v] += before;
          memcpy(to + m * NR + v * L, &acc[m][v], sizeof(Floats));
        }
    }
  }
}

// out[N columns][rows] = (or +=) weight[rows][inputs] in[N][inputs]: for few columns, lanes are inputs.
template <int N>
static void thin_product(float* out, int64_t out_pitch, const float* weight, int64_t rows, int64_t inputs,
                         const float* in, int64_t in_pitch, bool add) {
  constexpr int L = Vector<float>::L, M = L / fast_gru::most_thin(L);
  for (int64_t first = 0; first < rows; first += M) {
    const int64_t count = min_of<int64_t>(M, rows - first);
    const float* a[M];
    for (int m = 0; m < M; ++m) a[m] = weight + (first + min_of<int64_t>(m, count - 1)) * inputs;
    Floats sums[L] = {};  // row by row
    const auto some = [&](int64_t k, auto lanes) {
      Floats x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[n] = load_vector<float>(in + n * in_pitch + k, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Floats w = load_vector<float>(a[m] + k, lanes);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m * N + n] += w * x[n];
      }
    };
    int64_t k = 0;
    for (; k + L <= inputs; k += L) some(k, std::integral_constant<int, L>{});
    if (k < inputs) some(k, static_cast<int>(inputs - k));
    add_lanes<N>(out + first, out_pitch, sums, count, add);
  }
}

// `count` numbers of 16 bits as fp32.
static void widen(float* to, const void* from, DType dtype, int64_t count) {
  const auto all = [&](const auto* numbers) {
    for_vectors(count, [&](int64_t i, auto lanes) {
      store_vector<float>(to + i, load_vector<float>(numbers + i, lanes), lanes);
    });
  };
  dtype == DType::bf16 ? all(static_cast<const bf16_t*>(from)) : all(static_cast<const f16_t*>(from));
}

// What fast_gru_gradients.h is made of: a number of a factor holds one term, and matrices are factors as they are.
static constexpr int64_t terms_at_once = 1;
static inline Floats add_product(Floats sum, float w, Floats b) { return sum + w * b; }
struct FactorMatrix {
  const float* data;
  int64_t pitch;
};
static inline FactorMatrix pairs_of_features(const float* m, int64_t pitch, int64_t, int64_t, float*) {
  return {m, pitch};
}
static inline FactorMatrix pairs_of_rows(const float* m, int64_t pitch, int64_t, int64_t, float*) { return {m, pitch}; }
