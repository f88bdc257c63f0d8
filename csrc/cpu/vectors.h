// Vectors F32 and F64 in the compiler's own types, for kernels whose inner loops it turns into good code by itself.
// Included inside the namespace of the instruction set that uses them, after scalar.h; that file defines
// `vector_bytes`, load_half, store_half and lanes_set<L>: a bit per lane of a comparison's result. It also includes
// vector_formats.h before.

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};

using float_vector = float __attribute__((vector_size(vector_bytes)));
using double_vector = double __attribute__((vector_size(vector_bytes)));

template <class Scalar, class Vector>
struct Vectors {
  using S = Scalar;
  using R = Vector;
  static constexpr int L = vector_bytes / sizeof(S);
  // Broadcast operands of a block: accumulators, and as many operands, fit the registers.
  static constexpr int M = L < 8 ? L : 8;

  static R load(const S* p) {
    R v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(S* p, R v) { memcpy(p, &v, sizeof v); }

  // The lanes on which a comparison holds, a bit each.
  template <class Mask>
  static uint32_t lanes(Mask mask) {
    return lanes_set<L>(mask);
  }
  template <class Mask>
  static bool any(Mask mask) {
    return lanes(mask) != 0;
  }

  // Lane l of the result: lane l ^ H.
  template <int H>
  static R swapped(R v) {
    return swap_lanes<H>(v, typename CountLanes<L>::type());
  }

  // Sum of the lanes, in pairs of pairs.
  static S sum(R v) { return sum_halves<L / 2>(v); }

  // Row i becomes column i. Step by step, bit h of the row's and of the lane's number change places.
  static void transpose(R (&row)[L]) { swap_bits<L / 2>(row); }

  // Lane i: the sum of row i's lanes. Rows that would be added up once they are columns are, at every step.
  static R sums(R (&row)[L]) { return add_bits<L / 2>(row); }

 private:
  using Places =
      decltype(R() < R());  // of lanes in one or two vectors; __builtin_shufflevector is for GCC 12 and later

  template <int H, int... I>
  static R swap_lanes(R v, Lanes<I...>) {
    return __builtin_shuffle(v, Places{(I ^ H)...});
  }
  template <int H>
  static S sum_halves(R v) {
    if constexpr (H > 0) return sum_halves<H / 2>(v + swapped<H>(v));
    return v[0];
  }
  template <int H>
  static void swap_bits(R (&row)[L]) {
    if constexpr (H > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (!(i & H)) swap_pair<H>(row[i], row[i + H], typename CountLanes<L>::type());
      swap_bits<H / 2>(row);
    }
  }
  template <int H>
  static R add_bits(R (&row)[L]) {
    if constexpr (H > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < H; ++i) {
        swap_pair<H>(row[i], row[i + H], typename CountLanes<L>::type());
        row[i] += row[i + H];
      }
      return add_bits<H / 2>(row);
    }
    return row[0];
  }
  template <int H, int... I>
  static void swap_pair(R& a, R& b, Lanes<I...>) {
    const R low = __builtin_shuffle(a, b, Places{((I & H) ? L + I - H : I)...});
    b = __builtin_shuffle(a, b, Places{((I & H) ? L + I : I + H)...});
    a = low;
  }
};

struct F32 : Vectors<float, float_vector> {
  using I = int32_t __attribute__((vector_size(vector_bytes)));
  using U = uint32_t __attribute__((vector_size(vector_bytes)));
  using H = uint16_t __attribute__((vector_size(vector_bytes / 2)));
  using Vectors::load;
  static R load(const bf16_t* p) {
    H half;
    memcpy(&half, p, sizeof half);
    return reinterpret_cast<R>(widened(half) << 16);
  }
  static R load(const f16_t* p) { return load_half<R>(p); }
  using Vectors::store;
  static void store(bf16_t* p, R v) {
    const H half = narrowed(rounded_to_high(v) >> 16);
    memcpy(p, &half, sizeof half);
  }
  static void store(f16_t* p, R v) { store_half(p, v); }

  // 2 L numbers in a row as vectors of those at even and of those at odd places, and back: half of what it takes one
  // vector at a time.
  static void load_turns(const bf16_t* p, R& even, R& odd) {
    U both;
    memcpy(&both, p, sizeof both);
    even = reinterpret_cast<R>(both << 16), odd = reinterpret_cast<R>(both & 0xffff0000u);
  }
  static void store_turns(bf16_t* p, R even, R odd) {
    const U both = rounded_to_high(even) >> 16 | (rounded_to_high(odd) & 0xffff0000u);
    memcpy(p, &both, sizeof both);
  }

  // e^x for x <= 0, to 1 ulp; 0 below the least normal number; NaN for NaN.
  static R exp(R x) {
    const R magic = R{} + 12582912.0f;  // 1.5 * 2^23: its sum with n holds n in the low bits, rounded to nearest
    const R shifted = x * 1.44269504f + magic, n = shifted - magic;
    const R r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    R p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I exponent = (reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic) + 127) << 23;
    return x < -87.0f ? R{} : p * reinterpret_cast<R>(exponent);
  }
  static bool exp_is_zero(R x) { return !any(!(x < -87.0f)); }

 private:
  // v in bf16, to nearest even, in the high halves; what the low ones hold is of no meaning.
  static U rounded_to_high(R v) {
    const U bits = reinterpret_cast<U>(v), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return v == v ? rounded : (bits | 0x400000);
  }
};

struct F64 : Vectors<double, double_vector> {
  using Vectors::load;
  static R exp(R x) {
    for (int l = 0; l < L; ++l) x[l] = __builtin_exp(x[l]);
    return x;
  }
  static bool exp_is_zero(R x) { return !any(!(x < -750.0)); }
};
