// Computes the losses of a language-model head on raw row-major float32 memory, using all threads.
#pragma once

#include "ops/linear/cpu.h"

namespace segtrain::cpu {

/// The inputs of a loss, for a head whose weight is [V, hidden]. If a row's target is V or larger, the row's
/// results are NaN.
struct HeadInput {
  int m;
  float cap;               ///< softcap of the logits; 0 means none
  const float* h;          ///< [m, hidden]
  const float* bias;       ///< [V], or null
  const int32_t* targets;  ///< [m]; a row with a target below 0 is skipped
};

struct CrossEntropy {
  HeadInput in;
  float smoothing;
  const float* weights;
  float* loss;  ///< scalar
  float* dh;    ///< [m, hidden], or null
};
void cross_entropy(const Weight& head, const CrossEntropy& args);

/// Computes log softmax(z)[target] and lse, [m] each. Both are 0 for rows whose target is below 0.
void log_probs(const Weight& head, const HeadInput& in, float* log_p, float* lse);
/// Computes dh [m, hidden] from the lse of log_probs and the cotangent [m].
void log_probs_vjp(const Weight& head, const HeadInput& in, const float* lse, const float* dlog_p, float* dh);

/// Returns the number of bytes of scratch memory that all threads together need for m rows with a target, if
/// the head is quantized.
size_t head_scratch(int m, int vocabulary, int hidden);

}  // namespace segtrain::cpu
