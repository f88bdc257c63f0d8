// What every op's bindings share: checks for direct torch.ops callers, allocation, threads, scratch memory and streams.
//
// bindings_<op>.cpp are the only files that see torch. They register the op's kernels with PyTorch through LibTorch's
// stable ABI (the schemas are defined in Python, rcu_ops/ops), check arguments cheaply, allocate outputs and hand raw
// pointers to the kernels of the tensor's device. One binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/types.h"
#include "cpu/memory.h"
#ifdef RCU_OPS_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/scratch.h"

// Weak: a CPU-only torch does not have it, and the library must load there all the same.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace rcu_ops::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// ---- checks ----------------------------------------------------------------------------------------------------

// A part of a message. It becomes text where a message is made of it: checks that pass, several at every call, make
// none.
class Part {
 public:
  Part(const char* text) : kind_(Kind::text), text_(text) {}
  Part(int number) : Part(static_cast<int64_t>(number)) {}
  Part(size_t number) : Part(static_cast<int64_t>(number)) {}
  Part(int64_t number) : kind_(Kind::integer), integer_(number) {}
  Part(double number) : kind_(Kind::real), real_(number) {}
  Part(Sizes shape) : kind_(Kind::shape), shape_(shape) {}

  std::string str() const {
    switch (kind_) {
      case Kind::text: return text_;
      case Kind::integer: return std::to_string(integer_);
      case Kind::real: {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%g", real_);
        return digits;
      }
      case Kind::shape: break;
    }
    std::string text = "[";
    for (size_t i = 0; i < shape_.size(); ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
    return text + "]";
  }

 private:
  enum class Kind { text, integer, real, shape };
  Kind kind_;
  const char* text_ = nullptr;
  int64_t integer_ = 0;
  double real_ = 0;
  Sizes shape_;
};

[[noreturn, gnu::cold, gnu::noinline]] inline void refuse(std::initializer_list<Part> parts) {
  std::string message;
  for (const Part& part : parts) message += part.str();
  throw std::runtime_error(message);
}

template <class... Parts>
void check(bool ok, Parts... parts) {
  if (!ok) [[unlikely]]
    refuse({parts...});
}

inline const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
                        const char* what) {
  const Sizes sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected.begin()[i];
  check(same, name, ": expected shape ", what, " = ", Sizes(expected.begin(), expected.size()), ", got ", sizes);
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected dtype ", dtype_text(expected), ", got ",
        dtype_text(tensor.scalar_type()));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType one, ScalarType other) {
  check(tensor.scalar_type() == one || tensor.scalar_type() == other, name, ": expected dtype ", dtype_text(one),
        " or ", dtype_text(other), ", got ", dtype_text(tensor.scalar_type()));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        ": expected the device of ", like_name, ", got another one");
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  check(false, name, ": expected dtype Double, Float, BFloat16 or Half, got ", dtype_text(tensor.scalar_type()));
  return {};
}

inline ScalarType state_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- allocation ------------------------------------------------------------------------------------------------

// Whatever the kernel does with it. Asking for the mutable pointer makes the copy of a tensor that is copied on write
// (torch._lazy_clone), also where it is only read; what bindings write to they have made themselves, and it is no such
// tensor.
inline void* pointer(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

// A new tensor, on large pages where it is large.
inline Tensor as_new(Tensor tensor) {
  if (!tensor.is_cuda())
    cpu::ask_for_large_pages(pointer(tensor), static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

inline Tensor empty_as(const Tensor& like) { return as_new(torch::stable::empty_like(like)); }

// By the shim of this very operator: torch::stable::new_empty has it looked up by its name, which small calls notice.
inline Tensor empty_of(const Tensor& like, Sizes sizes, ScalarType dtype) {
  int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                   &number, nullptr, nullptr, 0, nullptr, &made));
  return as_new(Tensor(made));
}

// torch::stable::contiguous, which is looked up by its name, where there is something for it to do.
inline Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_of(like, Sizes(sizes.begin(), sizes.size()), dtype);
}

inline Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_of(like, sizes, like.scalar_type());
}

// ---- launching -------------------------------------------------------------------------------------------------

struct Tasks {
  static constexpr int64_t most = 64;  // shares
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  void (*task)(void*, int64_t);
  void* context;
  int64_t shares;
  Share share[most];
};

// Every thread has a share of neighbouring tasks, the same one in every call: what it wrote is in its cache when the
// next layer reads it. It takes them one by one, and then what is left of other shares, so that one slow core does not
// hold up the rest.
inline void run_tasks(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  if (count == 1) return task(context, 0);
  const int64_t threads = torch::stable::get_num_threads(), workers = threads < count ? threads : count;
  Tasks tasks;
  tasks.task = task, tasks.context = context;
  tasks.shares = workers < Tasks::most ? workers : Tasks::most;
  for (int64_t i = 0; i < tasks.shares; ++i) {
    tasks.share[i].next.store(count * i / tasks.shares, std::memory_order_relaxed);
    tasks.share[i].end = count * (i + 1) / tasks.shares;
  }
  const auto worker = [](int64_t first, int64_t, void* self) {
    auto& tasks = *static_cast<Tasks*>(self);
    for (int64_t i = 0; i < tasks.shares; ++i) {
      Tasks::Share& share = tasks.share[(first + i) % tasks.shares];
      for (int64_t at; (at = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        tasks.task(tasks.context, at);
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, worker, &tasks));
}

inline Parallel cpu_threads() {
  return {.threads = static_cast<int>(torch::stable::get_num_threads()), .run = run_tasks, .pool = nullptr};
}

#ifdef RCU_OPS_WITH_CUDA
// On the current stream of `like`'s device. The scratch goes back to the caching allocator, which hands it out again in
// the order of that stream.
template <class Problem, class ScratchOf, class Run>
void launch_on_gpu(const Problem& problem, const Tensor& like, ScratchOf scratch_of, Run run) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cuda::Scratch wanted = scratch_of(problem);
  check(wanted.error.empty(), wanted.error.c_str());
  std::optional<Tensor> scratch;
  if (wanted.bytes > 0) scratch = empty_of(like, {wanted.bytes}, ScalarType::Byte);
  const Text error = run(problem, scratch ? pointer(*scratch) : nullptr, static_cast<CUstream_st*>(stream));
  check(error.empty(), error.c_str());
}
#endif

}  // namespace rcu_ops::bindings
