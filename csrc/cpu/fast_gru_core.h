// fast_gru's passes over vectors. Included inside the namespace of an instruction set, after vector.h.
//
// Work.   Each element is read and written once, by one task; what is in and out is changed in place. Tasks are ranges
//         of the flattened rows x segments x length. Every element goes through the same operations wherever a range or
//         a vector ends, so results do not depend on the number of threads.
// Bound.  By memory, or in cache by one or two divisions per element (sigmoid, tanh).

// visit(offset of the run's first element in each plane, elements in the run) for all runs of [begin, end).
template <class Visit>
static inline void for_runs(const fast_gru::Elementwise& p, int64_t begin, int64_t end, Visit visit) {
  int64_t offset[fast_gru::most_planes];
  while (begin < end) {
    const int64_t run = begin / p.length, first = begin % p.length, count = min_of(p.length - first, end - begin);
    for (int i = 0; i < fast_gru::most_planes; ++i)
      offset[i] = run / p.segments * p.plane[i].row + run % p.segments * p.plane[i].segment + first;
    visit(offset, count);
    begin += count;
  }
}

template <class T>
static void run_pass(const fast_gru::Elementwise& p, int64_t begin, int64_t end) {
  using fast_gru::Pass;
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using V = typename Vector<S>::R;
  constexpr int L = Vector<S>::L;

  for_runs(p, begin, end, [&](const int64_t* offset, int64_t length) {
    const auto data = [&](int i) { return static_cast<T*>(p.plane[i].data) + offset[i]; };
    const auto wide = [&](int i) { return static_cast<S*>(p.plane[i].data) + offset[i]; };
    // body(i, count): elements i .. i + count of the run, the count known to the compiler but for the last ones.
    const auto each = [&](auto body) {
      int64_t i = 0;
      for (; i + L <= length; i += L) body(i, std::integral_constant<int, L>{});
      if (i < length) body(i, static_cast<int>(length - i));
    };
    const auto get = [](const auto* from, int64_t i, int count) { return load_vector<S>(from + i, count); };
    const auto put = [](auto* to, int64_t i, V v, int count) { store_vector<S>(to + i, v, count); };

    switch (p.pass) {
      case Pass::hidden: {
        T* h = data(0);
        const T* product = p.plane[1].data ? data(1) : nullptr;
        each([=](int64_t i, auto n) {
          V v = get(h, i, n);
          if (product) v += get(product, i, n);
          put(h, i, v < 0 ? V{} : v, n);  // NaN stays
        });
        break;
      }
      case Pass::gates: {
        T *r = data(0), *z = data(1), *gated = data(3);
        const S* state = wide(2);
        if (!p.keep) {
          each([=](int64_t i, auto n) { put(gated, i, sigmoid_of(get(r, i, n)) * get(state, i, n), n); });
          break;
        }
        each([=](int64_t i, auto n) {
          const V reset = sigmoid_of(get(r, i, n));
          put(r, i, reset, n);
          put(gated, i, reset * get(state, i, n), n);
          put(z, i, sigmoid_of(get(z, i, n)), n);
        });
        break;
      }
      case Pass::output: {
        T *c = data(0), *low = p.plane[4].data ? data(4) : nullptr, *out = p.plane[5].data ? data(5) : nullptr;
        const T* product = p.plane[1].data ? data(1) : nullptr;
        const auto found = [=](int64_t i, auto n) {
          V v = get(c, i, n);
          if (product) v += get(product, i, n);
          return tanh_of(v);
        };
        const T* z = data(2);
        S* state = wide(3);
        const bool keep = p.keep;
        each([=](int64_t i, auto n) {
          const V candidate = found(i, n);
          V update = get(z, i, n);
          keep ? put(c, i, candidate, n) : void(update = sigmoid_of(update));
          const V next = (1 - update) * get(state, i, n) + update * candidate;
          put(state, i, next, n);
          if (out) put(out, i, next, n);
          if (low) put(low, i, next, n);
        });
        break;
      }
      case Pass::d_output: {
        S* carry = wide(0);
        const T *product = p.plane[1].data ? data(1) : nullptr, *grad = p.plane[2].data ? data(2) : nullptr;
        const T *z = data(3), *c = data(4), *before = data(5);
        T *dc = data(6), *dz = data(7);
        each([=](int64_t i, auto n) {
          V g = get(carry, i, n);
          if (product) g += get(product, i, n);
          if (grad) g += get(grad, i, n);
          const V update = get(z, i, n), candidate = get(c, i, n);
          put(dc, i, g * update * (1 - candidate * candidate), n);
          put(dz, i, g * (candidate - get(before, i, n)) * update * (1 - update), n);
          put(carry, i, g * (1 - update), n);
        });
        break;
      }
      case Pass::d_gates: {
        S* carry = wide(0);
        const T *q = data(1), *r = data(2), *before = data(3);
        T *dr = data(4), *gated = data(5);
        each([=](int64_t i, auto n) {
          const V through = get(q, i, n), reset = get(r, i, n), state = get(before, i, n);
          put(dr, i, through * state * reset * (1 - reset), n);
          put(gated, i, reset * state, n);
          put(carry, i, get(carry, i, n) + through * reset, n);
        });
        break;
      }
      case Pass::d_hidden: {
        T* d = data(0);
        const T* h = data(1);
        each([=](int64_t i, auto n) { put(d, i, get(h, i, n) <= 0 ? V{} : get(d, i, n), n); });
        break;
      }
      case Pass::sum: {
        const S* a = p.plane[1].data ? wide(1) : nullptr;
        const T *b = p.plane[2].data ? data(2) : nullptr, *c = p.plane[3].data ? data(3) : nullptr;
        const auto add = [=](auto* out) {
          each([=](int64_t i, auto n) {
            V v{};
            if (a) v += get(a, i, n);
            if (b) v += get(b, i, n);
            if (c) v += get(c, i, n);
            put(out, i, v, n);
          });
        };
        p.wide ? add(wide(0)) : add(data(0));
        break;
      }
    }
  });
}

void elementwise_range(const fast_gru::Elementwise& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
#ifndef RCU_OPS_NO_F64
    case DType::f64: return run_pass<double>(p, begin, end);
#endif
    case DType::f32: return run_pass<float>(p, begin, end);
    case DType::bf16: return run_pass<bf16_t>(p, begin, end);
    default: return run_pass<f16_t>(p, begin, end);
  }
}
