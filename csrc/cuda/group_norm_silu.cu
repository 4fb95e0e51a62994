// GroupNorm, scale and shift, SiLU, and its backward: the choice of the kernel, and the gradients of the parameters.
#include "group_norm_silu_channels_last.cuh"
#include "group_norm_silu_groups.cuh"
#include "group_norm_silu_planes.cuh"
#include "group_norm_silu_tile_kernels.cuh"

namespace fastdmd {
namespace {

struct ParameterGradients {
  GroupNorm op;
  void* grad_weight;  // [C]
  void* grad_bias;    // [C]
  void* grad_scale;   // [B, C], or null
  void* grad_shift;   // [B, C], or null
  void* grad_offset;  // [B, C] or [1, C], or null
  bool of_each;       // a row of grad_offset to a sample
  Dtype weight_dtype, bias_dtype, scale_dtype, shift_dtype, offset_dtype;
};

constexpr int SUMMED_CHANNELS = 8;  // of a block: few, so that there are blocks for every multiprocessor

// A block has SUMMED_CHANNELS channels; a thread keeps to one of them and walks over samples.
template <class W>
__global__ void __launch_bounds__(THREADS) parameter_gradients(ParameterGradients a) {
  constexpr int rows = THREADS / SUMMED_CHANNELS;
  __shared__ Pair<W> partials[rows][SUMMED_CHANNELS];
  __shared__ W offset_partials[rows][SUMMED_CHANNELS];
  const int column = int(threadIdx.x) % SUMMED_CHANNELS;
  const int row = int(threadIdx.x) / SUMMED_CHANNELS;
  const int64_t C = a.op.num_channels;
  const int64_t c = int64_t(blockIdx.x) * SUMMED_CHANNELS + column;
  const Pair<W>* sums_of = static_cast<const Pair<W>*>(a.op.sums) + c;  // [B, C], from this channel on
  Pair<W> total{0, 0};                                                  // of grad_weight and grad_bias
  W offset_total = 0;
  if (c < C && a.grad_offset)
    for (int64_t sample = row; sample < a.op.num_samples; sample += rows) {
      const W sum = static_cast<const W*>(a.op.grad_x_sums)[sample * C + c];
      offset_total += sum;
      if (a.of_each) write(a.grad_offset, a.offset_dtype, sample * C + c, sum);
    }
  if (c < C && !a.op.scale.data) {
#pragma unroll 8
    for (int64_t sample = row; sample < a.op.num_samples; sample += rows) {
      const Pair<W> sums = sums_of[sample * C];
      total.first += sums.second;
      total.second += sums.first;
    }
  } else if (c < C) {
    const W weight = a.op.weight.at<W>(c);
    const W bias = a.op.bias.at<W>(c);
    for (int64_t sample = row; sample < a.op.num_samples; sample += rows) {
      const Pair<W> sums = sums_of[sample * C];
      const W multiplier = W(1) + a.op.scale.at<W>(sample, c);
      total.first += multiplier * sums.second;
      total.second += multiplier * sums.first;
      write(a.grad_scale, a.scale_dtype, sample * C + c, weight * sums.second + bias * sums.first);
      write(a.grad_shift, a.shift_dtype, sample * C + c, sums.first);
    }
  }
  partials[row][column] = total;
  offset_partials[row][column] = offset_total;
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
    partials[row][column].first += partials[row + half][column].first;
    partials[row][column].second += partials[row + half][column].second;
    offset_partials[row][column] += offset_partials[row + half][column];
  }
  if (row > 0 || c >= C) return;
  write(a.grad_weight, a.weight_dtype, c, partials[0][column].first);
  write(a.grad_bias, a.bias_dtype, c, partials[0][column].second);
  if (a.grad_offset && !a.of_each) write(a.grad_offset, a.offset_dtype, c, offset_partials[0][column]);
}

GroupNorm arguments(const Tensor& x,                      // [B, C, H, W]
                    const Tensor& out,                    // [B, C, H, W]: y, or grad_x
                    const Tensor& mean,                   // [B, G]
                    const Tensor& rstd,                   // [B, G]
                    const Tensor& weight,                 // [C]
                    const Tensor& bias,                   // [C]
                    const std::optional<Tensor>& scale,   // [B, C]
                    const std::optional<Tensor>& shift,   // [B, C]
                    const std::optional<Tensor>& offset,  // [B, C] or [1, C]
                    int64_t num_groups,
                    bool silu) {
  const int64_t num_pixels = x.size(2) * x.size(3);
  Values x_offset = values_of(offset);
  if (offset && offset->size(0) == 1) x_offset.stride = 0;
  return {
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .mean = mean.data_ptr(),
      .rstd = rstd.data_ptr(),
      .weight = values_of(weight),
      .bias = values_of(bias),
      .scale = values_of(scale),
      .shift = values_of(shift),
      .x_offset = x_offset,
      .dtype = dtype_of(x),
      .channels_last = num_pixels == 1 || !x.is_contiguous(),  // of a single pixel both are the same
      .silu = silu,
      .num_samples = x.size(0),
      .num_channels = x.size(1),
      .num_groups = num_groups,
      .num_pixels = num_pixels,
  };
}

// How a block's threads and the blocks of a sample share its pixels, or nothing if the layout does not allow it.
std::optional<ChannelsLast> channels_last(const Device& device, const GroupNorm& op) {
  const int64_t width = 16 / element_bytes(op.dtype);
  const int64_t columns = op.num_channels / width;
  if (!op.channels_last || op.dtype == Dtype::float64 || op.num_channels % width != 0 || columns > MAX_COLUMNS ||
      !aligned({op.x, op.grad_y, op.out}))
    return std::nullopt;
  // About 256 threads, in whole warps as far as possible.
  const auto waste = [&](int64_t rows) {
    return double(ceil_divide(columns * rows, WARP) * WARP) / double(columns * rows);
  };
  int64_t rows = std::max(int64_t(1), 128 / columns);
  for (int64_t more = rows + 1; more * columns <= 320; ++more)
    if (waste(more) <= waste(rows)) rows = more;
  // Some blocks for every multiprocessor, but some pixels for every thread; at most a warp of chunks to merge.
  const int64_t wanted = ceil_divide(8 * device.num_multiprocessors(), op.num_samples);
  const int64_t chunks = std::clamp(std::min(wanted, op.num_pixels / (8 * rows)), int64_t(1), int64_t(WARP));
  const int64_t chunk_pixels = ceil_divide(op.num_pixels, chunks);
  const int64_t num_chunks = ceil_divide(op.num_pixels, chunk_pixels);
  if (op.num_samples * num_chunks > INT_MAX || chunk_pixels > INT_MAX) return std::nullopt;
  return ChannelsLast{
      .op = op,
      .columns = int(columns),
      .rows = int(rows),
      .num_chunks = int(num_chunks),
      .chunk_pixels = chunk_pixels,
  };
}

// Both launches for channels_last images; `num_partials` of a chunk are pairs that the first leaves for the second.
template <class First, class Second>
void launch_both(const Device& device,
                 const Tensor& x,  // [B, C, H, W]
                 ChannelsLast a,
                 First first,
                 Second second,
                 int64_t num_partials,
                 int64_t first_bytes,
                 int64_t second_bytes) {
  const int64_t blocks = a.op.num_samples * a.num_chunks;
  const int threads = int(ceil_divide(int64_t(a.columns) * a.rows, WARP) * WARP);
  const Tensor partials = torch::stable::new_empty(x, {3 * blocks * num_partials}, ScalarType::Float);
  a.partials = static_cast<Pair<float>*>(partials.mutable_data_ptr());
  a.deviations = static_cast<float*>(partials.mutable_data_ptr()) + 2 * blocks * num_partials;
  device.launch(first, blocks, threads, a, first_bytes);
  device.launch(second, blocks, threads, a, second_bytes);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x,                      // [B, C, H, W]
                                                   Tensor weight,                 // [C]
                                                   Tensor bias,                   // [C]
                                                   std::optional<Tensor> scale,   // [B, C]
                                                   std::optional<Tensor> shift,   // [B, C]
                                                   std::optional<Tensor> offset,  // [B, C] or [1, C]
                                                   int64_t num_groups,
                                                   double eps,
                                                   bool silu) {
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), num_groups}, wide_dtype(x));
  Tensor rstd = torch::stable::new_empty(x, {x.size(0), num_groups}, wide_dtype(x));
  GroupNorm a = arguments(x, y, mean, rstd, weight, bias, scale, shift, offset, num_groups, silu);
  a.eps = eps;
  if (x.numel() == 0) {  // the mean of nothing
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {y, mean, rstd};
  }
  const Device device(x);
  bool done = false;
  if (a.dtype != Dtype::float64)
    dispatch_vectors(a.dtype, [&](auto type) {
      using T = decltype(type);
      done = launch_tiles(device, a, group_norm_tiles<T>) || launch_planes(device, a, group_norm_planes<T>);
    });
  if (done) return {y, mean, rstd};
  if (const std::optional<ChannelsLast> layout = channels_last(device, a)) {
    const int64_t row_bytes = a.num_channels * int64_t(sizeof(float));
    dispatch_vectors(a.dtype, [&](auto type) {
      using T = decltype(type);
      launch_both(device,
                  x,
                  *layout,
                  group_norm_moments_vectors<T>,
                  group_norm_apply_vectors<T>,
                  num_groups,
                  2 * layout->rows * row_bytes,
                  3 * row_bytes);
    });
    return {y, mean, rstd};
  }
  const int64_t blocks = std::min(a.num_samples * num_groups, int64_t(INT_MAX));
  const auto threads = [&](int64_t width) {
    const int64_t vectors = a.group_size() * a.num_pixels / width;
    return int(std::min(ceil_divide(vectors, WARP) * WARP, int64_t(THREADS)));
  };
  if (contiguous_vectors(a))
    dispatch_vectors(a.dtype, [&](auto type) {
      device.launch(group_norm_silu_vectors<decltype(type)>, blocks, threads(16 / sizeof(type)), a);
    });
  else
    dispatch_wide(a.dtype,
                  [&](auto type) { device.launch(group_norm_silu_any<decltype(type)>, blocks, threads(1), a); });
  return {y, mean, rstd};
}

void launch_backward(const Device& device,
                     const Tensor& x,  // [B, C, H, W]
                     const GroupNorm& a) {
  bool done = false;
  if (a.dtype != Dtype::float64)
    dispatch_vectors(a.dtype, [&](auto type) {
      using T = decltype(type);
      done = launch_tiles(device, a, group_norm_backward_tiles<T>) ||
             launch_planes(device, a, group_norm_backward_planes<T>);
    });
  if (done) return;
  if (const std::optional<ChannelsLast> layout = channels_last(device, a)) {
    const int64_t row_bytes = a.num_channels * int64_t(sizeof(float));
    dispatch_vectors(a.dtype, [&](auto type) {
      using T = decltype(type);
      launch_both(device,
                  x,
                  *layout,
                  group_norm_sums_vectors<T>,
                  group_norm_backward_vectors<T>,
                  a.num_channels,
                  std::max(3, 2 * layout->rows) * row_bytes,
                  5 * row_bytes);
    });
    return;
  }
  const int64_t blocks = std::min(a.num_samples * a.num_groups, int64_t(INT_MAX));
  const int threads = WARP * int(std::min(a.group_size(), int64_t(THREADS / WARP)));
  if (contiguous_vectors(a))
    dispatch_vectors(a.dtype, [&](auto type) {
      device.launch(group_norm_silu_backward_vectors<decltype(type)>, blocks, threads, a);
    });
  else
    dispatch_wide(a.dtype,
                  [&](auto type) { device.launch(group_norm_silu_backward_any<decltype(type)>, blocks, threads, a); });
}

// Of x, weight, bias, scale, shift and offset.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients group_norm_silu_backward(Tensor grad_y,                 // [B, C, H, W]
                                   Tensor x,                      // [B, C, H, W]
                                   Tensor mean,                   // [B, G]
                                   Tensor rstd,                   // [B, G]
                                   Tensor weight,                 // [C]
                                   Tensor bias,                   // [C]
                                   std::optional<Tensor> scale,   // [B, C]
                                   std::optional<Tensor> shift,   // [B, C]
                                   std::optional<Tensor> offset,  // [B, C] or [1, C]
                                   int64_t num_groups,
                                   bool silu) {
  Tensor grad_x = torch::stable::empty_like(x);
  const int64_t B = x.size(0), C = x.size(1);
  Tensor grad_weight = torch::stable::new_empty(x, {C}, weight.scalar_type());
  Tensor grad_bias = torch::stable::new_empty(x, {C}, bias.scalar_type());
  const auto table = [&](const std::optional<Tensor>& like) {
    return like ? torch::stable::new_empty(x, {like->size(0), C}, like->scalar_type())
                : torch::stable::new_empty(x, {int64_t(0)}, wide_dtype(x));
  };
  Tensor grad_scale = table(scale);
  Tensor grad_shift = table(shift);
  Tensor grad_offset = table(offset);
  const Tensor sums = torch::stable::new_empty(x, {2 * B * C}, wide_dtype(x));
  const Tensor grad_x_sums = torch::stable::new_empty(x, {offset ? B * C : 0}, wide_dtype(x));
  GroupNorm a = arguments(x, grad_x, mean, rstd, weight, bias, scale, shift, offset, num_groups, silu);
  a.grad_y = grad_y.const_data_ptr();
  a.sums = sums.mutable_data_ptr();
  a.grad_x_sums = grad_x_sums.mutable_data_ptr();
  const Device device(x);
  if (x.numel() > 0) {
    launch_backward(device, x, a);
  } else {
    torch::stable::fill_(sums, 0);
    torch::stable::fill_(grad_x_sums, 0);
  }
  const ParameterGradients gradients{
      .op = a,
      .grad_weight = grad_weight.mutable_data_ptr(),
      .grad_bias = grad_bias.mutable_data_ptr(),
      .grad_scale = scale ? grad_scale.mutable_data_ptr() : nullptr,
      .grad_shift = shift ? grad_shift.mutable_data_ptr() : nullptr,
      .grad_offset = offset ? grad_offset.mutable_data_ptr() : nullptr,
      .of_each = offset && offset->size(0) > 1,
      .weight_dtype = a.weight.dtype,
      .bias_dtype = a.bias.dtype,
      .scale_dtype = a.scale.dtype,
      .shift_dtype = a.shift.dtype,
      .offset_dtype = a.x_offset.dtype,
  };
  if (C > 0)
    dispatch_wide(a.dtype, [&](auto type) {
      device.launch(parameter_gradients<decltype(type)>, ceil_divide(C, SUMMED_CHANNELS), THREADS, gradients);
    });
  return {grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace fastdmd
