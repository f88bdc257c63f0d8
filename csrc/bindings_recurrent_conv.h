// What bindings of operators around recurrent_conv take from its own.
#pragma once

#include "bindings.h"
#include "common/recurrent_conv.h"

namespace rcu_ops::bindings {

View sequence_view(const Tensor& tensor);  // [N,C,T,H,W]

std::tuple<Tensor, Tensor> recurrent_conv(Tensor x, Tensor weight, std::optional<Tensor> h0, bool mean, bool reverse);
// With batch normalisation's statistics of h on the way out, where the scan's kernel takes them: `partial` is what it
// fills, of parts of `columns` columns each; columns = 0 where it takes none.
std::tuple<Tensor, Tensor> recurrent_conv_with_statistics(const Tensor& x, const Tensor& weight,
                                                          const std::optional<Tensor>& h0, bool mean,
                                                          std::optional<Tensor>& partial, int64_t& columns);
// Forward in time, and on the CPU dx is written over grad_h, which is as empty_like(h).
std::tuple<Tensor, Tensor, Tensor> recurrent_conv_backward_over(const Tensor& grad_h,
                                                                const std::optional<Tensor>& grad_h_n, const Tensor& h,
                                                                const Tensor& weight, const std::optional<Tensor>& h0,
                                                                bool mean, bool need_weight_grad);
// Forward in time, with batch normalisation's gradient (norm's tables, of h and of dz, the gradient of what was
// normalised) on the way in; nothing where the scan's kernel does not take it.
std::optional<std::tuple<Tensor, Tensor, Tensor>> recurrent_conv_backward_of_norm(
    const Tensor& dz, const std::optional<Tensor>& grad_h_n, const Tensor& h, const Tensor& weight,
    const std::optional<Tensor>& h0, bool mean, bool need_weight_grad, const ScanNorm& norm);

}  // namespace rcu_ops::bindings
