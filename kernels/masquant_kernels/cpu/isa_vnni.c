// AVX-512 with VNNI: vpdpbusd multiplies unsigned weights with signed activations and adds four
// products in 32 bits, so nothing can overflow and `ends` only gives the length.
#include "isa.h"

INLINE __m512i at(const void *p) { return _mm512_loadu_si512(p); }

INLINE void dot_nt(const uint8_t *w, const int8_t *q, const int nt, const int *ends, int n,
                   int shift, int32_t *out) {
  __m512i sum[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++) sum[t] = _mm512_setzero_si512();
  for (int k = 0; k < ends[n - 1]; k += 64) {
    __m512i v = at(w + k);
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) sum[t] = _mm512_dpbusd_epi32(sum[t], v, at(q + k * nt + 64 * t));
  }
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++) out[t] += _mm512_reduce_add_epi32(sum[t]) * (1 << shift);
}

INLINE void groups_nt(const uint8_t *w, const int8_t *q, const int nt, int64_t length,
                      int64_t unit, const float *scale, int repeat, int shift, float *out) {
  __m512 total[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++) total[t] = _mm512_setzero_ps();
  int used = 0;
  for (int64_t k = 0; k < length;) {
    __m512i sum[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++) sum[t] = _mm512_setzero_si512();
    for (int64_t end = k + unit; k < end; k += 64) {
      __m512i v = at(w + k);
#pragma GCC unroll 8
      for (int t = 0; t < nt; t++)
        sum[t] = _mm512_dpbusd_epi32(sum[t], v, at(q + k * nt + 64 * t));
    }
    __m512 s = _mm512_set1_ps(*scale);
    if (++used == repeat) scale++, used = 0;
#pragma GCC unroll 8
    for (int t = 0; t < nt; t++)
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), s, total[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++) out[t] += (float)(1 << shift) * _mm512_reduce_add_ps(total[t]);
}

static int32_t row_int4(const int8_t *packed, const int8_t *q, int64_t padded) {
  const __m512i mask = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x88);
  __m512i low = _mm512_setzero_si512(), high = low;
  for (int64_t k = 0; k < padded; k += BLOCK) {  // one load is one block
    _mm_prefetch((const char *)packed + k / 2 + AHEAD, _MM_HINT_T0);
    __m512i p = _mm512_xor_si512(at(packed + k / 2), flip);
    low = _mm512_dpbusd_epi32(low, _mm512_and_si512(p, mask), at(q + k));
    high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16(p, 4), mask),
                               at(q + k + 64));
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}

static int32_t row_int8(const int8_t *w, const int8_t *q, int64_t columns) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i total = _mm512_setzero_si512();
  int64_t whole = columns & ~(int64_t)63;
  for (int64_t k = 0; k < whole; k += 64) {
    _mm_prefetch((const char *)w + k + AHEAD, _MM_HINT_T0);
    total = _mm512_dpbusd_epi32(total, _mm512_xor_si512(at(w + k), flip), at(q + k));
  }
  int32_t sum = _mm512_reduce_add_epi32(total);
  for (int64_t k = whole; k < columns; k++) sum += (w[k] + 128) * q[k];
  return sum;
}

INLINE void panel_part(const int16_t *x, const float *xs, int64_t x_stride, int64_t xs_stride,
                       const int nt, const int vectors, const int16_t *w, const float *ws,
                       int64_t depth, float *out) {
  for (int64_t k = 0; k < depth; xs++, ws += PANEL) {
    __m512i sum[4][2];
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) sum[t][0] = sum[t][1] = _mm512_setzero_si512();
    for (int64_t end = least(k + GROUP, depth); k < end; k += 2, w += 2 * PANEL) {
      __m512i v[2] = {at(w), at(w + 32)};
#pragma GCC unroll 4
      for (int t = 0; t < nt; t++) {
        int32_t two;
        memcpy(&two, x + t * x_stride + k, 4);
        __m512i both = _mm512_set1_epi32(two);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[t][j] = _mm512_dpwssd_epi32(sum[t][j], v[j], both);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) {
      __m512 s = _mm512_set1_ps(xs[t * xs_stride]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) {
        float *o = out + t * PANEL + 16 * j;
        __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t][j]), _mm512_loadu_ps(ws + 16 * j));
        _mm512_storeu_ps(o, _mm512_fmadd_ps(f, s, _mm512_loadu_ps(o)));
      }
    }
  }
}

#define PANEL_ROWS 4
#define PANEL_VECTOR 16
#define PANEL_CASES(CASE) CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) \
                          CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2)
#define ISA isa_vnni
#define ISA_NAME "avx512-vnni"
#define ISA_LANES 64
#define ISA_BITS 8
#include "isa_table.h"
