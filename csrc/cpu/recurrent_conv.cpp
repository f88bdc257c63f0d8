// recurrent_conv on the CPU: choice of instruction set and plan.
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "common/recurrent_conv_chunk_choice.h"
#include "recurrent_conv_kernels.h"

namespace rcu_ops::cpu {

namespace {

#include "scalar.h"

bool channels_contiguous(const Scan& p) {
  const View& v = p.y.data ? p.y : p.x;
  if (!v.data) return false;
  return v.c == 1 && !(v.w == 1 && p.H * p.W > 1 && (p.H == 1 || v.h == p.W));
}

void scan_as(Isa isa, const Scan& p, const Plan& plan, const Parallel& parallel) {
  isa = isa_for(isa, p.dtype);
#if defined(__x86_64__)
#if defined(__linux__)
  if (isa == Isa::amx && p.dtype == DType::bf16) return amx::scan(p, plan, parallel);
#endif
  if (isa >= Isa::avx512_bf16 && p.dtype == DType::bf16) return avx512_bf16::scan(p, plan, parallel);
  if (isa >= Isa::avx512) return avx512::scan(p, plan, parallel);
  if (isa == Isa::avx2) return avx2::scan(p, plan, parallel);
#endif
  portable::scan(p, plan, parallel);
}

}  // namespace

namespace {

PlanInput plan_input(const Scan& p, int threads) {
  PlanInput in;
  in.columns = p.N * p.G * p.H * p.W;
  in.C = p.C;
  in.T = p.T;
  in.dtype = p.dtype;
  in.threads = threads;
  in.channels_contiguous = channels_contiguous(p);
  in.dense_channels = (!p.x.data || p.x.c == 1) && (!p.y.data || p.y.c == 1) &&
                      (!p.residual.data || p.residual.c == 1) && p.first.c == 1 &&
                      (p.last_kind == Last::none || (p.last.c == 1 && p.last.dtype == DType::f32));
  in.single_product = p.T == 1 && p.init == Init::state && p.last_kind != Last::projected;
  return in;
}

void plain_scan(const Scan& p, const Parallel& parallel) {
  if (p.N * p.G * p.H * p.W == 0) return;
  const Isa isa = current_isa();
  scan_as(isa, p, plan_scan(plan_input(p, parallel.threads), isa), parallel);
}

// The time-parallel form. With M = alpha W, chunks j = 0 .. J-1 of L frames, and a_j what the frames before a chunk add
// to its first frame:
//
//   1. local ends d_j of chunks 0 .. J-2, all at once, with a_0 from the given state and a_j = 0
//   2. e_0 = d_0, e_j = M^L e_{j-1} + d_j: the true ends
//   3. a_j = W e_{j-1}, all at once, and the chunks again, now with outputs
//
// The errors of W^L enter every chunk alike and would add up, unlike those of single frames: powers, ends and sums are
// fp64. Every step is itself a scan or a product in the form of one.
void chunked_scan(Scan p, int64_t L, const Parallel& parallel) {
  constexpr DType state = DType::f64;
  const int64_t C = p.C, P = p.H * p.W, J = ceil_div(p.T, L), size = p.N * C * P;
  const bool by_channel = channels_contiguous(p);
  if (p.reverse) {
    for (View* v : {&p.x, &p.y, &p.residual}) {
      if (!v->data) continue;
      const int64_t bytes = v->dtype == DType::f64 ? 8 : v->dtype == DType::f32 ? 4 : 2;
      v->data = static_cast<char*>(v->data) + (p.T - 1) * v->t * bytes;
      v->t = -v->t;
    }
    p.reverse = false;
  }
  // added [J], ends [J-1], true ends [J-1]; then W, its power and two spare matrices.
  const std::unique_ptr<double[]> memory(new double[(3 * J - 2) * size + 4 * C * C]);
  double* const added = memory.get();
  double* const ends = added + J * size;
  double* const true_ends = ends + (J - 1) * size;
  double* const weight = true_ends + (J - 1) * size;
  const auto states = [&](double* data) {
    View v{.data = data, .dtype = state, .n = C * P, .c = P, .t = 0, .h = p.W, .w = 1, .g = size};
    if (by_channel) v.c = 1, v.w = C, v.h = p.W * C;
    return v;
  };
  for (int64_t o = 0; o < C; ++o)
    for (int64_t i = 0; i < C; ++i) weight[o * C + i] = load_any(p.weight, p.dtype, o * p.weight_out + i * p.weight_in);

  const auto product = [&](const double* w, View from, View to, int64_t N, int64_t G, int64_t H, int64_t W) {
    Scan s;
    s.N = N, s.C = C, s.T = 1, s.H = H, s.W = W, s.G = G;
    s.dtype = state;
    s.weight = w, s.weight_out = C, s.weight_in = 1;
    s.init = Init::state, s.first = from;
    s.last_kind = Last::state, s.last = to;
    plain_scan(s, parallel);
  };

  // a_0, such that alpha (a_0 + x) is the first frame.
  for (int64_t i = 0; i < J * size; ++i) added[i] = -0.0;
  if (p.init == Init::state) {
    product(weight, p.first, states(added), p.N, 1, p.H, p.W);
  } else if (p.init == Init::added || p.alpha_first != p.alpha) {
    const View a = states(added), from = p.init == Init::added ? p.first : p.x;
    const double factor = p.init == Init::added ? 1 : p.alpha_first / p.alpha - 1;
    for (int64_t n = 0; n < p.N; ++n)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t h = 0; h < p.H; ++h)
          for (int64_t w = 0; w < p.W; ++w)
            added[n * a.n + c * a.c + h * a.h + w * a.w] =
                factor * load_any(from.data, from.dtype, n * from.n + c * from.c + h * from.h + w * from.w);
  }

  Scan chunks = p;
  chunks.G = J - 1;
  chunks.T = L;
  chunks.x.g = L * p.x.t, chunks.y.g = L * p.y.t, chunks.residual.g = L * p.residual.t;
  chunks.init = Init::added;
  chunks.first = states(added);
  chunks.alpha_first = chunks.alpha_final = p.alpha;
  Scan pass = chunks;
  pass.y = pass.residual = {};
  pass.scale = pass.shift = nullptr;
  pass.last_kind = Last::state;
  pass.last = states(ends);
  plain_scan(pass, parallel);

  if (J > 2) {
    double* power = weight + C * C;
    double* square = power + C * C;
    double* spare = square + C * C;
    const auto matrix = [&](double* data) { return View{.data = data, .dtype = state, .c = C, .w = 1}; };
    for (int64_t i = 0; i < C * C; ++i) square[i] = p.alpha * weight[i];
    bool have = false;
    for (int64_t bits = L;;) {
      if (bits & 1) {
        if (have) {
          product(square, matrix(power), matrix(spare), 1, 1, 1, C);
          std::swap(power, spare);
        } else {
          std::memcpy(power, square, C * C * sizeof(double));
          have = true;
        }
      }
      if ((bits >>= 1) == 0) break;
      product(square, matrix(square), matrix(spare), 1, 1, 1, C);
      std::swap(square, spare);
    }
    Scan carry;
    carry.N = p.N, carry.C = C, carry.T = J - 1, carry.H = p.H, carry.W = p.W;
    carry.dtype = state;
    carry.x = states(ends), carry.y = states(true_ends);
    carry.x.t = carry.y.t = size;
    carry.weight = power, carry.weight_out = C, carry.weight_in = 1;
    plain_scan(carry, parallel);
  } else {
    std::memcpy(true_ends, ends, size * sizeof(double));
  }
  product(weight, states(true_ends), states(added + size), p.N, J - 1, p.H, p.W);

  chunks.last_kind = Last::none;
  plain_scan(chunks, parallel);
  Scan rest = p;
  rest.T = p.T - (J - 1) * L;
  const auto skip = [&](View& v) {
    const int64_t bytes = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
    if (v.data) v.data = static_cast<char*>(v.data) + (J - 1) * L * v.t * bytes;
  };
  skip(rest.x), skip(rest.y), skip(rest.residual);
  rest.init = Init::added;
  rest.first = states(added + (J - 1) * size);
  rest.alpha_first = rest.T == 1 ? p.alpha_final : p.alpha;
  plain_scan(rest, parallel);
}

int64_t chunk_of(const Scan& p, int threads) {
  if (!can_be_chunked(p)) return 0;
  if (const auto forced = forced_chunk()) return *forced < p.T ? *forced : 0;
  return plan_scan(plan_input(p, threads), current_isa()).chunk;
}

}  // namespace

void scan(const Scan& p, const Parallel& parallel) {
  const int64_t chunk = chunk_of(p, parallel.threads);
  if (!chunk)
    plain_scan(p, parallel);
  else
    chunked_scan(p, chunk, parallel);
}

void weight_grad(const WeightGrad& p, const Parallel& parallel) {
  // No position, or a single frame with nothing before it: a sum of nothing. The kernels want at least one row.
  if ((p.T - (p.first.data ? 0 : 1)) * p.N * p.H * p.W == 0) {
    const size_t size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    memset(p.dweight, 0, static_cast<size_t>(p.C * p.C) * size);
    return;
  }
  [[maybe_unused]] const Isa isa = isa_for(current_isa(), p.dtype);
#if defined(__x86_64__)
  // Not with the matrix unit: its processors multiply pairs at half the rate of fp32 (see cpu_isa.h).
  if (isa == Isa::avx512_bf16 && p.dtype == DType::bf16) return avx512_bf16::weight_grad(p, parallel);
  if (isa >= Isa::avx512) return avx512::weight_grad(p, parallel);
  if (isa == Isa::avx2) return avx2::weight_grad(p, parallel);
#endif
  portable::weight_grad(p, parallel);
}

void conv_frame(const ConvFrame& p, const Parallel& parallel) {
  if (p.N * p.OH * p.OW == 0) return;
  const FramePlan plan = plan_frame(p, parallel.threads);
  [[maybe_unused]] const Isa isa = current_isa();
#if defined(__x86_64__)
  if (p.pairs) return avx512_bf16::conv_frame(p, plan, parallel);
  if (isa >= Isa::avx512) return avx512::conv_frame(p, plan, parallel);
  if (isa == Isa::avx2) return avx2::conv_frame(p, plan, parallel);
#endif
  portable::conv_frame(p, plan, parallel);
}

}  // namespace rcu_ops::cpu
