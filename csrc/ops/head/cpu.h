// Losses of a head on raw row-major float32 memory, on all threads.
#pragma once

#include "ops/linear/cpu.h"

namespace segtrain::cpu {

/// What meets a head [V, hidden]. A target of V or above makes its row's results NaN.
struct HeadInput {
  int m;
  float cap;               ///< of the logits; 0: none
  const float* h;          ///< [m, hidden]
  const float* bias;       ///< [V], or null
  const int32_t* targets;  ///< [m]; below 0: the row is not touched
};

struct CrossEntropy {
  HeadInput in;
  float smoothing;
  const float* weights;
  float* loss;  ///< scalar
  float* dh;    ///< [m, hidden], or null
};
void cross_entropy(const Weight& head, const CrossEntropy& args);

/// log softmax(z)[target] and lse, [m] each; 0 where the target is below 0.
void log_probs(const Weight& head, const HeadInput& in, float* log_p, float* lse);
/// dh [m, hidden] from log_probs' lse and the cotangent [m].
void log_probs_vjp(const Weight& head, const HeadInput& in, const float* lse, const float* dlog_p, float* dh);

/// Bytes of scratch on all threads for m rows that count, the head being packed.
size_t head_scratch(int m, int vocabulary, int hidden);

}  // namespace segtrain::cpu
