// temporal_cycle_loss: what all devices' kernels agree on. No torch, no CUDA.
#pragma once

#include "cycle_consistency.h"

namespace rcu_ops {

// The problems that a loss, or its gradients, is made of, one after the other. As gradients they run in the opposite
// order: `back` leaves the gradient of the soft neighbours in d_soft, and a's as keys in da, to which `there` adds.
struct LossParts {
  Alignment there, back;
};

static inline LossParts parts_of_loss(const Alignment& p) {
  const bool backward = p.kind == Align::loss_backward;
  LossParts parts{p, p};
  Alignment &there = parts.there, &back = parts.back;
  there.kind = backward ? Align::soft_backward : Align::soft;
  there.loss = nullptr, there.grad_loss = nullptr;
  back.kind = backward ? Align::back_backward : Align::back;
  back.a = {p.soft, p.T * p.C, p.C, 1}, back.soft = nullptr;
  back.b = p.a, back.S = p.T, back.mask_b = p.mask_a, back.mask_through = p.mask_b, back.frames_through = p.S;
  if (p.distances) back.distances = static_cast<char*>(p.distances) + p.S * state_size(p.dtype);
  if (backward) {
    back.da = p.d_soft, back.db = p.da;
    there.soft = nullptr, there.grad = {p.d_soft, p.T * p.C, p.C, 1}, there.add_to_da = true;
  }
  return parts;
}

// Kernels are compiled once per instruction set: these are each file's own.
namespace {

// Of one frame, `away` from the mean of where it lands: its loss, and that loss's gradients.
template <class S>
struct Landing {
  const bool regression;
  const S weight, least;
  RCU_OPS_DEVICE explicit Landing(const Alignment& p)
      : regression(p.regression),
        weight(static_cast<S>(p.variance_weight) / 2),
        least(static_cast<S>(p.min_variance)) {}

  template <class Log>
  RCU_OPS_DEVICE S loss(S log_probability, S away, S variance, Log log) const {
    if (!regression) return -log_probability;
    const S at_least = variance < least ? least : variance;  // NaN stays
    return away * away / at_least + weight * log(at_least);
  }
  RCU_OPS_DEVICE void gradients(S grad, S away, S variance, S& g, S& g_mean, S& g_variance) const {
    g = regression ? S(0) : -grad;
    const S at_least = variance < least ? least : variance;
    g_mean = regression ? grad * (-2 * away / at_least) : S(0);
    g_variance = regression && variance >= least ? grad * (weight - away * away / at_least) / at_least : S(0);
  }
};

template <class S>
RCU_OPS_DEVICE S grad_of_loss(const Alignment& p, int64_t n, int64_t t) {
  return static_cast<const S*>(p.grad_loss)[n * p.grad_loss_n + t * p.grad_loss_t];
}

}  // namespace
}  // namespace rcu_ops
