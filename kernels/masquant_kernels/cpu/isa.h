// The inner loops, once per instruction set: isa_avx2.c and isa_vnni.c each fill one table.
#pragma once
#include "common.h"

#define TILE 8      // tokens of one inner loop
#define CHUNK 2048  // inputs of one pass: TILE x CHUNK bytes of q stay in the first-level cache
                    // q of a tile is interleaved, [k / lanes][nt][lanes]: one stream, and rows whose
                    // length is a power of two do not fall on the same cache lines
#define AHEAD 2048  // bytes that weights are asked for before they are needed
#define FLUSH 256   // inputs that 16-bit sums can always take: 8 x 2 x 15 x 127 < 2^15
#define PANEL 32    // outputs of one task, columns of one low-rank panel
#define GROUP 64    // inputs that share a scale in low-rank products,
#define LIMIT 5792  // and their largest integer: LIMIT^2 x GROUP < 2^31

typedef struct {
  const char *name;
  int lanes;  // bytes of one vector: group sizes must be multiples
  int bits;   // of the unsigned weights that `dot` takes

  // out[t] += sum_k w[k] * q[t][k] << shift for an interleaved tile of nt <= TILE tokens, w unsigned.
  // 16-bit sums, where they are needed, end at ends[0..n), the last of which is the length.
  void (*dot)(const uint8_t *w, const int8_t *q, int nt, const int *ends, int n, int shift,
              int32_t *out);

  // The same with a scale for every group of repeat x unit inputs: sum_g scale[g] * sum_{k in g} ...
  void (*dot_groups)(const uint8_t *w, const int8_t *q, int nt, int64_t length, int64_t unit,
                     const float *scale, int repeat, int shift, float *out);

  // One packed row times one row of q: sum_k (w[k] + 8) * q[k] and sum_k (w[k] + 128) * q[k].
  int32_t (*row_int4)(const int8_t *packed, const int8_t *q, int64_t padded);
  int32_t (*row_int8)(const int8_t *w, const int8_t *q, int64_t columns);

  // out[t][0..wide) += sum_b xs[t][b] * ws[b][n] * sum_{k in b} x[t][k] * w[b][k / 2][n][k % 2]
  // for inputs 0..depth (even), blocks b of GROUP; rows of x and xs are x_stride, xs_stride apart.
  void (*panel)(const int16_t *x, const float *xs, int64_t x_stride, int64_t xs_stride, int nt,
                const int16_t *w, const float *ws, int64_t depth, int64_t wide, float *out);
} isa_t;

extern const isa_t isa_avx2, isa_vnni;
const isa_t *isa_here(void);

// packed int4 -> w + 8 in 0..15, natural order; inputs from..to are whole blocks
INLINE void unpack_biased(const int8_t *packed, int64_t from, int64_t to, uint8_t *out) {
  const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x88);
  for (int64_t k = from; k < to; k += BLOCK)
    for (int half = 0; half < 64; half += 32) {
      __m256i p = _mm256_loadu_si256((const __m256i *)(packed + k / 2 + half));
      p = _mm256_xor_si256(p, flip);
      __m256i low = _mm256_and_si256(p, mask);
      __m256i high = _mm256_and_si256(_mm256_srli_epi16(p, 4), mask);
      _mm256_store_si256((__m256i *)(out + k - from + half), low);
      _mm256_store_si256((__m256i *)(out + k - from + 64 + half), high);
    }
}

// int8 -> w + 128 in 0..255, or its low and high halves; zero weights past `columns`
INLINE void unpack_bytes(const int8_t *w, int64_t from, int64_t to, int64_t columns, uint8_t *low,
                         uint8_t *high) {
  const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
  for (int64_t k = from; k < to; k += 32) {
    __m256i v = _mm256_setzero_si256();
    if (k + 32 <= columns) v = _mm256_loadu_si256((const __m256i *)(w + k));
    else if (k < columns) memcpy(&v, w + k, (size_t)(columns - k));
    v = _mm256_xor_si256(v, flip);
    if (high) {
      __m256i top = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
      _mm256_store_si256((__m256i *)(high + k - from), top);
      v = _mm256_and_si256(v, mask);
    }
    _mm256_store_si256((__m256i *)(low + k - from), v);
  }
}
