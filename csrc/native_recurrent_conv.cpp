// recurrent_conv in rcu_ops._native: the instruction set that runs, how a call is planned and cut into tasks on a CPU,
// and, for any GPU, there or not, how the CUDA kernels would run it and which elements each block touches.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/cpu_isa.h"
#include "common/recurrent_conv_chunk_plan.h"
#include "common/recurrent_conv_gpu_plan.h"
#include "common/recurrent_conv_index.h"
#include "common/recurrent_conv_plan.h"
#include "common/recurrent_conv_weight_grad_plan.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

cpu::PlanInput plan_input(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype, int threads,
                          bool channels_last, bool with_state, bool dense) {
  if (n < 0 || positions < 0 || c < 1 || t < 1 || threads < 0)
    throw py::value_error("expected n, positions, threads >= 0 and c, t >= 1");
  cpu::PlanInput in;
  in.columns = n * positions;
  in.C = c;
  in.T = t;
  in.dtype = parse_dtype(dtype);
  in.threads = threads ? threads : static_cast<int>(std::thread::hardware_concurrency());
  if (in.threads < 1) in.threads = 1;
  in.channels_contiguous = channels_last;
  in.single_product = t == 1 && with_state;
  in.dense_channels = dense;
  return in;
}

cpu::Isa parse_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(cpu::Isa::amx); ++i)
    if (name == cpu::isa_name(static_cast<cpu::Isa>(i))) return static_cast<cpu::Isa>(i);
  if (name.empty()) return cpu::current_isa();
  throw py::value_error("isa: expected portable, avx2, avx512, avx512_bf16 or amx, got '" + name + "'");
}

std::string recurrent_conv_plan(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype,
                                int threads, bool channels_last, bool with_state, bool dense, const std::string& isa) {
  const cpu::PlanInput in = plan_input(n, c, t, positions, dtype, threads, channels_last, with_state, dense);
  const cpu::Isa on = parse_isa(isa);
  return cpu::describe(in, cpu::plan_scan(in, on), on);
}

Facts recurrent_conv_plan_details(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype,
                                  int threads, bool channels_last, bool with_state, bool dense,
                                  const std::string& isa) {
  const cpu::PlanInput in = plan_input(n, c, t, positions, dtype, threads, channels_last, with_state, dense);
  const cpu::Plan plan = cpu::plan_scan(in, parse_isa(isa));
  py::list tasks;
  for (int64_t i = 0, count = cpu::task_count(plan, in.columns); i < count; ++i) {
    const cpu::TaskRange r = cpu::task_range(plan, in.columns, in.C, i);
    tasks.append(py::make_tuple(r.column_begin, r.column_end, r.channel_begin, r.channel_end));
  }
  Facts d;
  d["lanes"] = plan.channels ? "channels" : "positions";
  d["tile"] = plan.tile;
  d["k_block"] = plan.k_block;
  d["chunk"] = plan.chunk;
  d["sequential_cost"] = plan.sequential_cost;
  d["chunked_cost"] = plan.chunked_cost;
  d["tasks"] = tasks;
  return d;
}

Names available_isas() {
  Names names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i)
    names.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(i)));
  return names;
}

// ---- CUDA --------------------------------------------------------------------------------------------------------

View gpu_view(DType dtype, const Strides& strides, int64_t misalignment) {
  View v;
  v.data = reinterpret_cast<void*>(static_cast<uintptr_t>(4096 + misalignment));  // never followed
  v.dtype = dtype;
  v.n = strides[0], v.c = strides[1], v.t = strides[2], v.h = strides[3], v.w = strides[4];
  return v;
}

Scan gpu_scan(const Strides& shape, const std::string& dtype, const Strides& x, const Strides& y,
              const std::optional<Strides>& residual, int64_t misalignment, bool with_state, bool reverse) {
  Scan p;
  p.N = shape[0], p.C = shape[1], p.T = shape[2], p.H = shape[3], p.W = shape[4];
  if (p.N < 0 || p.H < 0 || p.W < 0 || p.C < 1 || p.T < 1)
    throw py::value_error("shape: expected n, h, w >= 0 and c, t >= 1");
  p.dtype = parse_dtype(dtype);
  p.x = gpu_view(p.dtype, x, misalignment);
  p.y = gpu_view(p.dtype, y, 0);
  if (residual) p.residual = gpu_view(p.dtype, *residual, misalignment);
  p.weight_in = 1, p.weight_out = p.C;
  p.init = with_state ? Init::state : Init::none;
  p.last_kind = Last::state;
  p.reverse = reverse;
  return p;
}

// Offsets, in elements and in the order of the kernel's own loops, that a range of blocks reads of x and writes of y.
struct Touched {
  std::vector<int64_t> read, written;

  void frames(const Scan& p, int64_t x, int64_t y, int numbers) {
    for (int64_t t = 0; t < p.T; ++t)
      for (int i = 0; i < numbers; ++i) {
        if (x >= 0) read.push_back(x + t * p.x.t + i);
        if (y >= 0) written.push_back(y + t * p.y.t + i);
      }
  }
};

void plain_block(const Scan& p, const cuda::PlainScanPlan& plan, int64_t block, Touched& touched) {
  const int64_t column0 = block * plan.positions, left = p.N * p.H * p.W - column0;
  for (int thread = 0; thread < cuda::plain_threads; ++thread)
    for (const bool reading : {true, false}) {
      const View& v = reading ? p.x : p.y;
      cuda::for_tile(thread, cuda::plain_threads, v.c == 1, p.C, plan.positions, [&](int64_t c, int i) {
        if (i >= left) return;
        const int64_t at = cuda::column_offset(p, v, column0 + i) + c * v.c;
        touched.frames(p, reading ? at : -1, reading ? -1 : at, 1);
      });
    }
}

// A frame by words: those of x, or of y, that a block's threads have.
void step_words_block(const View& v, const cuda::StepScanPlan& plan, int64_t block, int64_t offset,
                      std::vector<int64_t>& touched) {
  const int64_t sample_blocks = cuda::ceil_div(plan.words.positions, plan.columns);
  const int channel0 = static_cast<int>(block % plan.channel_blocks) * plan.outputs;
  const int64_t column_block = block / plan.channel_blocks;
  const int column0 = static_cast<int>(column_block % sample_blocks) * plan.columns;
  const int sample = static_cast<int>(column_block / sample_blocks);
  const auto touch = [&](int channel, int column, int numbers) {
    if (column0 + column >= plan.words.positions) return;
    const int64_t at = cuda::step_words_offset(v, sample, column0 + column) + channel0 + channel;
    if (at % numbers != 0) throw std::logic_error("a word is not aligned");
    for (int i = 0; i < numbers; ++i) touched.push_back(offset + at + i);
  };
  const auto words = [&](int numbers) {
    return [&touch, numbers](int, int, int channel, int column) { touch(channel, column, numbers); };
  };
  for (unsigned thread = 0; thread < static_cast<unsigned>(cuda::step_threads); ++thread)
    if (plan.outputs == 64)
      cuda::for_step_words<4, 8>(thread, words(8));
    else if (plan.matrix)
      cuda::for_step_words<1, 1>(thread, words(2));
    else if (thread < static_cast<unsigned>(cuda::plain_step_words_threads))
      cuda::for_plain_step_words(thread, [&](int, int channel, int column) { touch(channel, column, 4); });
}

template <int Outputs, int Columns>
void step_block(const Scan& p, const cuda::StepScanPlan& plan, int64_t block, Touched& touched) {
  const int64_t channel0 = block % plan.channel_blocks * Outputs, column0 = block / plan.channel_blocks * Columns;
  const int outputs = static_cast<int>(std::min<int64_t>(p.C - channel0, Outputs));
  const int columns = static_cast<int>(std::min<int64_t>(p.N * p.H * p.W - column0, Columns));
  for (int64_t i = 0; i < plan.launches; ++i) {
    const Scan step = cuda::step_of(p, i, nullptr);
    const auto first_of = [](const View& v, const View& whole) {
      return (static_cast<char*>(v.data) - static_cast<char*>(whole.data)) / element_size(v.dtype);
    };
    if (plan.words.possible && step.init == Init::state) {
      step_words_block(step.x, plan, block, first_of(step.x, p.x), touched.read);
      step_words_block(step.y, plan, block, first_of(step.y, p.y), touched.written);
      continue;
    }
    if (block >= plan.blocks) continue;  // samples of their own are more blocks
    for (int thread = 0; thread < cuda::step_threads; ++thread)
      for (const bool reading : {true, false}) {
        const View &v = reading ? step.x : step.y, &whole = reading ? p.x : p.y;
        cuda::for_elements<Outputs, Columns>(thread, cuda::step_threads, v.c == 1, outputs, columns, [&](int c, int j) {
          (reading ? touched.read : touched.written)
              .push_back(first_of(v, whole) + cuda::column_offset(step, v, column0 + j) + (channel0 + c) * v.c);
        });
      }
  }
}

// One tile of the kernels for 16-bit data: `Columns` columns from column0 on, copied by `threads` threads through a
// slot.
template <int PaddedChannels, int Columns, typename Plan>
void copied_tile(const Scan& p, const Plan& plan, int64_t column0, int threads, Touched& touched) {
  const int bytes = plan.vector_bytes;
  const int64_t left = p.N * p.H * p.W - column0;
  const int here = left <= 0 ? 0 : left < Columns ? static_cast<int>(left) : Columns;
  std::vector<bool> slot(static_cast<size_t>(plan.slot_bytes));
  for (const View* v : {&p.x, &p.y}) {
    Offset offset[Columns];
    for (int i = 0; i < here; ++i) offset[i] = static_cast<Offset>(cuda::column_offset(p, *v, column0 + i));
    const int C = static_cast<int>(p.C), pitch = static_cast<int>(plan.slot_pitch);
    const auto visit = [&](int64_t at, int to) {
      for (int i = to; i < to + bytes; ++i)
        if (slot.at(static_cast<size_t>(i)) != (v == &p.y)) throw std::logic_error("a byte of a slot is used twice");
      std::fill_n(slot.begin() + to, bytes, v == &p.x);
      if (at * 2 % bytes != 0) throw std::logic_error("a word is not aligned");
      touched.frames(p, v == &p.x ? at : -1, v == &p.x ? -1 : at, bytes / 2);
    };
    for (int thread = 0; thread < threads; ++thread) {
      if constexpr (Columns % 16 == 0)  // the tile scan
        if (bytes == 16) {
          plan.along_channels
              ? cuda::for_whole_words<PaddedChannels, Columns, true>(thread, C, here, pitch, *v, offset, visit)
              : cuda::for_whole_words<PaddedChannels, Columns, false>(thread, C, here, pitch, *v, offset, visit);
          continue;
        }
      cuda::for_words<PaddedChannels, Columns>(plan.along_channels, bytes / 2, thread, threads, C, here, pitch, *v,
                                               offset, visit);
    }
  }
}

// The units of both warpgroups' columns.
void hopper_block(const Scan& p, const cuda::HopperScanPlan& plan, int64_t block, Touched& touched) {
  const int numbers = plan.vector_bytes / 2;
  for (int group = 0; group < cuda::hopper_groups; ++group)
    for (int half = 0; half < 2; ++half) {
      const int64_t column0 = (block * cuda::hopper_groups + group) * cuda::hopper_positions,
                    left = p.N * p.H * p.W - column0;
      const int columns = static_cast<int>(std::clamp<int64_t>(left, 0, cuda::hopper_positions));
      const int channel0 = half * cuda::hopper_half,
                channels = std::min(static_cast<int>(p.C) - channel0, cuda::hopper_half);
      std::vector<bool> unit(cuda::hopper_unit_bytes);
      for (const View* v : {&p.x, &p.y})
        for (int thread = 0; thread < 128; ++thread)
          cuda::for_unit_words(
              thread, plan.along_channels, numbers, channels, columns, [&](int channel, int column, int at) {
                for (int i = at; i < at + 2 * numbers; ++i)
                  if (unit.at(static_cast<size_t>(i)) != (v == &p.y))
                    throw std::logic_error("a byte of a unit is used twice");
                std::fill_n(unit.begin() + at, 2 * numbers, v == &p.x);
                const int64_t offset = cuda::column_offset(p, *v, column0 + column) + (channel0 + channel) * v->c;
                if (offset % numbers != 0) throw std::logic_error("a word is not aligned");
                touched.frames(p, v == &p.x ? offset : -1, v == &p.x ? -1 : offset, numbers);
              });
    }
}

template <int PaddedChannels>
void tile_block(const Scan& p, const cuda::TileScanPlan& plan, int64_t block, Touched& touched) {
  constexpr int columns = cuda::tile_positions(PaddedChannels);
  for (int warp = 0; warp < plan.warps; ++warp)
    copied_tile<PaddedChannels, columns>(p, plan, (block * plan.warps + warp) * columns, 32, touched);
}

void fp32_block(const Scan& p, const cuda::Fp32ScanPlan& plan, int64_t block, Touched& touched) {
  const int64_t column0 = block * plan.positions, left = p.N * p.H * p.W - column0;
  const int columns = static_cast<int>(std::min<int64_t>(left, plan.positions));
  for (const View* v : {&p.x, &p.y}) {
    std::vector<int64_t> offset;
    for (int i = 0; i < columns; ++i) offset.push_back(cuda::column_offset(p, *v, column0 + i));
    for (int thread = 0; thread < plan.threads; ++thread)
      cuda::for_part(v == &p.x ? plan.x : plan.y, *v, offset.data(), 0, cuda::fp32_part(plan, thread),
                     static_cast<int>(p.C), columns, [&](auto quad, int, int, int64_t at) {
                       const int numbers = quad == cuda::Quad::none ? 1 : 4;
                       if (at % numbers != 0) throw std::logic_error("a word is not aligned");
                       touched.frames(p, v == &p.x ? at : -1, v == &p.x ? -1 : at, numbers);
                     });
  }
}

void matrix_block(const Scan& p, const cuda::ScanPlan& plan, int64_t block, Touched& touched) {
  if (plan.hopper)
    hopper_block(p, *plan.hopper, block, touched);
  else if (plan.wide)
    copied_tile<cuda::wide_most_channels, cuda::wide_positions>(p, *plan.wide, block * cuda::wide_positions,
                                                                32 * cuda::wide_warps, touched);
  else
    plan.tile->padded_channels == 64 ? tile_block<64>(p, *plan.tile, block, touched)
                                     : tile_block<128>(p, *plan.tile, block, touched);
}

Facts recurrent_conv_gpu_plan(const Strides& shape, const std::string& dtype, const Strides& x, const Strides& y,
                              const std::optional<Strides>& residual, int64_t misalignment, bool with_state,
                              bool reverse, bool plain, bool warpgroups, bool statistics, bool powers_kept, bool sm90a,
                              int architecture, int multiprocessors, int64_t shared_bytes, int64_t begin, int64_t end,
                              const std::optional<Strides>& first, const std::string& first_dtype, bool weight_sums) {
  Scan p = gpu_scan(shape, dtype, x, y, residual, misalignment, with_state || first, reverse);
  if (first) p.first = gpu_view(parse_dtype(first_dtype), *first, 0);
  if (statistics) p.norm.partial = static_cast<double*>(p.y.data);  // never followed
  if (weight_sums) p.weight_grad.partial = static_cast<float*>(p.y.data);
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes, sm90a);
  const cuda::ScanPlan plan = cuda::plan_scan(p, gpu,
                                              plain        ? cuda::Kernel::plain
                                              : warpgroups ? cuda::Kernel::hopper
                                                           : cuda::Kernel::best);
  const int64_t blocks = plan.blocks();
  Touched touched;
  for (int64_t block = begin; block < end && block < blocks; ++block) {
    if (plan.step)
      plan.step->outputs == 64 ? step_block<64, 64>(p, *plan.step, block, touched)
                               : step_block<32, 16>(p, *plan.step, block, touched);
    else if (plan.fp32)
      fp32_block(p, *plan.fp32, block, touched);
    else
      plan.is_plain() ? plain_block(p, plan.plain, block, touched) : matrix_block(p, plan, block, touched);
  }
  Facts d;
  const cuda::ChunkPlan chunks = cuda::plan_chunks(p, plan, gpu, powers_kept);
  const int64_t columns = chunks.frames ? 0 : cuda::fused_norm_columns(plan);
  d["text"] = std::string(cuda::describe(p, plan, chunks).c_str()) +
              (!statistics ? std::string()
               : columns ? "; batch normalisation's statistics on the way out, of parts of " + std::to_string(columns) +
                               " columns"
                         : std::string("; batch normalisation's statistics in a pass of their own"));
  d["norm_columns"] = columns;
  d["weight_parts"] = weight_sums && !chunks.frames ? cuda::fused_weight_grad_parts(p, plan) : 0;
  d["chunk"] = chunks.frames;
  d["sequential_us"] = chunks.sequential_us;
  d["chunked_us"] = chunks.chunked_us;
  d["blocks"] = blocks;
  d["shared_bytes"] = plan.shared_bytes();
  d["scratch_bytes"] = plan.scratch_bytes();
  d["read"] = touched.read;
  d["written"] = touched.written;
  return d;
}

// The offsets that a block of the matrix unit's weight gradient reads of dx and of the states (below 0: -1 - offset in
// first).
template <int Tile, bool Channels>
void weight_grad_block(const WeightGrad& p, const cuda::WeightGradPlan& plan, int64_t tile, int64_t split,
                       std::vector<int64_t>& from_dx, std::vector<int64_t>& from_states) {
  constexpr int R = cuda::weight_grad_depth, threads = 2 * Tile;
  const int64_t per_side = cuda::ceil_div(p.C, Tile), begin = split * plan.rows_per_split;
  const int64_t end = std::min(begin + plan.rows_per_split, plan.rows);
  const int numbers = plan.vector_bytes / 2;
  for (const bool of_dx : {true, false}) {
    const int64_t channel0 = (of_dx ? tile / per_side : tile % per_side) * Tile, stride = of_dx ? p.dx.c : p.h.c;
    const int channels = static_cast<int>(std::min<int64_t>(p.C - channel0, Tile));
    for (int64_t row0 = begin; row0 < end; row0 += R) {
      const int rows = static_cast<int>(std::min<int64_t>(end - row0, R));
      std::vector<bool> slot(static_cast<size_t>(plan.slot_bytes));
      const auto offset_of = [&](int r) {
        const cuda::WeightGradRow at = cuda::weight_grad_row(p, row0 + r, plan.small);
        return of_dx ? at.dx : at.before;
      };
      for (int thread = 0; thread < threads; ++thread)
        cuda::for_row_words<threads, Tile, R, Channels>(
            thread, numbers, channels, rows, static_cast<int>(plan.slot_pitch), [&](int r, int c, int at) {
              for (int i = at; i < at + 2 * numbers; ++i) {
                if (slot.at(static_cast<size_t>(i))) throw std::logic_error("a byte of a slot is used twice");
                slot.at(static_cast<size_t>(i)) = true;
              }
              const int64_t first_offset = offset_of(r) + (channel0 + c) * stride;
              if (offset_of(r) >= 0 && first_offset % numbers != 0) throw std::logic_error("a word is not aligned");
              for (int j = 0; j < numbers; ++j) {
                const int64_t offset = offset_of(Channels ? r : r + j), channel = channel0 + (Channels ? c + j : c);
                if (offset_of(r) >= 0)
                  (of_dx ? from_dx : from_states).push_back(first_offset + j);
                else
                  from_states.push_back(-1 - (-1 - offset + channel * p.first.c));
              }
            });
    }
  }
}

Facts gpu_weight_grad(const Strides& shape, const std::string& dtype, const Strides& dx, const Strides& h,
                      const std::optional<Strides>& first, int64_t misalignment, bool reverse, bool plain,
                      int64_t shared_bytes, int64_t begin, int64_t end, const std::optional<Pair>& block) {
  WeightGrad p;
  p.N = shape[0], p.C = shape[1], p.T = shape[2], p.H = shape[3], p.W = shape[4];
  p.dtype = parse_dtype(dtype);
  p.dx = gpu_view(p.dtype, dx, 0), p.h = gpu_view(p.dtype, h, misalignment);
  if (first) p.first = gpu_view(p.dtype, *first, 0);
  p.reverse = reverse;
  const cuda::WeightGradPlan plan =
      cuda::plan_weight_grad(p, gpu_of(80, 108, shared_bytes, false), plain ? cuda::Kernel::plain : cuda::Kernel::best);
  std::vector<int64_t> from_dx, before, block_dx, block_states;
  for (int64_t row = begin; row < end && row < plan.rows; ++row) {
    const cuda::WeightGradRow at = cuda::weight_grad_row(p, row, plan.small);
    from_dx.push_back(at.dx), before.push_back(at.before);
  }
  if (block && plan.vector_bytes) {
    const auto [tile, split] = *block;
    const auto walk = plan.tile == 64
                          ? (plan.along_channels ? weight_grad_block<64, true> : weight_grad_block<64, false>)
                          : (plan.along_channels ? weight_grad_block<128, true> : weight_grad_block<128, false>);
    walk(p, plan, tile, split, block_dx, block_states);
  }
  Facts d;
  d["text"] = cuda::describe(plan).c_str();
  d["rows"] = plan.rows;
  d["tile"] = plan.tile;
  d["tiles"] = plan.tiles;
  d["splits"] = plan.splits;
  d["rows_per_split"] = plan.rows_per_split;
  d["shared_bytes"] = plan.shared_bytes;
  d["scratch_bytes"] = plan.scratch_bytes;
  d["dx"] = from_dx;
  d["before"] = before;
  d["block_dx"] = block_dx;
  d["block_states"] = block_states;
  return d;
}

}  // namespace

void bind_recurrent_conv(py::module_& m) {
  define(
      m, "cpu_isa", +[] { return std::string(cpu::isa_name(cpu::current_isa())); }, {},
      "The instruction set the CPU kernels use: the fastest available, or the one that RCU_OPS_CPU_ISA names.");
  define(m, "cpu_isas", available_isas, {}, "The instruction sets this machine can run, best last.");
  define(
      m, "cpu_multiplies_pairs", +[] { return cpu::preferred_isa() >= cpu::Isa::avx512_bf16; }, {},
      "Whether this processor has an instruction for pairs of bf16 that is not slower than arithmetic in fp32.");
  const std::initializer_list<Parameter> problem = {"n",
                                                    "c",
                                                    "t",
                                                    "positions",
                                                    "dtype",
                                                    {"threads", 0},
                                                    {"channels_last", false},
                                                    {"with_state", false},
                                                    {"dense", true},
                                                    {"isa", ""}};
  define(m, "recurrent_conv_plan", recurrent_conv_plan, problem,
         "In one sentence, how the CPU kernels run x [n, c, t, positions] of a dtype ('float32', ...), and why: "
         "instruction set, orientation, tasks, and whether time is cut into chunks. threads = 0: one per core; "
         "with_state: an h0 is given; dense: where channels are adjacent, they are in every tensor.");
  define(m, "recurrent_conv_plan_details", recurrent_conv_plan_details, problem,
         "The same as numbers: lanes, tile, k_block, chunk, the two costs compared, and tasks as (column begin, column "
         "end, channel begin, channel end).");
  define(
      m, "recurrent_conv_gpu_plan", recurrent_conv_gpu_plan,
      {"shape",
       "dtype",
       "x",
       "y",
       {"residual", nullptr},
       {"misalignment", 0},
       {"with_state", false},
       {"reverse", false},
       {"plain", false},
       {"warpgroups", false},
       {"statistics", false},
       {"powers_kept", false},
       {"sm90a", true},
       {"architecture", 80},
       {"multiprocessors", 108},
       {"shared_bytes", 163 * 1024},
       {"begin", 0},
       {"end", 0},
       {"first", nullptr},
       {"first_dtype", ""},
       {"weight_sums", false}},
      "How the CUDA kernels run x of a shape [n, c, t, h, w] and strides on a GPU of these limits: text (one "
      "sentence); chunk, the frames of the library form's chunks, 0 where it is not taken, and the two times "
      "compared, chunked_us and sequential_us (predictions, 0 where none was made); of the scan's kernel blocks, "
      "shared_bytes, scratch_bytes, and, for blocks [begin, end), the offsets of x that are read and of y that are "
      "written, as int64s. misalignment: of x's and the residual's address, in bytes modulo 16. plain, warpgroups: "
      "that kernel, wherever it can run. sm90a: the library has code for sm_90a. statistics: batch normalisation's "
      "are asked for; norm_columns: how many columns a part of them has, 0 where the kernel takes none. powers_kept: "
      "those that the library form needs of the weight are there already. first: strides of the given state, as a "
      "frame of x, whose dtype is first_dtype; None: it lies as the kernels like it best. weight_sums: of a scan "
      "backwards in time, whose residual is h; weight_parts: of how many parts of columns its kernel adds up the "
      "weight's gradient, 0 where it does not.");
  define(m, "recurrent_conv_gpu_weight_grad", gpu_weight_grad,
         {"shape",
          "dtype",
          "dx",
          "h",
          {"first", nullptr},
          {"misalignment", 0},
          {"reverse", false},
          {"plain", false},
          {"shared_bytes", 163 * 1024},
          {"begin", 0},
          {"end", 0},
          {"block", nullptr}},
         "How the CUDA kernels cut the weight gradient's sum: text (one sentence), rows, tile, tiles, splits, "
         "rows_per_split, shared_bytes, scratch_bytes; for rows [begin, end), dx and before, the offsets of the two "
         "factors' first channels in dx and in h (below 0: -1 - offset in first), as int64s; and what block (tile, "
         "split) of the matrix unit's kernel reads, block_dx and block_states, in the same way. misalignment: of h's "
         "address, in bytes modulo 16.");
}
