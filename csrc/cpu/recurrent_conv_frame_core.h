// One frame of a recurrent layer on vector units: its convolution, its recurrence and what follows them, in one pass.
// Included at the end of recurrent_conv_core.h, for every instruction set that includes it.
//
// Layout.   Vectors along output channels, rows of a block along positions of one output row. A task owns a band of
//           output rows and a range of panels of 32 output channels. The band's input is copied once as fp32, with its
//           padding, [row][column][C]: the kernel_w columns that a position sees are one run of numbers there, and so
//           are the state's channels where they lie.
// Aliasing. None: y and last are new.
// Scratch.  Slot 1: the band, and the sums of one panel at all of its positions.
// Order.    Runs are summed in pieces of at most 192 numbers, which are added up in order: the same for every band,
//           range and number of threads.
// Tails.    The last block of an output row overlaps the one before it and writes the same numbers again.
// Bound.    2 (kernel_h kernel_w C + O) FLOP per output. A panel's piece (24 KB) stays in the first-level cache while
//           all blocks of the band go past it, and the next one is asked for meanwhile: weights are read once per task,
//           from wherever they are.

inline constexpr int64_t frame_piece = 192;

template <class T>
struct FrameTask {
  using V = F32;
  using S = float;
  using R = V::R;
  static constexpr int L = V::L, MR = V::channels_rows, HALF = MR / 2, NV = 2;
  static_assert(HALF <= frame_least_row && frame_panel % (NV * L) == 0 && frame_channels % L == 0);

  const ConvFrame& p;
  const FramePlan& plan;

  struct Block {
    int64_t row, column;
    bool half;
  };
  // Calls with every block of rows [0, rows).
  template <class Call>
  void blocks(int64_t rows, Call call) const {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t j = 0;
      for (; j + MR <= p.OW; j += MR) call(Block{i, j, false});
      const int64_t rest = p.OW - j;
      if (rest > HALF && p.OW >= MR)
        call(Block{i, p.OW - MR, false});
      else if (rest > 0)
        for (int64_t at = rest; at > 0; at -= HALF) call(Block{i, p.OW - max_of<int64_t>(at, HALF), true});
    }
  }

  template <class E = S>
  static const E* from(const ConvFrame::View& v, int64_t n, int64_t i, int64_t j) {
    return static_cast<const E*>(v.data) + n * v.n + i * v.h + j * v.w;
  }

  // Rows of the frame that output rows [r0, r0 + rows) see.
  void copy_band(int64_t n, int64_t r0, int64_t height, int64_t width, S* to) const {
    const int64_t C = p.C;
    for (int64_t i = 0; i < height; ++i, to += width * C) {
      const int64_t y = r0 * p.stride_h - p.padding_h + i;
      if (y < 0 || y >= p.H) {
        memset(to, 0, static_cast<size_t>(width * C) * sizeof(S));
        continue;
      }
      const int64_t left = min_of(p.padding_w, width), inside = min_of(width - left, p.W);
      const int64_t right = width - left - inside;
      memset(to, 0, static_cast<size_t>(left * C) * sizeof(S));
      const T* const row = from<T>(p.frame, n, y, 0);
      if (p.frame.w == C) {
        widen(row, to + left * C, inside * C);
      } else {
        for (int64_t j = 0; j < inside; ++j) widen(row + j * p.frame.w, to + (left + j) * C, C);
      }
      memset(to + (left + inside) * C, 0, static_cast<size_t>(right * C) * sizeof(S));
    }
  }
  static void widen(const T* run, S* to, int64_t count) {
    if constexpr (sizeof(T) == sizeof(S)) {
      copy_row(to, run, static_cast<size_t>(count) * sizeof(S));
    } else {
      int64_t i = 0;
      for (; i + L <= count; i += L) V::store(to + i, V::load(run + i));
      for (; i < count; ++i) to[i] = V::scalar(run[i]);
    }
  }

  void run(int64_t n, int64_t r0, int64_t rows, int64_t panel0, int64_t panel1) const {
    const int64_t width = (p.OW - 1) * p.stride_w + p.kernel_w, height = (rows - 1) * p.stride_h + p.kernel_h;
    const int64_t C = p.C, lda = p.stride_w * C, pitch = width * C;
    int64_t count = 0;
    blocks(rows, [&](const Block&) { ++count; });
    const int64_t band_size = round_up(height * pitch, 16);
    S* const band = static_cast<S*>(scratch(1, static_cast<size_t>(band_size + count * MR * frame_panel) * sizeof(S)));
    S* const sums = band + band_size;
    copy_band(n, r0, height, width, band);

    const int64_t run_length = p.kernel_w * C, depth = p.depth();
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const S* b = p.panels + panel * depth * frame_panel;
      for (int64_t k = 0; k < depth;) {
        // The rest of a row of the kernel, or of the state, in even pieces.
        const bool of_state = k >= p.kernel_h * run_length;
        const int64_t i = k / run_length, done = of_state ? k - p.kernel_h * run_length : k % run_length;
        const int64_t all = of_state ? p.O : run_length, pieces = (all + frame_piece - 1) / frame_piece;
        const int64_t piece = min_of((all + pieces - 1) / pieces, all - done);
        const bool first = k == 0, last = k + piece == depth;
        const S* const next = b + piece * frame_panel;
        const int64_t ahead = panel + 1 == panel1 && last ? 0 : piece * frame_panel;
        const int64_t share = round_up((ahead + count - 1) / count, 16);
        int64_t asked = 0;
        S* sum = sums;
        blocks(rows, [&](const Block& at) {
          const S* a = band + (at.row * p.stride_h + i) * pitch + at.column * lda + done;
          if (of_state) a = from(p.state, n, r0 + at.row, at.column) + done;
          for (const int64_t until = min_of(asked + share, ahead); asked < until; asked += 16)
            __builtin_prefetch(next + asked, 0, 2);
          multiply(at.half, a, of_state ? p.state.w : lda, b, piece, sum, !first);
          if (last) finish(at, sum, n, r0, panel * frame_panel);
          sum += (at.half ? HALF : MR) * frame_panel;
        });
        k += piece;
        b = next;
      }
    }
  }

  static void multiply(bool half, const S* a, int64_t lda, const S* b, int64_t count, S* sums, bool resume) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < frame_panel; v += NV * L)
      half ? step_block<V, HALF, NV, frame_panel>(a, lda, b + v, count, sums + v, resume)
           : step_block<V, MR, NV, frame_panel>(a, lda, b + v, count, sums + v, resume);
  }

  void finish(const Block& at, const S* sums, int64_t n, int64_t r0, int64_t o0) const {
    const int64_t present = min_of(frame_panel, p.O - o0);
    const R alpha = V::set1(p.alpha);
    for (int64_t m = 0; m < (at.half ? HALF : MR); ++m, sums += frame_panel) {
      const int64_t i = r0 + at.row, j = at.column + m, place = ((n * p.OH + i) * p.OW + j) * p.O + o0;
      const T* const residual = p.residual.data ? from<T>(p.residual, n, i, j) + o0 : nullptr;
      for (int64_t v = 0; v < present; v += L) {
        R value = V::load(sums + v);
        if (p.bias) value = V::add(value, V::load(p.bias + o0 + v));
        if (p.recurrent) {
          value = V::mul(value, alpha);
          V::store(p.last + place + v, value);
        }
        if (p.scale) value = V::fma(V::load(p.scale + o0 + v), value, V::load(p.shift + o0 + v));
        if (residual) value = V::add(value, V::load(residual + v));
        if (p.relu) value = V::relu(value);
        V::store(static_cast<T*>(p.y) + place + v, value);
      }
    }
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

void conv_frame(const ConvFrame& p, const FramePlan& plan, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return FrameTask<float>::run_all(p, plan, parallel);
    case DType::bf16: return FrameTask<bf16_t>::run_all(p, plan, parallel);
    default: return FrameTask<f16_t>::run_all(p, plan, parallel);
  }
}
