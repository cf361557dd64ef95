#pragma once
#include "lowrank.h"

#define SPAN 256         // tokens of a task
#define SLAB 1024        // tokens made ready at once: bounds the scratch
#define FLOAT_CHUNK 512  // inputs of one pass over floats: TILE x FLOAT_CHUNK of u in cache

// One call of gemm_w4a8, gemm_w8a8 or gemm_w4a16. Field order is known to cpu/__init__.py.
typedef struct {
  const int8_t *q;            // [tokens, padded]; NULL: u is multiplied
  const float *scale;         // [tokens]
  const void *u;              // NULL, or [tokens, columns], rows u_stride elements apart
  const int8_t *packed;       // [out, row_bytes]
  const float *weight_scale;  // [out, groups]
  const int8_t *zero;         // NULL, or [out, groups]
  const void *bias;           // NULL, or [out]
  const void *h;              // NULL, or [tokens, count * rank]
  const uint16_t *lr_b;       // f16 [count, rank, out]
  const int32_t *modality;    // [tokens]
  void *y;                    // [tokens, out]
  int64_t tokens, padded, columns, out, row_bytes, groups, group_size, count, rank,
      u_stride;
  int bits, u_type, bias_type, h_type, y_type, threads;
} gemm_t;

// Tokens made ready: interleaved tiles of q, sums to take the weights' offset off, where to flush.
typedef struct {
  int8_t *q;             // [tiles][padded / lanes][nt][lanes]
  float *u;              // [tiles][padded / 8][nt][8]
  int32_t *sums;         // [tiles * TILE]
  float *group_sums;     // [tiles][groups][TILE]
  int *ends, *count;     // [tiles][chunks][CHUNK / FLUSH], [tiles][chunks]
  float *hf;             // [tokens][low_blocks * GROUP], of the token's own modality
  int16_t *h;            // the same in integers
  float *hs;             // [tokens][low_blocks]
  int64_t step, chunks;  // inputs of one pass, passes
  int64_t low_blocks;
} ready_t;

// What an unsigned weight has more than its value: 8 or 128, and the zero point of its scale i.
INLINE int32_t offset_of(const gemm_t *g, int64_t i) {
  return (g->bits == 4 ? 8 : 128) + (g->zero ? g->zero[i] : 0);
}

int32_t sum_q(const int8_t *q, int64_t n);
void ready_tile(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t tile);
void ready_hidden(const gemm_t *g, const ready_t *r, int64_t token);

// low[tokens from..to of a task][PANEL] = h @ lr_b; 0 when they are all of the base modality
int low_rank(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t from, int64_t to,
             int64_t first, int64_t wide, float *low);

// The task's part of y for one tile. sums: int32 (q, one weight scale a row) or f32 [PANEL][TILE].
void finish_tile(const gemm_t *g, const ready_t *r, int64_t tile, int64_t first, int64_t wide,
                 const int32_t *sums, const float *low);

// sums[i][n][t] += the products of one pass over u, for tile i of the task and its output n
void float_pass(const gemm_t *g, const ready_t *r, int64_t pass, int64_t from, int64_t tiles,
                int64_t first, int64_t wide, float *sums);

// While a row of this pass is multiplied, the same row of the next pass is fetched (after the last
// pass: the row a panel below, which this thread mostly takes next).
INLINE void prefetch(const gemm_t *g, int64_t pass, int64_t step, int64_t passes, int64_t row) {
  if (++pass == passes) pass = 0, row += PANEL;
  if (row >= g->out) return;
  int64_t from = pass * step, to = least(from + step, g->columns);
  if (g->bits == 4) from /= 2, to = least(ceil_div(to, 2), g->row_bytes);
  for (; from < to; from += 64)
    _mm_prefetch((const char *)g->packed + row * g->row_bytes + from, _MM_HINT_T1);
}

void mq_gemm(const gemm_t *g);
