// fast_gru's copies. Included inside the namespace of an instruction set, after fast_gru_columns.h.

void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end) {
  widen(to + begin, static_cast<const uint16_t*>(from) + begin, dtype, end - begin);
}

// Units [begin, end) of reorder_units, in the order of samples, steps and channels. Bound by memory.
void reorder_range(const fast_gru::Reorder& all, int64_t begin, int64_t end) {
  const int64_t blocks = (all.channels + fast_gru::reorder_channels - 1) / fast_gru::reorder_channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t step = unit / blocks % all.steps, sample = unit / blocks / all.steps,
                  first = unit % blocks * fast_gru::reorder_channels,
                  channels = min_of(fast_gru::reorder_channels, all.channels - first);
    const auto at = [&](const fast_gru::View& view) {
      return static_cast<float*>(view.data) + sample * view.sample + step * view.step + first * view.channel;
    };
    if (all.from.channel == 1)
      transpose(at(all.to), all.to.channel, at(all.from), all.from.position, all.positions, channels);
    else
      transpose(at(all.to), all.to.position, at(all.from), all.from.channel, channels, all.positions);
  }
}
