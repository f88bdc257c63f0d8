// What bindings of operators around recurrent_conv take from its own.
#pragma once

#include "bindings.h"
#include "common/recurrent_conv.h"

namespace rcu_ops::bindings {

View sequence_view(const Tensor& tensor);  // [N,C,T,H,W]

std::tuple<Tensor, Tensor> recurrent_conv(Tensor x, Tensor weight, std::optional<Tensor> h0, bool mean, bool reverse);
std::tuple<Tensor, Tensor, Tensor> recurrent_conv_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_h_n,
                                                           Tensor h, Tensor weight, std::optional<Tensor> h0, bool mean,
                                                           bool reverse, bool need_weight_grad);

}  // namespace rcu_ops::bindings
