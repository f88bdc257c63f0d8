// fast_gru: the gradients of its steps. The steps run backwards through the states, each by three products and the
// passes between them, or all in one launch; what is left then are products of all steps at once. Few weights on the CPU
// are left to a kernel that makes all of that, column by column.
#include "bindings_fast_gru.h"

namespace rcu_ops::bindings::gru {

namespace {

// Of arguments that are checked.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients(
    const Problem& p, std::optional<Tensor> grad_o, const std::optional<Tensor>& grad_o_n, const Tensor& x,
    const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx, const Tensor& vo,
    const std::optional<Tensor>& o0, const Tensor& o, const Tensor& hidden, const Tensor& gates, bool need_x,
    bool need_weights) {
  const Weights weight = split(ux, uo, w, vx, vo);
  const int64_t C = p.C;
  if (gradients_in_panels(p, x)) {
    const Tensor dx = need_x ? empty_sequence(p, x, p.innermost) : empty_of(x, {0});
    const Tensor do0 = o0 ? empty_state(p, x, o0->scalar_type(), p.innermost) : empty_of(x, {0});
    std::array<Tensor, weights> d{ux, uo, w, vx, vo};
    for (Tensor& t : d) t = need_weights ? empty_of(x, t.sizes(), p.scalar) : empty_of(x, {0});
    gradients_by_columns(p, x, {ux, uo, w, vx, vo}, o0, o, saved_in(p, hidden, gates), grad_o, grad_o_n, dx, do0, d);
    return {dx, d[0], d[1], d[2], d[3], d[4], do0};
  }
  if (in_fp32(p, x)) {
    const auto wide = [](const auto& tensor) { return in_type(tensor, ScalarType::Float); };
    const auto narrow = [&](const Tensor& tensor) { return in_type(tensor, p.scalar); };
    const auto [dx, dux, duo, dw, dvx, dvo, do0] =
        gradients(as_fp32(p), wide(grad_o), grad_o_n, wide(x), wide(ux), wide(uo), wide(w), wide(vx), wide(vo),
                  wide(o0), wide(o), wide(hidden), wide(gates), need_x, need_weights);
    return {narrow(dx),
            narrow(dux),
            narrow(duo),
            narrow(dw),
            narrow(dvx),
            narrow(dvo),
            in_type(do0, o0 ? o0->scalar_type() : p.scalar)};
  }

  if (grad_o && !adjacent(p, *grad_o)) {
    const Tensor laid_out = empty_sequence(p, x, p.by_column);
    copy_sequence(laid_out, *grad_o);
    grad_o = laid_out;
  }
  // As matrices lie; copied at the end where the caller's lie differently.
  Tensor dx = need_x ? empty_sequence(p, x, p.by_column) : empty_of(x, {0});
  Tensor do0 = o0 ? empty_state(p, x, o0->scalar_type(), p.by_column) : empty_of(x, {0});
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    return need_weights ? empty_of(x, shape) : empty_of(x, {0});
  };
  Tensor dux = gradient({2 * p.R, C}), duo = gradient({2 * p.R, C}), dw = gradient({2, C, p.R}), dvx = gradient({C, C}),
         dvo = gradient({C, C});
  const int64_t M = p.step_columns(), S = p.columns();
  if (S == 0)
    for (Tensor* t : {&dux, &duo, &dw, &dvx, &dvo}) torch::stable::zero_(*t);
  const auto result = [&] {
    if (p.copied() && need_x) {
      const Tensor inner = dx;
      copy_sequence(dx = empty_sequence(p, x, p.innermost), inner);
    }
    if (p.copied() && o0) {
      const Tensor inner = do0;
      copy_sequence(as_sequence(do0 = empty_state(p, x, o0->scalar_type(), p.innermost)), as_sequence(inner));
    }
    return std::tuple{dx, dux, duo, dw, dvx, dvo, do0};
  };
  if (M == 0) return result();

  Temporaries temporaries(p, x,
                          Temporaries::bytes_of(C, M, p.state) + 2 * Temporaries::bytes_of(C, M, p.scalar) +
                              6 * Temporaries::bytes_of(C, S, p.scalar) + Temporaries::bytes_of(2 * p.R, S, p.scalar));
  const Matrix carry = temporaries.take(C, M, p.state);
  if (grad_o_n) {
    copy_sequence(carry.sequence(p), as_sequence(*grad_o_n));
  } else {
    Tensor memory = carry.tensor();
    torch::stable::zero_(memory);
  }
  const Plane none{};
  const auto grad_plane = [&](int64_t k) { return grad_o ? plane_of(clip(*grad_o, k)) : none; };
  Matrix state_product;  // U_o^T du of the step after

  if (S > 0) {
    Matrix before;  // the state before each step
    if (!o0) {
      before = as_matrix(p, clips(o, 0, p.steps), temporaries);
    } else {
      before = temporaries.take(C, S, p.scalar);
      copy_sequence(before.step(p, 0).sequence(p), as_sequence(*o0));
      if (p.steps > 1) copy_sequence(before.part(true, M, S - M).sequence(p), clips(o, 0, p.steps - 1));
    }
    const Tensor steps = clips(x, p.first, p.steps);
    const Matrix inputs = need_weights ? as_matrix(p, steps, temporaries) : Matrix{};
    const Saved s = saved_in(p, hidden, gates);
    const Matrix gated = temporaries.take(C, S, p.scalar);
    const Matrix du = temporaries.take(2 * p.R, S, p.scalar), dc = temporaries.take(C, S, p.scalar),
                 dr = temporaries.take(C, S, p.scalar), dz = temporaries.take(C, S, p.scalar);
    const auto one_by_one = [&] {
      const Matrix q = temporaries.take(C, M, p.scalar);
      // U_o^T du joins the gradient of the state before: at once, or by the next pass.
      const bool at_once = !x.is_cuda() && p.state == p.scalar;
      const Matrix from_later = at_once ? Matrix{} : temporaries.take(C, M, p.scalar);
      const Tensor uo_t = transposed(uo), vo_t = transposed(vo), wr_t = transposed(weight.wr),
                   wz_t = transposed(weight.wz);
      for (int64_t k = p.steps - 1; k >= 0; --k) {
        const auto at = [&](const Matrix& m) { return m.step(p, k).plane(p); };
        run(over(p, Pass::d_output, C, M,
                 {carry.plane(p), state_product.data ? state_product.plane(p) : none, grad_plane(p.first + k), at(s.z),
                  at(s.candidate), at(before), at(dc), at(dz)}),
            x);
        exact_product(q, vo_t, dc.step(p, k));
        run(over(p, Pass::d_gates, C, M, {carry.plane(p), q.plane(p), at(s.r), at(before), at(dr), at(gated)}), x);
        const Matrix now = du.step(p, k);
        exact_product(now.part(false, 0, p.R), wr_t, dr.step(p, k));
        exact_product(now.part(false, p.R, p.R), wz_t, dz.step(p, k));
        run(over(p, Pass::d_hidden, 2 * p.R, M, {now.plane(p), at(s.hidden)}), x);
        if (at_once) {
          exact_product(carry, uo_t, now, true);
        } else {
          product(from_later, uo_t, now);
          state_product = from_later;
        }
      }
    };
#ifdef RCU_OPS_WITH_CUDA
    // Without the forward pass's plan matrices may lie in the other order.
    const auto plan = p.persistent ? one_launch(p, x, true) : std::nullopt;
    const auto by_blocks = p.by_blocks ? columns_by_blocks(p, x, true) : std::nullopt;
    if (by_blocks)
      gradients_by_blocks(p, *by_blocks, weight, w, s, before, grad_o, carry, {du, dc, dr, dz, gated});
    else if (plan)
      gradients_in_one_launch(p, *plan, weight, w, s, before, grad_o, carry, {du, dc, dr, dz, gated});
    else
#endif
      one_by_one();
    if (need_weights) {
      outer_product(p, dux, du, inputs);
      outer_product(p, duo, du, before);
      outer_product(p, torch::stable::select(dw, 0, 0), dr, s.hidden.part(false, 0, p.R));
      outer_product(p, torch::stable::select(dw, 0, 1), dz, s.hidden.part(false, p.R, p.R));
      outer_product(p, dvx, dc, inputs);
      outer_product(p, dvo, dc, gated);
    }
    if (need_x) {  // dr and dz are free now
      const Matrix beside = x.is_cuda() ? dz : Matrix{};
      exact_product(dr, transposed(ux), du);
      if (beside.data)
        add(p, beside, dr, transposed(vx), dc);
      else
        exact_product(dr, transposed(vx), dc, true);
      if (p.N < p.steps) {  // all steps of a sample, or all samples of a step
        for (int64_t n = 0; n < p.N; ++n) {
          const Tensor some = torch::stable::select(dx, 0, n);
          const auto of_sample = [&](const Matrix& m) {
            Plane plane = m.plane(p);
            plane.data = static_cast<char*>(plane.data) + n * plane.segment * m.element();
            plane.segment *= p.N;
            return plane;
          };
          const Plane to{static_cast<char*>(pointer(some)) + p.first * some.stride(0) * dr.element(), some.stride(1),
                         some.stride(0)};
          run(over(p, Pass::sum, C, p.steps * p.P, {to, none, of_sample(dr), beside.data ? of_sample(beside) : none}),
              x);
        }
      } else {
        for (int64_t k = 0; k < p.steps; ++k)
          run(over(p, Pass::sum, C, M,
                   {plane_of(clip(dx, p.first + k)), none, dr.step(p, k).plane(p),
                    beside.data ? beside.step(p, k).plane(p) : none}),
              x);
      }
    }
  }
  const Plane last_product = state_product.data ? state_product.plane(p) : none;
  if (o0) {
    Elementwise sum = over(p, Pass::sum, C, M, {plane_of(do0), carry.plane(p), last_product});
    sum.wide = o0->scalar_type() == p.state;
    run(sum, x);
  } else if (need_x) {
    run(over(p, Pass::sum, C, M, {plane_of(clip(dx, 0)), carry.plane(p), last_product, grad_plane(0)}), x);
  }
  return result();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_o, std::optional<Tensor> grad_o_n, Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx,
    Tensor vo, std::optional<Tensor> o0, Tensor o, Tensor hidden, Tensor gates, bool need_x, bool need_weights) {
  const Problem p = checked(x, ux, uo, w, vx, vo, o0);
  const auto [N, K, C, L, H, W] = std::array{p.N, p.K, p.C, p.sizes[0], p.sizes[1], p.sizes[2]};
  check_shape("o", o, {N, K, C, L, H, W}, "of x");
  check_dtype("o", o, p.scalar);
  check_device("o", o, x, "x");
  check(grad_o || grad_o_n, "grad_o, grad_o_n: expected at least one of them, got none");
  if (grad_o) {
    check_shape("grad_o", *grad_o, {N, K, C, L, H, W}, "of x");
    check_dtype("grad_o", *grad_o, p.scalar);
    check_device("grad_o", *grad_o, x, "x");
  }
  if (grad_o_n) {
    check_shape("grad_o_n", *grad_o_n, {N, C, L, H, W}, "[N,C,L,H,W]");
    check_dtype("grad_o_n", *grad_o_n, p.state);
    check_device("grad_o_n", *grad_o_n, x, "x");
  }
  check_shape("hidden", hidden, {2 * p.R * p.columns()}, "as the forward pass returns it");
  check_shape("gates", gates, {3 * C * p.columns()}, "as the forward pass returns it");
  for (const Tensor* tensor : {&hidden, &gates}) {
    check_dtype("hidden, gates", *tensor, p.scalar);
    check_device("hidden, gates", *tensor, x, "x");
  }
  hidden = contiguous_of(hidden);
  gates = contiguous_of(gates);
  return gradients(p, grad_o, grad_o_n, x, ux, uo, w, vx, vo, o0, o, hidden, gates, need_x, need_weights);
}

}  // namespace rcu_ops::bindings::gru
