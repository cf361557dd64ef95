// AVX2. There is no 8-bit dot product that adds in 32 bits: vpmaddubsw sums pairs in 16. With
// 4-bit weights (0..15) eight such sums always fit, and `ends` says how many fit for these tokens.
#include "isa.h"

INLINE __m256i at(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

// sum += pairs of w * q in 16 bits. In assembly, because GCC copies all sums in every round
// otherwise, and to keep q a memory operand: this line is where the time goes.
INLINE __m256i add_products(__m256i sum, __m256i w, const int8_t *q) {
  __m256i products;
  __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sum), "=&x"(products)
          : "m"(*(const __m256i_u *)q), "x"(w));
  return sum;
}

INLINE __m256i add_wide_products(__m256i sum, __m256i x, const int16_t *w) {
  __m256i products;
  __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
          : "+x"(sum), "=&x"(products)
          : "m"(*(const __m256i_u *)w), "x"(x));
  return sum;
}

// out[t] += (sum of the lanes of v[t]) << shift, eight t at once
INLINE void add_sums(const __m256i *v, int shift, int32_t *out) {
  __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                 _mm256_permute2x128_si256(a, b, 0x31));
  __m256i *o = (__m256i *)out;
  *o = _mm256_add_epi32(*o, _mm256_sll_epi32(sum, _mm_cvtsi32_si128(shift)));
}

INLINE void add_float_sums(const __m256 *v, float times, float *out) {
  __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  __m256 sum = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                             _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_store_ps(out, _mm256_fmadd_ps(sum, _mm256_set1_ps(times), _mm256_load_ps(out)));
}

INLINE int32_t sum_i32(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE void dot_nt(const uint8_t *w, const int8_t *q, const int nt, const int *ends, int n,
                   int shift, int32_t *out) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int i = 0, k = 0; i < n; i++) {
    __m256i sum[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) sum[t] = _mm256_setzero_si256();
    for (int end = ends[i]; k < end; k += 32) {
      __m256i v = at(w + k);
#pragma GCC unroll 8
      for (int t = 0; t < nt; t++) sum[t] = add_products(sum[t], v, q + k * nt + 32 * t);
    }
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) sum[t] = _mm256_madd_epi16(sum[t], ones);
    add_sums(sum, shift, out);
  }
}

INLINE void groups_nt(const uint8_t *w, const int8_t *q, const int nt, int64_t length,
                      int64_t unit, const float *scale, int repeat, int shift, float *out) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) total[t] = _mm256_setzero_ps();
  int used = 0;
  for (int64_t k = 0; k < length;) {
    __m256i sum[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) sum[t] = _mm256_setzero_si256();
    for (int64_t end = k + unit; k < end; k += 32) {
      __m256i v = at(w + k);
#pragma GCC unroll 8
      for (int t = 0; t < nt; t++) sum[t] = add_products(sum[t], v, q + k * nt + 32 * t);
    }
    __m256 s = _mm256_set1_ps(*scale);
    if (++used == repeat) scale++, used = 0;
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) {
      __m256 f = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[t], ones));
      total[t] = _mm256_fmadd_ps(f, s, total[t]);
    }
  }
  add_float_sums(total, (float)(1 << shift), out);
}

static int32_t row_int4(const int8_t *packed, const int8_t *q, int64_t padded) {
  const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x88);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int64_t k = 0; k < padded;) {
    __m256i sum[4];
    for (int j = 0; j < 4; j++) sum[j] = _mm256_setzero_si256();
    for (int64_t end = least(k + 8 * BLOCK, padded); k < end; k += BLOCK) {
      _mm_prefetch((const char *)packed + k / 2 + AHEAD, _MM_HINT_T0);
      __m256i a = _mm256_xor_si256(at(packed + k / 2), flip);
      __m256i b = _mm256_xor_si256(at(packed + k / 2 + 32), flip);
      __m256i v[4] = {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask),
                      _mm256_and_si256(_mm256_srli_epi16(a, 4), mask),
                      _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(v[j], at(q + k + 32 * j)));
    }
    for (int j = 0; j < 4; j++)
      total = _mm256_add_epi32(total, _mm256_madd_epi16(sum[j], ones));
  }
  return sum_i32(total);
}

static int32_t row_int8(const int8_t *w, const int8_t *q, int64_t columns) {
  const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  __m256i total = _mm256_setzero_si256();
  int64_t whole = columns & ~(int64_t)31;
  for (int64_t k = 0; k < whole;) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t end = least(k + FLUSH, whole); k < end; k += 32) {
      _mm_prefetch((const char *)w + k + AHEAD, _MM_HINT_T0);
      __m256i v = _mm256_xor_si256(at(w + k), flip);
      low = add_products(low, _mm256_and_si256(v, mask), q + k);
      high = add_products(high, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), q + k);
    }
    total = _mm256_add_epi32(total, _mm256_madd_epi16(low, ones));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(high, sixteens));
  }
  int32_t sum = sum_i32(total);
  for (int64_t k = whole; k < columns; k++) sum += (w[k] + 128) * q[k];
  return sum;
}

INLINE void panel_part(const int16_t *x, const float *xs, int64_t x_stride, int64_t xs_stride,
                       const int nt, const int vectors, const int16_t *w, const float *ws,
                       int64_t depth, float *out) {
  for (int64_t k = 0; k < depth; xs++, ws += PANEL) {
    __m256i sum[2][4];
#pragma GCC unroll 2
    for (int t = 0; t < nt; t++)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[t][j] = _mm256_setzero_si256();
    for (int64_t end = least(k + GROUP, depth); k < end; k += 2, w += 2 * PANEL)
#pragma GCC unroll 2
      for (int t = 0; t < nt; t++) {
        int32_t two;
        memcpy(&two, x + t * x_stride + k, 4);
        __m256i both = _mm256_set1_epi32(two);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
          sum[t][j] = add_wide_products(sum[t][j], both, w + 16 * j);
      }
#pragma GCC unroll 2
    for (int t = 0; t < nt; t++) {
      __m256 s = _mm256_set1_ps(xs[t * xs_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        float *o = out + t * PANEL + 8 * j;
        __m256 f = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[t][j]), _mm256_loadu_ps(ws + 8 * j));
        _mm256_storeu_ps(o, _mm256_fmadd_ps(f, s, _mm256_loadu_ps(o)));
      }
    }
  }
}

#define PANEL_ROWS 2
#define PANEL_VECTOR 8
#define PANEL_CASES(CASE) CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) \
                          CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
#define ISA isa_avx2
#define ISA_NAME "avx2"
#define ISA_LANES 32
#define ISA_BITS 4
#include "isa_table.h"
