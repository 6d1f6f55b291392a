// Losses of a head on raw row-major float32 memory, on all threads.
#pragma once

#include "ops/linear/cpu.h"

namespace segtrain::cpu {

/// The inputs of a loss of a head [V, hidden]. A target of V or above makes the results of its row NaN.
struct HeadInput {
  int m;
  float cap;               ///< softcap of the logits; 0: none
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

/// log softmax(z)[target] and lse, [m] each; 0 where the target is below 0.
void log_probs(const Weight& head, const HeadInput& in, float* log_p, float* lse);
/// dh [m, hidden] from log_probs' lse and the cotangent [m].
void log_probs_vjp(const Weight& head, const HeadInput& in, const float* lse, const float* dlog_p, float* dh);

/// Bytes of scratch, over all threads, for m rows with a target and a packed head.
size_t head_scratch(int m, int vocabulary, int hidden);

}  // namespace segtrain::cpu
