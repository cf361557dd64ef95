// What a GEMM does to its tokens before any task starts.
#include "gemm.h"

int32_t sum_q(const int8_t *q, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < n; k++) sum += q[k];
  return sum;
}

// After how many inputs 16-bit sums of w * q (0 <= w <= 15) must be widened. FLUSH always works, but
// |q| is mostly far below 127, and what is positive and what is negative counts apart: a sum lies
// between -15 * (sum of the negative |q|) and 15 * (sum of the positive q). Both are summed here as
// the kernel sums, per lane and saturating.
static int find_ends(const int8_t *q, int nt, int64_t length, int *ends) {
  const __m256i fifteen = _mm256_set1_epi8(15), full = _mm256_set1_epi16(0x7fff);
  const __m256i zero = _mm256_setzero_si256();
  __m256i sum[2][TILE];
  int n = 0;
  for (int t = 0; t < nt; t++) sum[0][t] = sum[1][t] = zero;
  for (int64_t k = 0; k < length; k += 32) {
    __m256i next[2][TILE], over = zero;
    for (int t = 0; t < nt; t++) {
      __m256i v = _mm256_load_si256((const __m256i *)(q + k * nt + 32 * t));
      for (int negative = 0; negative < 2; negative++, v = _mm256_sub_epi8(zero, v)) {
        next[negative][t] = _mm256_maddubs_epi16(fifteen, _mm256_max_epi8(v, zero));
        sum[negative][t] = _mm256_adds_epi16(sum[negative][t], next[negative][t]);
        over = _mm256_or_si256(over, _mm256_cmpeq_epi16(sum[negative][t], full));
      }
    }
    if (_mm256_movemask_epi8(over)) {
      ends[n++] = (int)k;
      memcpy(sum, next, sizeof sum);
    }
  }
  ends[n++] = (int)length;
  return n;
}

static void ready_floats(const gemm_t *g, const ready_t *r, int64_t tile) {
  int nt = (int)least(TILE, g->tokens - tile * TILE);
  float *out = r->u + tile * TILE * g->padded;
  for (int t = 0; t < nt; t++) {
    int64_t row = (tile * TILE + t) * g->u_stride, k = 0;
    for (; k + LANES <= g->columns; k += LANES)
      store8(out + k * nt + LANES * t, 0, load8(g->u, row + k, g->u_type), F32);
    for (; k < g->padded; k++)
      out[k / LANES * LANES * nt + LANES * t + k % LANES] =
          k < g->columns ? load1(g->u, row + k, g->u_type) : 0;
  }
}

void ready_tile(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t tile) {
  if (g->u) {
    ready_floats(g, r, tile);
    return;
  }
  int64_t first = tile * TILE, padded = g->padded, size = g->group_size;
  int nt = (int)least(TILE, g->tokens - first), lanes = isa->lanes;
  int8_t *out = r->q + first * padded;
  for (int t = 0; t < nt; t++) {
    const int8_t *q = g->q + (first + t) * padded;
    for (int64_t k = 0; k < padded; k += 32) {
      int64_t at = k / lanes * lanes * nt + lanes * t + k % lanes;
      _mm256_store_si256((__m256i *)(out + at), _mm256_loadu_si256((const __m256i *)(q + k)));
    }
    if (!size) r->sums[first + t] = sum_q(q, padded);
    for (int64_t i = 0; size && i < g->groups; i++)
      r->group_sums[(tile * g->groups + i) * TILE + t] = (float)sum_q(q + i * size, size);
  }
  if (size) return;
  for (int64_t c = 0; c < r->chunks; c++) {
    int64_t length = least(CHUNK, padded - c * CHUNK), at = tile * r->chunks + c;
    int *ends = r->ends + at * (CHUNK / FLUSH);
    r->count[at] = isa->bits == 8 ? 1 : find_ends(out + c * CHUNK * nt, nt, length, ends);
    if (isa->bits == 8) ends[0] = (int)length;
  }
}

void ready_hidden(const gemm_t *g, const ready_t *r, int64_t t) {
  int m = g->modality[t];
  if (m < 1) return;
  int64_t padded = r->low_blocks * GROUP;
  float *v = r->hf + t * padded;
  int64_t from = (t * g->count + m - 1) * g->rank, i = 0;
  for (; i + LANES <= g->rank; i += LANES) store8(v, i, load8(g->h, from + i, g->h_type), F32);
  for (; i < padded; i++) v[i] = i < g->rank ? load1(g->h, from + i, g->h_type) : 0;
  for (int64_t b = 0; b < r->low_blocks; b++)
    r->hs[t * r->low_blocks + b] = to_block(v + b * GROUP, r->h + t * padded + b * GROUP);
}
