// Operations on the states of tiers, window and slot memory. Arguments have been checked by the caller
// (bind/state.cpp); B batch, H heads, J slots, d features, k entries read per head, W slots written.
// Every top-k gives equal values in ascending order of index.
#pragma once

#include <cstdint>

namespace thl {

// float32 [B, d] and [B, J, d] whose last dimension is contiguous; strides in elements.
struct Rows {
    float* data;
    int64_t stride;
    float* row(int64_t i) const { return data + i * stride; }
};

struct Slots {
    float* data;
    int64_t batch_stride, slot_stride;
    float* slot(int64_t b, int64_t j) const { return data + b * batch_stride + j * slot_stride; }
};

void gru_reset(Rows reset, Rows state, int64_t batch, int64_t d, Rows out);
void gru_update(Rows update, Rows candidate, int64_t batch, int64_t d, Rows state);
void layer_norm(Rows x, int64_t batch, int64_t d, const float* weight, const float* bias, float eps, Rows out);

// Softmax of scale * query . buffer_i over i < valid, and the sum of the entries with these weights; 0 if none.
void window_mix(Rows query, Slots buffer, int64_t batch, int64_t valid, int64_t d, float scale, Rows out);

// out[b, h, j] = scale * query[b, h] . memory[b, j] - penalty * read_ema[b, j]. Equal slots give equal bits.
void slot_scores(Slots query, Slots memory, const float* read_ema, int64_t batch, int64_t heads, int64_t slots,
                 int64_t d, float scale, float penalty, float* out);

// scores [B, H, J]; indices and alpha [B, H, k]; a negative capacity means none.
void slot_topk(const float* scores, int64_t batch, int64_t heads, int64_t slots, int64_t k, int64_t capacity,
               int64_t* indices, float* alpha);

void slot_mix(const float* alpha, const int64_t* indices, Slots memory, int64_t batch, int64_t heads, int64_t k,
              int64_t d, Slots out);

void read_metadata(const float* alpha, const int64_t* indices, int64_t batch, int64_t entries, int64_t slots,
                   double decay, int64_t t, float* read_ema, int64_t* last_read);

void slot_norms(Slots memory, int64_t batch, int64_t slots, int64_t d, float* out);

struct WriteRule {
    double clip_max, theta, beta, decay, ema_decay, stale_weight, underuse_weight;
};

struct NoveltyWrite {
    int64_t batch, slots, d, write_slots, t;
    Rows candidate;             // [B, d]
    Slots memory;               // [B, J, d], updated
    float* norms;               // [B, J], updated
    const float* read_ema;      // [B, J]
    float* write_ema;           // [B, J], updated
    int64_t* last_write;        // [B, J], updated
    Rows vector;                // [B, d], from here on outputs
    float *gate, *novelty;      // [B]
    int64_t *branch, *indices;  // [B], [B, W]
};

// Branches of a write: familiar content is added to similar slots, novel content to the least useful or to empty ones.
enum Branch : int64_t { kUpdate = 0, kLeastUseful = 1, kEmpty = 2 };

void novelty_write(const NoveltyWrite& arguments, const WriteRule& rule);

}  // namespace thl
