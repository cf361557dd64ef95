// The end of a task: low rank, offsets and scales, bias, and the rows of y.
#include "gemm.h"

int low_rank(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t from, int64_t to,
             int64_t first, int64_t wide, float *low) {
  int any = 0;
  int64_t padded = r->low_blocks * GROUP;
  for (int m = 1; m <= g->count; m++) {
    int64_t rows = 0, converted = 0;
    for (int64_t t = from; t < to; t++) rows += g->modality[t] == m;
    if (!rows) continue;
    if (!any) memset(low, 0, (size_t)((to - from) * PANEL) * 4);
    any = 1;
    int16_t *w = scratch(3, (size_t)(padded * PANEL) * 2);
    float *ws = scratch(4, (size_t)(r->low_blocks * PANEL) * 4);
    const uint16_t *start = g->lr_b + (m - 1) * g->rank * g->out;
    factor_t factor = {start + first, start + g->rank * g->out, g->out};
    for (int64_t a = from, b; a < to; a = b) {
      for (b = a + 1; b < to && g->modality[b] == g->modality[a];) b++;
      if (g->modality[a] != m) continue;  // [a, b) is a run of one modality
      float *out = low + (a - from) * PANEL;
      if (rows < FEW) {
        few_tokens(r->hf + a * padded, padded, b - a, &factor, g->rank, wide, out);
        continue;
      }
      if (!converted++) to_panel(&factor, g->rank, wide, w, ws);
      isa->panel(r->h + a * padded, r->hs + a * r->low_blocks, padded, r->low_blocks,
                 (int)(b - a), w, ws, (g->rank + 1) & ~1LL, wide, out);
    }
  }
  return any;
}

// [8 outputs][8 tokens] -> [8 tokens][8 outputs]
INLINE void transpose8(f8 *v) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// What the unsigned weights, w + 8 or w + 128, and zero points add to the sums of one output for a
// tile of tokens: subtracted here, and the sums turned into floats.
INLINE f8 take_off(const gemm_t *g, const ready_t *r, int64_t tile, int64_t o, const void *sums) {
  if (g->u) return load8(sums, 0, F32);
  if (!g->group_size) {
    __m256i by = _mm256_set1_epi32(offset_of(g, o));
    __m256i s = _mm256_load_si256((const __m256i *)(r->sums + tile * TILE));
    s = _mm256_sub_epi32(_mm256_load_si256((const __m256i *)sums), _mm256_mullo_epi32(by, s));
    return (f8)_mm256_cvtepi32_ps(s);
  }
  f8 v = load8(sums, 0, F32);
  const float *q = r->group_sums + tile * g->groups * TILE, *scale = g->weight_scale;
  for (int64_t i = 0, at = o * g->groups; i < g->groups; i++, at++)
    v -= scale[at] * (float)offset_of(g, at) * load8(q, i * TILE, F32);
  return v;
}

void finish_tile(const gemm_t *g, const ready_t *r, int64_t tile, int64_t first, int64_t wide,
                 const int32_t *sums, const float *low) {
  int nt = (int)least(TILE, g->tokens - tile * TILE), integers = !g->group_size && !g->u;
  for (int64_t n = 0; n < wide; n += LANES) {
    int64_t o = first + n;
    int some = (int)least(LANES, wide - n);
    f8 v[LANES], scale = splat(1), bias = splat(0);
    for (int i = 0; i < LANES; i++)
      v[i] = i < some ? take_off(g, r, tile, o + i, sums + (n + i) * TILE) : splat(0);
    if (some == LANES) {
      if (integers) scale = load8(g->weight_scale, o, F32);
      if (g->bias) bias = load8(g->bias, o, g->bias_type);
    } else {
      for (int i = 0; i < some; i++) {
        if (integers) scale[i] = g->weight_scale[o + i];
        if (g->bias) bias[i] = load1(g->bias, o + i, g->bias_type);
      }
    }
    transpose8(v);
    for (int t = 0; t < nt; t++) {
      int64_t row = tile * TILE + t, at = row * g->out + o;
      f8 y = g->u ? v[t] : v[t] * g->scale[row] * scale;
      if (low) y += load8(low, t * PANEL + n, F32);
      if (g->bias) y += bias;
      if (some == LANES) store8(g->y, at, y, g->y_type);
      else
        for (int i = 0; i < some; i++) store1(g->y, at + i, y[i], g->y_type);
    }
  }
}
