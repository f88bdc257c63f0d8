// recurrent_conv's index maths on a GPU: which thread touches which element. Part of the kernels, and compiled for the
// host, where tests walk over all of it (native_recurrent_conv.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "gpu.h"
#include "recurrent_conv.h"

namespace rcu_ops::cuda {

// Input channels whose products the kernels of FMAs add up by themselves before their sum is added to x: a chain over
// all of C would round each of its C additions at the size of the whole sum. A multiple of every depth that
// plan_plain_scan takes W in.
inline constexpr int sum_run = 64;

// Column ((n * G + g) * H + h) * W + w. Whoever needs its offset in several tensors divides once.
struct Column {
  int64_t n, g, h, w;
};
RCU_OPS_DEVICE Column column_of(const Scan& p, int64_t column) {
  if ((column | p.W | p.H | p.G) <= 0x7fffffff) {  // a fifth of the instructions
    const uint32_t W = static_cast<uint32_t>(p.W), H = static_cast<uint32_t>(p.H), G = static_cast<uint32_t>(p.G);
    const uint32_t at = static_cast<uint32_t>(column), hq = at / W, gq = hq / H, n = gq / G;
    return {n, gq - n * G, hq - gq * H, at - hq * W};
  }
  const int64_t hq = column / p.W, gq = hq / p.H, n = gq / p.G;
  return {n, gq - n * p.G, hq - gq * p.H, column - hq * p.W};
}
RCU_OPS_DEVICE int64_t column_offset(const Column& at, const View& v) {
  return at.n * v.n + at.g * v.g + at.h * v.h + at.w * v.w;
}
RCU_OPS_DEVICE int64_t column_offset(const Scan& p, const View& v, int64_t column) {
  return column_offset(column_of(p, column), v);
}
// The same for all of a scan's tensors: element i of a table each.
template <class O>
RCU_OPS_DEVICE void fill_offsets(const Scan& p, int64_t column, int i, O* x, O* y, O* residual, O* first, O* last) {
  const Column at = column_of(p, column);
  x[i] = static_cast<O>(column_offset(at, p.x));
  y[i] = static_cast<O>(column_offset(at, p.y));
  residual[i] = static_cast<O>(column_offset(at, p.residual));
  first[i] = static_cast<O>(column_offset(at, p.first));
  last[i] = static_cast<O>(column_offset(at, p.last));
}

// Calls visit(channel, column) once for each of channels x columns (a power of two, at least 4), each from one of
// `threads` threads. Neighbouring threads take neighbouring columns, or, along_channels, 8 channels x 4 columns per
// warp: whole 32-byte sectors of fp32 in global memory, and no two lanes in one bank of rows that are columns + 4 words
// apart.
template <typename Visit>
RCU_OPS_DEVICE void for_tile(int thread, int threads, bool along_channels, int64_t channels, int columns, Visit visit) {
  if (!along_channels) {
    const int column = thread % columns;
    for (int64_t c = thread / columns; c < channels; c += threads / columns) visit(c, column);
    return;
  }
  const int warps = threads / 32, column_in = thread % 32 / 8;
  const int64_t groups = (channels + 7) / 8;
  int64_t group = thread / 32;
  for (int column = column_in; column < columns; column += 4, group -= groups)
    for (; group < groups; group += warps) {
      const int64_t c = group * 8 + thread % 8;
      if (c < channels) visit(c, column);
    }
}

// Calls visit(row, column) once for each of rows <= Rows x columns <= Columns, each from one of `threads` threads,
// neighbours of which take neighbouring rows (along_rows) or columns.
template <int Rows, int Columns, typename Visit>
RCU_OPS_DEVICE void for_elements(int thread, int threads, bool along_rows, int rows, int columns, Visit visit) {
  RCU_OPS_UNROLL_4
  for (int e = thread; e < Rows * Columns; e += threads) {
    const int row = along_rows ? e % Rows : e / Columns, column = along_rows ? e / Rows : e % Columns;
    if (row < rows && column < columns) visit(row, column);
  }
}

// The two loops above for what is loaded from far away: load(row, column), within bounds even where there is nothing to
// visit, returns what keep(row, column, value) is given for each element, and Batch loads are under way before the
// first is kept. A compiler that cannot tell the memory written from the memory read would wait for one after the other.
template <int Rows, int Columns, int Batch, typename Load, typename Keep>
RCU_OPS_DEVICE void for_elements_loaded(int thread, int threads, bool along_rows, int rows, int columns, Load load,
                                        Keep keep) {
  const auto row_of = [&](int e) { return along_rows ? e % Rows : e / Columns; };
  const auto column_of = [&](int e) { return along_rows ? e / Rows : e % Columns; };
  for (int begin = thread; begin < Rows * Columns; begin += Batch * threads) {
    decltype(load(0, 0)) loaded[Batch];
    RCU_OPS_UNROLL
    for (int i = 0; i < Batch; ++i) {
      const int e = begin + i * threads, row = row_of(e), column = column_of(e);
      loaded[i] = load(row < rows ? row : rows - 1, column < columns ? column : columns - 1);
    }
    RCU_OPS_UNROLL
    for (int i = 0; i < Batch; ++i) {
      const int e = begin + i * threads, row = row_of(e), column = column_of(e);
      if (row < rows && column < columns && e < Rows * Columns) keep(row, column, loaded[i]);
    }
  }
}
// Of for_tile: columns, all of which are visited, are a power of two.
template <int Batch, typename Load, typename Keep>
RCU_OPS_DEVICE void for_tile_loaded(int thread, int threads, bool along_channels, int channels, int columns, Load load,
                                    Keep keep) {
  int shift = 2;
  while (1 << shift < columns) ++shift;
  const auto channel_of = [&](int e) { return along_channels ? (e >> (shift + 3)) * 8 + (e & 7) : e >> shift; };
  const auto column_of = [&](int e) {
    return along_channels ? (e >> 5 << 2 & (columns - 1)) | (e >> 3 & 3) : e & (columns - 1);
  };
  const int all = (along_channels ? (channels + 7) / 8 * 8 : channels) << shift;
  for (int begin = thread; begin < all; begin += Batch * threads) {
    decltype(load(0, 0)) loaded[Batch];
    RCU_OPS_UNROLL
    for (int i = 0; i < Batch; ++i) {
      const int e = begin + i * threads, c = channel_of(e);
      loaded[i] = load(c < channels ? c : channels - 1, column_of(e));
    }
    RCU_OPS_UNROLL
    for (int i = 0; i < Batch; ++i) {
      const int e = begin + i * threads, c = channel_of(e);
      if (c < channels) keep(c, column_of(e), loaded[i]);
    }
  }
}

// The steps by words (recurrent_conv_step_plan.h). Where number 0 of column `column` of a sample is.
RCU_OPS_DEVICE int64_t step_words_offset(const View& v, int sample, int column) {
  return sample * v.n + static_cast<int64_t>(column) * static_cast<int>(v.w);
}

// On the matrix unit a warp has 16 columns x Tiles tiles of 8 channels, Warps warps beside each other along columns. A
// lane's accumulators of Group tiles are those of 2 Group adjacent channels, since W's rows are laid down in that order.
template <int Group>
RCU_OPS_DEVICE int step_weight_row(int channel) {
  constexpr int adjacent = 2 * Group;
  const int in = channel % (8 * Group);
  return channel - in + in % adjacent / 2 * 8 + in / adjacent * 2 + in % 2;
}
template <int Tiles>
inline constexpr int step_group = Tiles < 4 ? Tiles : 4;
// Calls visit(first of its Group tiles, half of their rows, channel, column) for each word of 2 Group numbers of a
// thread.
template <int Warps, int Tiles, typename Visit>
RCU_OPS_DEVICE void for_step_words(unsigned thread, Visit visit) {
  constexpr int group = step_group<Tiles>;
  const int lane = static_cast<int>(thread % 32), warp = static_cast<int>(thread / 32);
  RCU_OPS_UNROLL
  for (int tile = 0; tile < Tiles; tile += group) RCU_OPS_UNROLL
  for (int half = 0; half < 2; ++half)
    visit(tile, half, (warp / Warps * Tiles + tile) * 8 + (lane & 3) * 2 * group,
          warp % Warps * 16 + half * 8 + (lane >> 2));
}

// In fp32 a thread has 4 channels at 2 columns. Calls visit(which, channel, column).
template <typename Visit>
RCU_OPS_DEVICE void for_plain_step_words(unsigned thread, Visit visit) {
  RCU_OPS_UNROLL
  for (int which = 0; which < 2; ++which)
    visit(which, static_cast<int>(thread % 8 * 4), which * 8 + static_cast<int>(thread / 8));
}

// Calls visit(element offset in a frame of the tensor, byte offset in a slot) for every word of `numbers` (8, 4, 2 or
// 1) 16-bit numbers of a tile of C <= PaddedChannels channels x `columns` <= Columns columns, each from one of
// `threads` threads. Slots have one row of `pitch` bytes per column (along_channels: memory is contiguous along
// channels) or per channel. offset: of the tile's columns. One loop serves all words and both directions, over padded
// rows so that nothing is divided by a variable: a copy for each would be most of a kernel's code, and of the time it
// takes to compile.
template <int PaddedChannels, int Columns, typename Visit>
RCU_OPS_DEVICE void for_words(bool along_channels, int numbers, int thread, int threads, int C, int columns, int pitch,
                              const View& v, const Offset* offset, Visit visit) {
  const int padded = along_channels ? PaddedChannels : Columns, end = along_channels ? C : columns;
  const int all = along_channels ? columns * PaddedChannels : C * Columns;
  RCU_OPS_UNROLL_2
  for (int e = thread * numbers; e < all; e += threads * numbers) {  // the word's first number, row after row
    const int row = along_channels ? e / PaddedChannels : e / Columns, at = e - row * padded;
    if (at < end)
      visit(along_channels ? offset[row] + at : offset[at] + row * static_cast<Offset>(v.c), row * pitch + at * 2);
  }
}

// The same for words of 8 numbers and one warp, every lane's words at once: nothing is divided, and what a lane knows of
// its first word serves all of them.
template <int PaddedChannels, int Columns, bool Channels, typename Visit>
RCU_OPS_DEVICE void for_whole_words(int lane, int C, int columns, int pitch, const View& v, const Offset* offset,
                                    Visit visit) {
  constexpr int pieces = (Channels ? PaddedChannels : Columns) / 8, step = 32 / pieces;
  constexpr int rows = Channels ? Columns : PaddedChannels;
  static_assert(32 % pieces == 0 && rows % step == 0);
  const int row0 = lane / pieces, at = lane % pieces * 8, left = Channels ? columns : C;
  if (at >= (Channels ? C : columns)) return;
  const Offset along = Channels ? at : offset[at] + row0 * static_cast<Offset>(v.c);
  RCU_OPS_UNROLL
  for (int i = 0; i < rows / step; ++i)
    if (row0 + i * step < left)
      visit(along + (Channels ? offset[row0 + i * step] : i * step * static_cast<Offset>(v.c)),
            row0 * pitch + at * 2 + i * step * pitch);
}

// The sm_90a scan's shared memory, as the 128-byte swizzle of wgmma has it: the number of a 16-byte word in its row is
// XORed by that of the row, modulo 8, so that eight rows are spread over all banks. W has a row of 64 input channels
// for each output channel, once for each 64 input channels; a unit of x or y one of hopper_positions columns for each
// channel, or (along_channels) one of hopper_half channels for each column.
RCU_OPS_DEVICE int hopper_weight_at(int output, int input) {
  return input / 64 * 256 * 128 + output * 128 + (input % 64 * 2 ^ output % 8 << 4);
}
RCU_OPS_DEVICE int hopper_unit_at(bool along_channels, int channel, int column) {
  return along_channels ? column * 256 + (2 * channel ^ column % 8 << 4)
                        : channel * 128 + (2 * column ^ channel % 8 << 4);
}

// Calls visit(channel, column, byte offset in a unit) for every word of `numbers` (8, 4, 2 or 1) 16-bit numbers of a
// unit of `channels` x `columns`, each from one of 128 threads. A thread takes the same 16 bytes of a unit whatever the
// words.
template <typename Visit>
RCU_OPS_DEVICE void for_unit_words(int thread, bool along_channels, int numbers, int channels, int columns,
                                   Visit visit) {
  const int pieces = along_channels ? 16 : 8, step = 128 / pieces, at0 = thread % pieces * 8;
  const int lines = along_channels ? columns : channels, end = along_channels ? channels : columns;
  RCU_OPS_UNROLL_2
  for (int line = thread / pieces; line < lines; line += step)
    for (int at = at0; at < at0 + 8 && at < end; at += numbers) {
      const int channel = along_channels ? at : line, column = along_channels ? line : at;
      visit(channel, column, hopper_unit_at(along_channels, channel, column));
    }
}

// A thread's part of the plain weight gradient's 64 x 64 elements, M x M of them: channels from these on, and where M is
// 8 four of them weight_grad_apart further on. Of the 8 x 8 threads of fp32 lanes are laid out as in fp32_part.
inline constexpr int weight_grad_apart = 32;
struct WeightGradPart {
  int output, input;
};
template <int M>
RCU_OPS_DEVICE WeightGradPart weight_grad_part(int thread) {
  static_assert(M == 4 || M == 8);
  if (M == 4) return {thread / 16 * 4, thread % 16 * 4};
  return {((thread & 1) | (thread >> 1 & 6)) * 4, ((thread >> 1 & 1) | (thread >> 3 & 6)) * 4};
}

// A row of the weight gradient's sum: a frame, in the order of processing, and a position.
struct WeightGradRow {
  int64_t dx, before;  // offsets; before < 0: -1 - offset in p.first
};
template <typename Count>
RCU_OPS_DEVICE WeightGradRow weight_grad_row_of(const WeightGrad& p, Count row) {
  const Count W = static_cast<Count>(p.W), H = static_cast<Count>(p.H);
  const Count frames = static_cast<Count>(p.first.data ? p.T : p.T - 1), rest = row / W / H;
  const int64_t w = row % W, h = row / W % H, n = rest / frames;
  const int64_t i = rest % frames + (p.first.data ? 0 : 1);
  const int64_t t = p.reverse ? p.T - 1 - i : i, before = p.reverse ? t + 1 : t - 1;
  return {n * p.dx.n + t * p.dx.t + h * p.dx.h + w * p.dx.w, i == 0
                                                                 ? -1 - (n * p.first.n + h * p.first.h + w * p.first.w)
                                                                 : n * p.h.n + before * p.h.t + h * p.h.h + w * p.h.w};
}
// small: rows can be counted in 31 bits, and divided in a fifth of the instructions.
RCU_OPS_DEVICE WeightGradRow weight_grad_row(const WeightGrad& p, int64_t row, bool small) {
  return small ? weight_grad_row_of(p, static_cast<uint32_t>(row)) : weight_grad_row_of(p, row);
}

// Calls visit(row, channel, byte offset in a slot) for every word of `numbers` (8, 4, 2 or 1) 16-bit numbers of a tile
// of `channels` <= Tile channels x `rows` <= Rows rows, each from one of Threads threads. Words lie along channels
// (Channels) or along rows; slots have one row of `pitch` bytes per row or per channel. A thread takes the same 16
// bytes of a slot whatever the words.
template <int Threads, int Tile, int Rows, bool Channels, typename Visit>
RCU_OPS_DEVICE void for_row_words(int thread, int numbers, int channels, int rows, int pitch, Visit visit) {
  constexpr int pieces = (Channels ? Tile : Rows) / 8;
  static_assert(Tile * Rows / 8 % Threads == 0 && Threads % pieces == 0);
  const int line0 = thread / pieces, at0 = thread % pieces * 8;
  RCU_OPS_UNROLL
  for (int k = 0; k < Tile * Rows / 8 / Threads; ++k) {
    const int line = line0 + k * (Threads / pieces);
    if (line >= (Channels ? rows : channels)) continue;
    for (int at = at0; at < at0 + 8 && at < (Channels ? channels : rows); at += numbers)
      visit(Channels ? line : at, Channels ? at : line, line * pitch + 2 * at);
  }
}

}  // namespace rcu_ops::cuda
