#pragma once
#include "lowrank.h"

// One call of gemm_w4a8 or gemm_w8a8. Field order is known to cpu/__init__.py.
typedef struct {
  const int8_t *q;            // [tokens, padded]
  const float *scale;         // [tokens]
  const int8_t *packed;       // [out, row_bytes]
  const float *weight_scale;  // [out, groups]
  const int8_t *zero;         // NULL, or [out, groups]
  const void *bias;           // NULL, or [out]
  const void *h;              // NULL, or [tokens, count * rank]
  const uint16_t *lr_b;       // f16 [count, rank, out]
  const int32_t *modality;    // [tokens]
  void *y;                    // [tokens, out]
  int64_t tokens, padded, columns, out, row_bytes, groups, group_size, count, rank;
  int bits, bias_type, h_type, y_type, threads;
} gemm_t;

// Tokens made ready: interleaved tiles of q, sums to take the weights' offset off, where to flush.
typedef struct {
  int8_t *q;             // [tiles][padded / lanes][nt][lanes]
  int32_t *sums;         // [tokens]
  float *group_sums;     // [tokens][group_stride]
  int *ends, *count;     // [tiles][chunks][CHUNK / FLUSH], [tiles][chunks]
  int16_t *h;            // [tokens][low_blocks * GROUP], of the token's own modality
  float *hs;             // [tokens][low_blocks]
  int64_t step, chunks;  // inputs of one pass, passes
  int64_t group_stride, low_blocks;
} ready_t;

int32_t sum_q(const int8_t *q, int64_t n);
void ready_tile(const gemm_t *g, const ready_t *r, const isa_t *isa, int64_t tile);
void ready_hidden(const gemm_t *g, const ready_t *r, int64_t token);
void mq_gemm(const gemm_t *g);
