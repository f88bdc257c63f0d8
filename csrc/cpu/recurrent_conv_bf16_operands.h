// recurrent_conv for bf16: what a unit multiplies (see recurrent_conv_bf16_core.h). Included inside the unit's
// namespace.

static constexpr int block = 32, tile = 16, tile_values = 512;  // bf16 values per operand tile

// A block of 32 x 32 outputs is c[2][2] tiles of [16][16] floats, the product of two A tiles [16 rows][32 k] and two B
// tiles [16 pairs of k][16 lanes][2] for every tile of k.
struct Operands {
  const bf16_t* a = nullptr;
  int64_t a_k = tile_values, a_tile = 0, a_row = block;  // from one tile of k, A tile and row to the next
  // A's two tiles at other_k lie here instead, one after the other.
  const bf16_t* other = nullptr;
  int64_t other_k = -1;
  const bf16_t* b = nullptr;
  int64_t b_tile = 0;
  int64_t k_tiles = 0;
  // Lines to ask for one by one between the products: in one go, more than a core can wait for would hold it up.
  const char* const* ahead = nullptr;
  const char* const* ahead_end = nullptr;

  int64_t share(int64_t steps) const { return (ahead_end - ahead + steps - 1) / steps; }
};
