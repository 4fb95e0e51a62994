// What the CPU kernels compute and how they are called. Their files, FASTDMD_KERNELS in CMakeLists.txt, are compiled
// once per instruction set, in a namespace of that name; instruction_set.cpp chooses at run time. They know nothing of
// torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../adamw_ema.h"
#include "../dtype.h"
#include "../formulas.h"

namespace fastdmd {

// All images are dense and in one memory order: sample b is elements [b * sample_size, (b + 1) * sample_size).
// `begin` and `end` count elements, so that threads may split the work anywhere.

struct AddNoise {
  Dtype dtype, out_dtype;
  const void* x;        // [B * sample_size]
  const void* noise;    // [B * sample_size]; null for add_noise_rng
  void* out;            // [B * sample_size], of out_dtype
  const double* sigma;  // [B]
  const double* scale;  // [B], or null for 1
  int64_t sample_size;
  RngKey key;            // of add_noise_rng
  int64_t num_channels;  // likewise, that alternate in memory

  int64_t num_quads() const { return (sample_size + 3) / 4; }  // of normals, of a sample
};

struct DMLoss {
  Dtype dtype, grad_dtype;
  const void* x_gen;  // [B * sample_size]
  const void* real;   // [B * sample_size]: D_real, or F_real if x_t is given
  const void* fake;   // [B * sample_size]: D_fake, or F_fake if x_t is given
  const void* x_t;    // [B * sample_size], or null
  void* grad;         // [B * sample_size], of grad_dtype: factor * grad
  double factor;
  double c_skip, c_out;  // of the sample at hand, if x_t is given
};

struct FakeLoss {
  Dtype dtype, grad_dtype;
  const void* output;  // [B * sample_size]: D_x, or F_x if x_t is given
  const void* images;  // [B * sample_size]
  const void* x_t;     // [B * sample_size], or null
  void* grad;          // [B * sample_size], of grad_dtype: factor * weight * error
  double factor;
  double weight;  // of the sample at hand, 1 if x_t is given
  double c_skip, inverse_c_out;
};

// One sample of group_norm_silu. Element (c, p) is at c * channel_stride + p * pixel_stride; one of the two is 1.
struct GroupNormSiLU {
  Dtype dtype;
  const void* x;           // [C, H, W]
  const void* grad_y;      // [C, H, W], backward only
  void* out;               // [C, H, W]: y, or grad_x
  double* mean;            // [G], written by forward, read by backward
  double* rstd;            // [G], likewise
  const double* weight;    // [C]
  const double* bias;      // [C]
  const double* scale;     // [C], or null
  const double* shift;     // [C], or null
  const double* x_offset;  // [C], added to x, or null
  double* sum_grad;        // [C], written by backward: the sum over pixels of grad_m
  double* sum_grad_h;      // [C], likewise of grad_m * h
  double* sum_grad_x;      // [C], likewise of grad_x, if there is an x_offset
  int64_t num_channels, num_groups, num_pixels, channel_stride, pixel_stride, x_offset_stride;
  double eps;
  bool silu;
};

// A 3x3 convolution, padded by one, of dense channels_last images, float32 or bfloat16. Element (o, i, y, x) of the
// weight is at o * weight_out + i * weight_in + y * weight_y + x * weight_x. Numbers of channels are multiples of
// CHANNEL_STEP.
struct Conv3x3 {
  static constexpr int64_t CHANNEL_STEP = 16, TILE_STEP = 8;
  Dtype dtype;
  const void* x;       // [num_images, height, width, in_channels]
  const void* bias;    // [out_channels], or null
  void* weight;        // [out_channels, in_channels, 3, 3], strided
  void* y;             // [num_images, height, width, y_channels], of which out_channels from this one on are meant
  float* transformed;  // [transformed_size()]: the weight, by conv3x3_weights; or null, and conv3x3 does that itself
  float* sums;         // [sums_size()], for the gradient of the weight
  int64_t num_images, height, width, in_channels, out_channels, y_channels;
  int64_t weight_out, weight_in, weight_y, weight_x;
  bool flipped;  // the weight upside down and mirrored, as the gradient of the input wants it
  int tile;      // outputs a side of what Winograd's filtering computes at once, 2 or 4

  // Of each image, down x across tiles from pixel (top, left) on. They have rows x columns outputs, `tile` a side, or
  // at the lower and the right edge the fewer that are left, and as many matrices.
  struct Tiles {
    int64_t top, left, down, across, rows, columns;

    int64_t per_image() const { return down * across; }
    int64_t num_matrices() const { return (rows + 2) * (columns + 2); }
  };
  static constexpr int MAX_KINDS = 4;
  Tiles kinds[MAX_KINDS];
  int num_kinds;

  // A step is up to TILE_STEP tiles of a kind. Steps are in order of sets of SET images, in a set of kinds: so images
  // are read from memory once, and threads that halve the work halve the images, as they do in other ops. Since SET is
  // a multiple of TILE_STEP, no step is less filled for it.
  static constexpr int64_t SET = 8;
  static int64_t steps(const Tiles& kind, int64_t images) {
    return (images * kind.per_image() + TILE_STEP - 1) / TILE_STEP;
  }
  int64_t steps(int64_t images) const {
    int64_t sum = 0;
    for (int k = 0; k < num_kinds; ++k) sum += steps(kinds[k], images);
    return sum;
  }
  int64_t steps() const { return num_images / SET * steps(SET) + steps(num_images % SET); }

  // The steps that conv3x3 works on at once; for each so many it reads, or transforms, the weight.
  static constexpr int64_t block_steps(int tile) { return tile == 4 ? 4 : 8; }

  // Rows of a matrix of a panel. One is not used: it keeps the matrices out of each other's cache lines.
  int64_t rows() const { return in_channels + 1; }
  int64_t transformed_size() const { return (tile + 2) * (tile + 2) * rows() * out_channels; }
  int64_t sums_size() const { return 9 * in_channels * out_channels; }
};

// A 1x1 convolution of dense channels_last images, float32. Numbers of channels are multiples of Conv3x3::CHANNEL_STEP.
struct Conv1x1 {
  static constexpr int64_t STEP = 8;  // pixels, or channels of the gradients of parameters, that a thread has at least
  const float* x;                     // [num_pixels, in_channels]
  const float* weight;                // [out_channels, in_channels]
  const float* bias;                  // [out_channels], or null
  const float* grad_y;                // [num_pixels, out_channels], for the gradients of parameters
  float* matrix;                      // [in_channels, out_channels]: the weight, by conv1x1_weights
  float* y;                           // [num_pixels, out_channels]
  float* grad_weight;                 // [out_channels, in_channels]
  float* grad_bias;                   // [out_channels]
  int64_t num_pixels, in_channels, out_channels;
};

struct AdamW {
  Dtype dtype, grad_dtype, shadow_dtype;
  void* param;       // [n]
  void* grad;        // [n]
  void* exp_avg;     // [n]
  void* exp_avg_sq;  // [n]
  void* ema;         // [n], or null
  void* shadow;      // [n], or null
  Hyperparameters hyperparameters;
  Factors factors;
  bool zero_grad;
};

struct Kernels {
  void (*philox)(const int64_t* counter,  // [N, 4]
                 const int64_t* key,      // [2]
                 int64_t* words,          // [N, 4]
                 int64_t begin,
                 int64_t end);
  void (*add_noise)(const AddNoise&, int64_t begin, int64_t end);
  // `begin` and `end` count quads of normals, those of all samples
  void (*add_noise_rng)(const AddNoise&, int64_t begin, int64_t end);
  // of elements [begin, end) of sample key.first_sample
  void (*normals)(float* out,  // [end - begin]
                  const RngKey& key,
                  int64_t begin,
                  int64_t end);
  // sum |p_real|
  double (*dm_weight)(const DMLoss&, int64_t begin, int64_t end);
  // writes grad; sum grad^2
  double (*dm_gradient)(const DMLoss&, int64_t begin, int64_t end, double w);
  // writes grad; sum weight * error^2
  double (*fake_loss)(const FakeLoss&, int64_t begin, int64_t end);
  void (*scale_gradient)(const void* grad,  // [n]
                         Dtype,
                         void* out,  // [n]
                         Dtype,
                         double factor,
                         int64_t begin,
                         int64_t end);
  void (*group_norm_silu)(const GroupNormSiLU&, int64_t group_begin, int64_t group_end);
  void (*group_norm_silu_backward)(const GroupNormSiLU&, int64_t group_begin, int64_t group_end);
  void (*conv3x3_weights)(const Conv3x3&, int64_t begin, int64_t end);
  void (*conv3x3)(const Conv3x3&, int64_t begin, int64_t end);
  void (*conv3x3_weight_sums)(const Conv3x3&,
                              double* bias_sums,  // [out_channels]
                              int64_t begin,
                              int64_t end);
  void (*conv3x3_weight_gradient)(const Conv3x3&, int64_t num_sums, int64_t begin, int64_t end);
  void (*conv1x1_weights)(const Conv1x1&);
  void (*conv1x1)(const Conv1x1&, int64_t begin, int64_t end);
  void (*conv1x1_parameters)(const Conv1x1&, int64_t begin, int64_t end);
  double (*sum_of_squares)(const void* grad,  // [n]
                           Dtype,
                           int64_t begin,
                           int64_t end);
  void (*adamw)(const AdamW&, int64_t begin, int64_t end);
};

// A function of the type that Kernels gives a pointer of that name.
#define FASTDMD_DECLARE_KERNEL(name) std::remove_pointer_t<decltype(Kernels::name)> name;

#define FASTDMD_DECLARE_KERNELS(isa)               \
  namespace isa {                                  \
  FASTDMD_DECLARE_KERNEL(philox)                   \
  FASTDMD_DECLARE_KERNEL(add_noise)                \
  FASTDMD_DECLARE_KERNEL(add_noise_rng)            \
  FASTDMD_DECLARE_KERNEL(normals)                  \
  FASTDMD_DECLARE_KERNEL(dm_weight)                \
  FASTDMD_DECLARE_KERNEL(dm_gradient)              \
  FASTDMD_DECLARE_KERNEL(fake_loss)                \
  FASTDMD_DECLARE_KERNEL(scale_gradient)           \
  FASTDMD_DECLARE_KERNEL(group_norm_silu)          \
  FASTDMD_DECLARE_KERNEL(group_norm_silu_backward) \
  FASTDMD_DECLARE_KERNEL(conv3x3_weights)          \
  FASTDMD_DECLARE_KERNEL(conv3x3)                  \
  FASTDMD_DECLARE_KERNEL(conv3x3_weight_sums)      \
  FASTDMD_DECLARE_KERNEL(conv3x3_weight_gradient)  \
  FASTDMD_DECLARE_KERNEL(conv1x1_weights)          \
  FASTDMD_DECLARE_KERNEL(conv1x1)                  \
  FASTDMD_DECLARE_KERNEL(conv1x1_parameters)       \
  FASTDMD_DECLARE_KERNEL(sum_of_squares)           \
  FASTDMD_DECLARE_KERNEL(adamw)                    \
  inline constexpr Kernels kernels{                \
      philox,                                      \
      add_noise,                                   \
      add_noise_rng,                               \
      normals,                                     \
      dm_weight,                                   \
      dm_gradient,                                 \
      fake_loss,                                   \
      scale_gradient,                              \
      group_norm_silu,                             \
      group_norm_silu_backward,                    \
      conv3x3_weights,                             \
      conv3x3,                                     \
      conv3x3_weight_sums,                         \
      conv3x3_weight_gradient,                     \
      conv1x1_weights,                             \
      conv1x1,                                     \
      conv1x1_parameters,                          \
      sum_of_squares,                              \
      adamw,                                       \
  };                                               \
  }

}  // namespace fastdmd
