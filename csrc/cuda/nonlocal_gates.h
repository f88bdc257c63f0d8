// nonlocal_gates on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/nonlocal_gates.h"
#include "common/nonlocal_gates_library.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// Which kernel runs: what the planner prefers, or the one that runs everything.
enum class RelateKernel { best, plain };

// How relate() would run a forward pass, or gradients, on the current device, in words.
Text describe_relate(const Relation& relation, bool step);
Text describe_relate(const AttentionGrad& problem);

// Who is to run a forward pass on the current device (common/nonlocal_gates_library.h).
Way forward_way(const Relation& relation, bool step);

// What the calls below need as `scratch` on the current device.
Scratch scratch_of(const Attention& problem);
Scratch scratch_of(const AttentionGrad& problem);
Scratch scratch_of(const Step& problem);
Scratch scratch_of(const StepGrad& problem);

// Enqueue the work on `stream` of the current device and return; all pointers are the device's. The text of an error,
// or an empty one. Nothing is allocated and nothing waits, so the calls can be captured in a CUDA graph. Outputs
// overlap no input.
Text relate(const Attention& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const AttentionGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const Step& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const StepGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);

// ---- by a library's products (fp32 and 16-bit data) ----

// A matrix of each of a product's `count`: element (i, row, column) is at data[i batch + row * row + column * column].
struct Factor {
  void* data = nullptr;
  int64_t batch = 0, row = 0, column = 0;
};
// out = a b, [rows, inner] times [inner, columns], in the tensors' dtype; enqueued on the same stream. context: the
// caller's.
struct Product {
  int64_t count = 0, rows = 0, inner = 0, columns = 0;
  Factor a, b, out;
};
using Multiply = void (*)(void* context, const Product& product);

Scratch products_scratch_of(const Attention& problem);
Scratch products_scratch_of(const AttentionGrad& problem);
Text relate_by_products(const Attention& problem, void* scratch, Multiply multiply, void* context, CUstream_st* stream);
Text relate_by_products(const AttentionGrad& problem, void* scratch, Multiply multiply, void* context,
                        CUstream_st* stream);

// After whoever made the results of an attention gave dead queries NaN: makes anew the rows that begin with one. Of
// gradients: those of queries, and of keys that a dead query reached; scratch as relate_by_products left it.
Text mend(const Attention& problem, CUstream_st* stream);
Text mend(const AttentionGrad& problem, void* scratch, CUstream_st* stream);

// A step, or of its backward pass dx_gates and dcell, from the relations [B,4,P,E] of its gates.
Text update_cell_from(const Rows& relations, const Step& problem, CUstream_st* stream);
Text update_cell_from(const Rows& relations, const StepGrad& problem, CUstream_st* stream);

}  // namespace rcu_ops::cuda
