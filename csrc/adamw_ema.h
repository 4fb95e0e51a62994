// What the norm of the gradient decides about a step of AdamW, for CPU and CUDA alike.
#pragma once

#include <cmath>

#include "formulas.h"

namespace fastdmd {

struct Hyperparameters {
  double beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay, ema_warmup;
};

struct Factors {
  double grad;                // clips to max_grad_norm
  double decay;               // of the weights
  double step_size;           // the learning rate, with the bias of the first moment undone
  double inverse_sqrt_bias2;  // undoes that of the second
  double ema_weight;          // 1 - decay of the average, which warms up
  int64_t moves;              // 0: the norm was not finite, and nothing changes
};

// For step number t = 1, 2, ...
FASTDMD_INLINE Factors factors_of(const Hyperparameters& h, double norm, double learning_rate, double t, bool moves) {
  const double warm = t / (t + h.ema_warmup);
  return {
      std::isinf(h.max_grad_norm) || h.max_grad_norm >= norm + 1e-6 ? 1.0 : h.max_grad_norm / (norm + 1e-6),
      1 - learning_rate * h.weight_decay,
      learning_rate / (1 - std::pow(h.beta1, t)),
      1 / std::sqrt(1 - std::pow(h.beta2, t)),
      1 - (warm < h.ema_decay ? warm : h.ema_decay),
      moves,
  };
}

}  // namespace fastdmd
