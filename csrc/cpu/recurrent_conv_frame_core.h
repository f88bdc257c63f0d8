// One frame of a recurrent layer on vector units: its convolution, its recurrence and what follows them, in one pass.
// Included at the end of recurrent_conv_core.h, for every instruction set that includes it, with arithmetic A in
// fp32; and by recurrent_conv_avx512_bf16.cpp with its own, on pairs of bf16:
//
//   E, piece                                 what the band and the panels hold; numbers of a run that are summed in one
//   pairs                                    whether the panels are those of pairs (ConvFrame::panels)
//   multiply<MR>(a, lda, b, count, sums, resume)   sums[m][32] (+)= a[m][count] b[count][32]
//
// Layout.   Vectors along output channels, rows of a block along positions of one output row. A task owns a band of
//           output rows and a range of panels of 32 output channels. The band's input is copied once, as fp32 or as
//           bf16 with C rounded up to even, with its padding, [row][column][C]: the kernel_w columns that a position
//           sees are one run of numbers there, and so are the state's channels where they lie, or, for pairs, in a
//           rounded copy.
// Aliasing. None: y and last are new.
// Scratch.  Slot 1: the band, the rounded state, and the sums of one panel at all of the band's positions.
// Order.    Runs are summed in even pieces of at most `piece` numbers, which are added up in order: the same for every
//           band, range and number of threads.
// Pairs.    As in recurrent_conv_bf16_core.h: products are of bf16(state) and W less ones on its diagonal, s, and s . v
//           is added in fp32. A position whose state is not finite multiplies zeros, and W v is added for it one number
//           at a time: 0 * inf would be NaN where W v is infinite.
// Tails.    The last block of an output row overlaps the one before it and writes the same numbers again. Rows shorter
//           than half a block are computed one position after the other.
// Bound.    2 (kernel_h kernel_w C + O) FLOP per output. A panel's piece (24 KB) stays in the first-level cache while
//           all blocks of the band go past it, and the next one is asked for meanwhile: weights are read once per task,
//           from wherever they are.

template <class A>
struct FrameTask {
  using E = typename A::E;
  using V = F32;
  using S = float;
  using R = V::R;
  static constexpr int L = V::L, MR = V::channels_rows, HALF = MR / 2, NV = 2;
  static_assert(frame_panel % (NV * L) == 0 && frame_channels % L == 0);

  const ConvFrame& p;
  const FramePlan& plan;

  struct Block {
    int64_t row, column, count;  // MR, HALF or one position
  };
  // Calls with every block of rows [0, rows).
  template <class Call>
  void blocks(int64_t rows, Call call) const {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t j = 0;
      for (; j + MR <= p.OW; j += MR) call(Block{i, j, MR});
      const int64_t rest = p.OW - j;
      if (rest > HALF && p.OW >= MR)
        call(Block{i, p.OW - MR, MR});
      else if (p.OW >= HALF)
        for (int64_t at = rest; at > 0; at -= HALF) call(Block{i, p.OW - max_of<int64_t>(at, HALF), HALF});
      else
        for (; j < p.OW; ++j) call(Block{i, j, 1});
    }
  }

  // Calls with a number of the type of frame, residual and y.
  template <class Call>
  void as_type(Call call) const {
    if constexpr (A::pairs)
      call(bf16_t());
    else
      as_numbers<S>(p.dtype, call);
  }

  template <class N>
  static const N* from(const ConvFrame::View& v, int64_t n, int64_t i, int64_t j) {
    return static_cast<const N*>(v.data) + n * v.n + i * v.h + j * v.w;
  }

  // Rows of the frame that output rows [r0, r0 + rows) see.
  template <class T>
  void copy_band(int64_t n, int64_t r0, int64_t height, int64_t width, E* to) const {
    const int64_t C = p.channels();
    for (int64_t i = 0; i < height; ++i, to += width * C) {
      const int64_t y = r0 * p.stride_h - p.padding_h + i;
      if (y < 0 || y >= p.H) {
        memset(static_cast<void*>(to), 0, static_cast<size_t>(width * C) * sizeof(E));
        continue;
      }
      const int64_t left = min_of(p.padding_w, width), inside = min_of(width - left, p.W);
      const int64_t right = width - left - inside;
      memset(static_cast<void*>(to), 0, static_cast<size_t>(left * C) * sizeof(E));
      const T* const row = from<T>(p.frame, n, y, 0);
      if (p.frame.w == C && p.C == C) {
        convert(row, to + left * C, inside * C);
      } else {
        for (int64_t j = 0; j < inside; ++j) {
          E* const at = to + (left + j) * C;
          convert(row + j * p.frame.w, at, p.C);
          if (p.C < C) at[p.C] = E{};
        }
      }
      memset(static_cast<void*>(to + (left + inside) * C), 0, static_cast<size_t>(right * C) * sizeof(E));
    }
  }
  template <class T>
  static void convert(const T* run, E* to, int64_t count) {
    if constexpr (sizeof(T) == sizeof(E)) {
      if (count < 8)
        for (int64_t i = 0; i < count; ++i) to[i] = run[i];
      else
        copy_row(to, run, static_cast<size_t>(count) * sizeof(E));
    } else {
      int64_t i = 0;
      for (; i + L <= count; i += L) V::store(to + i, V::load(run + i));
      for (; i < count; ++i) to[i] = V::scalar(run[i]);
    }
  }

  // bf16(state) of the band's positions, and which of them are not finite: their copies are zeros.
  void round_state(int64_t n, int64_t r0, int64_t rows, E* to, uint8_t* unusual) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < p.OW; ++j, to += p.O, ++unusual) {
        *unusual = !A::round(from<S>(p.state, n, r0 + i, j), to, p.O);
        if (*unusual) memset(static_cast<void*>(to), 0, static_cast<size_t>(p.O) * sizeof(E));
      }
  }

  void run(int64_t n, int64_t r0, int64_t rows, int64_t panel0, int64_t panel1) const {
    const int64_t width = (p.OW - 1) * p.stride_w + p.kernel_w, height = (rows - 1) * p.stride_h + p.kernel_h;
    const int64_t C = p.channels(), lda = p.stride_w * C, pitch = width * C;
    int64_t count = 0;
    blocks(rows, [&](const Block&) { ++count; });
    const bool rounded = A::pairs && p.recurrent;
    const size_t band_bytes = static_cast<size_t>(round_up(height * pitch, 32)) * sizeof(E);
    const size_t sums_bytes = static_cast<size_t>(count * MR * frame_panel) * sizeof(S);
    const size_t state_bytes = rounded ? static_cast<size_t>(round_up(rows * p.OW * p.O, 32)) * sizeof(E) : 0;
    char* const memory =
        static_cast<char*>(scratch(1, band_bytes + sums_bytes + state_bytes + static_cast<size_t>(rows * p.OW)));
    E* const band = reinterpret_cast<E*>(memory);
    S* const sums = reinterpret_cast<S*>(memory + band_bytes);
    E* const state = reinterpret_cast<E*>(memory + band_bytes + sums_bytes);
    uint8_t* const unusual = reinterpret_cast<uint8_t*>(memory + band_bytes + sums_bytes + state_bytes);
    as_type([&](auto number) { copy_band<decltype(number)>(n, r0, height, width, band); });
    if constexpr (A::pairs)
      if (rounded) round_state(n, r0, rows, state, unusual);

    const int64_t run_length = p.kernel_w * C, depth = p.depth();
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const E* const weights = static_cast<const E*>(p.panels) + panel * p.panel_rows() * frame_panel;
      const E* b = weights;
      for (int64_t k = 0; k < depth;) {
        // The rest of a row of the kernel, or of the state, in even pieces.
        const bool of_state = k >= p.kernel_h * run_length;
        const int64_t i = k / run_length, done = of_state ? k - p.kernel_h * run_length : k % run_length;
        const int64_t all = of_state ? p.O : run_length, pieces = (all + A::piece - 1) / A::piece;
        const int64_t unit = A::pairs ? 2 : 1;
        const int64_t piece = min_of(round_up((all + pieces - 1) / pieces, unit), all - done);
        const bool first = k == 0, last = k + piece == depth;
        const E* const next = b + piece * frame_panel;
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(E));
        const int64_t ahead = panel + 1 == panel1 && last ? 0 : piece * frame_panel;
        const int64_t share = round_up((ahead + count - 1) / count, line);
        int64_t asked = 0;
        S* sum = sums;
        blocks(rows, [&](const Block& at) {
          const E* a = band + (at.row * p.stride_h + i) * pitch + at.column * lda + done;
          int64_t step = lda;
          if (of_state && A::pairs) {
            a = state + (at.row * p.OW + at.column) * p.O + done;
            step = p.O;
          } else if (of_state) {
            a = from<E>(p.state, n, r0 + at.row, at.column) + done;
            step = p.state.w;
          }
          for (const int64_t until = min_of(asked + share, ahead); asked < until; asked += line)
            __builtin_prefetch(next + asked, 0, 2);
          if (at.count == MR)
            A::template multiply<MR>(a, step, b, piece, sum, !first);
          else if (at.count == HALF)
            A::template multiply<HALF>(a, step, b, piece, sum, !first);
          else
            A::template multiply<1>(a, step, b, piece, sum, !first);
          if (last)
            as_type(
                [&](auto number) { finish<decltype(number)>(at, sum, n, r0, panel * frame_panel, weights, unusual); });
          sum += at.count * frame_panel;
        });
        k += piece;
        b = next;
      }
    }
  }

  template <class T>
  void finish(const Block& at, const S* sums, int64_t n, int64_t r0, int64_t o0, const E* weights,
              const uint8_t* unusual) const {
    const int64_t present = min_of(frame_panel, p.O - o0), count = at.count, next = count * p.O;
    const R alpha = V::set1(p.alpha);
    // Copies, which the stores below cannot change.
    const bool recurrent = p.recurrent, relu = p.relu;
    const float* const bias = p.bias ? p.bias + o0 : nullptr;
    const float *const scale = p.scale ? p.scale + o0 : nullptr, *const shift = p.scale ? p.shift + o0 : nullptr;
    for (int64_t m = 0; m < count; ++m, sums += frame_panel) {
      const int64_t i = r0 + at.row, j = at.column + m, place = ((n * p.OH + i) * p.OW + j) * p.O + o0;
      const T* const residual = p.residual.data ? from<T>(p.residual, n, i, j) + o0 : nullptr;
      const S* const state = recurrent ? from<S>(p.state, n, i, j) : nullptr;
      S* const last = recurrent ? p.last + place : nullptr;
      T* const y = static_cast<T*>(p.y) + place;
      for (int64_t v = 0; v < present; v += L) {
        R value = V::load(sums + v);
        // The same of the next block, so that it comes by while that one is multiplied.
        if constexpr (A::pairs)
          if (recurrent) {
            value = add_state(value, state, o0, v, weights, unusual[at.row * p.OW + j]);
            __builtin_prefetch(state + count * p.state.w + o0 + v);
          }
        if (bias) value = V::add(value, V::load(bias + v));
        if (recurrent) {
          value = V::mul(value, alpha);
          V::store(last + v, value);
          __builtin_prefetch(last + next + v, 1);
        }
        if (scale) value = V::fma(V::load(scale + v), value, V::load(shift + v));
        if (residual) {
          value = V::add(value, V::load(residual + v));
          __builtin_prefetch(residual + count * p.residual.w + v);
        }
        if (relu) value = V::relu(value);
        V::store(y + v, value);
        __builtin_prefetch(y + next + v, 1);
      }
    }
  }

  // What the products of pairs leave out: s . v, or, where the state is not finite, W v.
  R add_state(R value, const S* state, int64_t o0, int64_t v, const E* weights, bool unusual) const {
    const E* const ones = weights + p.depth() * frame_panel;
    if (__builtin_expect(!unusual, 1)) return A::add_where(ones + 2 * v, value, V::load(state + o0 + v));
    const E* const rows = weights + (p.depth() - p.O) * frame_panel;
    S out[L];
    V::store(out, value);
    for (int64_t l = 0; l < L; ++l) {
      const int64_t o = v + l;
      for (int64_t k = 0; k < p.O; ++k) {
        const double w = to_double(rows[(k / 2 * frame_panel + o) * 2 + k % 2]);
        out[l] += static_cast<S>((w + (k == o0 + o ? to_double(ones[2 * o]) : 0)) * static_cast<double>(state[k]));
      }
    }
    return V::load(out);
  }

  static void task(void* self, int64_t index) {
    const auto& t = *static_cast<const FrameTask*>(self);
    const int64_t range = index % t.plan.ranges, bands = index / t.plan.ranges;
    const int64_t band = bands % t.plan.bands, n = bands / t.plan.bands;
    const int64_t r0 = band * t.plan.rows, panels = (t.p.O + frame_panel - 1) / frame_panel;
    t.run(n, r0, min_of(t.plan.rows, t.p.OH - r0), range * t.plan.panels, min_of((range + 1) * t.plan.panels, panels));
  }

  static void run_all(const ConvFrame& p, const FramePlan& plan, const Parallel& parallel) {
    FrameTask t{p, plan};
    parallel.run(parallel.pool, p.N * plan.bands * plan.ranges, task, &t);
  }
};
