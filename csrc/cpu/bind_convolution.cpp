// Bindings of conv3x3: which threads take which channels and tiles.
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "convolution.h"

namespace fastdmd {
namespace {

using torch::stable::parallel_for;

constexpr Convolution OP{.name = "conv3x3", .side = 3, .takes_bfloat16 = true};

// A multiplication is that of a weight, for a step of tiles.
int64_t multiplications(const Conv3x3& a, int64_t images) {
  int64_t sum = 0;
  for (int k = 0; k < a.num_kinds; ++k) sum += a.steps(a.kinds[k], images) * a.kinds[k].num_matrices();
  return sum;
}
int64_t multiplications(const Conv3x3& a) {
  return a.num_images / Conv3x3::SET * multiplications(a, Conv3x3::SET) +
         multiplications(a, a.num_images % Conv3x3::SET);
}

// Tiles of `side` x `side` outputs; at the edges of those that are left, but of few images, whose steps they do not
// fill: where it takes more multiplications.
void set_tiles(Conv3x3& a, int side) {
  using Kind = Conv3x3::Tiles;
  a.tile = side;
  const int64_t down = a.height / side, across = a.width / side;  // whole ones
  const int64_t rows = a.height % side, columns = a.width % side;
  const Kind padded{0, 0, ceil_divide(a.height, side), ceil_divide(a.width, side), side, side};
  const Kind exact[Conv3x3::MAX_KINDS] = {
      {0, 0, down, across, side, side},
      {0, across * side, down, columns > 0, side, columns},
      {down * side, 0, rows > 0, across, rows, side},
      {down * side, across * side, rows > 0, columns > 0, rows, columns},
  };
  a.num_kinds = 0;
  for (const Kind& kind : exact)
    if (kind.per_image() > 0) a.kinds[a.num_kinds++] = kind;
  Conv3x3 other = a;
  other.kinds[0] = padded;
  other.num_kinds = 1;
  if (multiplications(other) <= multiplications(a)) a = other;
}

// The side of the tiles that take less time, in multiplications of a weight: by 36 inputs for 4x4 outputs, each of
// which takes 1.1 times as long, or by 16 for 2x2. To make 36 matrices of a weight takes as long as 150 more than to
// make 16, and longer where they are all made first, for many tiles, the more so the less the cache holds of them; to
// make one of 36 sums as long as 60 (AVX-512). In float32 sums of few tiles err too much by 4x4; bfloat16 rounds more
// off.
int tile(const Conv3x3& a, bool sums) {
  const auto tiles = [&](int64_t side) {
    return a.num_images * ceil_divide(a.height, side) * ceil_divide(a.width, side);
  };
  const int64_t memory = a.in_channels * a.out_channels / 450;
  int64_t more = tiles(4) > Conv3x3::block_steps(4) * Conv3x3::TILE_STEP ? 200 + memory : 150;
  if (sums) more = a.dtype == Dtype::bfloat16 ? 60 : 1800 + memory;
  return 40 * tiles(4) + more < 16 * tiles(2) ? 4 : 2;
}

enum class Of { output, input_gradient, weight_gradient };

// y is the output, of C_out channels, or its gradient; as x, if y is that of the input.
Conv3x3 arguments(const Tensor& x, const Tensor& weight, const Tensor& y, Of wanted) {
  const bool transposed = wanted == Of::input_gradient;  // the roles of the weight's channels are swapped
  Conv3x3 a{};
  a.dtype = dtype_of(weight);
  a.x = x.const_data_ptr();
  a.y = y.data_ptr();
  a.weight = weight.data_ptr();
  a.num_images = x.size(0);
  a.height = x.size(2);
  a.width = x.size(3);
  a.in_channels = x.size(1);
  a.out_channels = a.y_channels = y.size(1);
  a.weight_out = weight.stride(transposed ? 1 : 0);
  a.weight_in = weight.stride(transposed ? 0 : 1);
  a.weight_y = weight.stride(2);
  a.weight_x = weight.stride(3);
  a.flipped = transposed;
  set_tiles(a, tile(a, wanted == Of::weight_gradient));
  return a;
}

// Memory of the calling thread for transformed weights or sums, kept for its next call: from among tensors of all
// sizes, which stay in the holes that it leaves, it would take a tenth of a network's memory.
float* kept(int64_t size) {
  struct Kept {
    float* data = nullptr;  // [size]
    int64_t size = 0;
    ~Kept() { std::free(data); }
  };
  thread_local Kept own;
  if (own.size < size) {
    std::free(own.data);
    own.size = 0;
    own.data = static_cast<float*>(std::aligned_alloc(64, size_t(size + 15) / 16 * 64));
    STD_TORCH_CHECK(own.data, "fastdmd.conv3x3: out of memory for ", size, " transformed weights or sums");
    own.size = size;
  }
  return own.data;
}

int64_t channel_steps(const Conv3x3& a) { return a.out_channels / Conv3x3::CHANNEL_STEP; }

// The convolution of a group of output channels.
struct Group : Conv3x3 {
  int64_t first;  // of all output channels
};

// How the threads share the work: groups of output channels, and parts of the tiles of each.
class Shares {
 public:
  // Those that take least time, in multiplications for a matrix and an input channel: a thread transforms the inputs of
  // its tiles, of which each takes as long as the products of 8 channels, and reads what others of its group have made
  // of the weights, of which each takes as long as 20 multiplications. (Measured with two threads: it is 10 between
  // cores with a cache in common and 100 without. There 256 channels of two 16 x 16 images took 3.0 times as long by
  // parts as by groups, and longer than with one thread. Sums, of which each part has its own, are read once.)
  explicit Shares(const Conv3x3& a) {
    const int64_t threads = torch::stable::get_num_threads(), steps = a.steps();
    double least = std::numeric_limits<double>::infinity();
    for (int64_t groups = 1; groups <= std::min(threads, channel_steps(a)); ++groups) {
      const int64_t parts = std::clamp(threads / groups, int64_t(1), std::max(steps, int64_t(1)));
      const double tiles = double(ceil_divide(steps, parts) * Conv3x3::TILE_STEP);
      const double channels = double(ceil_divide(channel_steps(a), groups) * Conv3x3::CHANNEL_STEP);
      const double time = tiles * (channels + 8) + 20 * channels * double(parts - 1) / double(parts);
      if (time >= least) continue;
      least = time;
      this->groups = groups;
      this->parts = parts;
    }
  }

  // first(group, part), then second(group, part), each by a thread of its own; the second once all parts of a group are
  // through the first.
  template <class First, class Second>
  void each(const Conv3x3& a, First first, Second second) const {
    const auto run = [&](auto body) {
      parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) body(group(a, t / parts), t % parts);
      });
    };
    if (parts == 1) {
      run([&](const Group& own, int64_t part) {
        first(own, part);
        second(own, part);
      });
    } else {
      run(first);
      run(second);
    }
  }

  // Where the share of a part begins: of so many things alike, and of the steps.
  int64_t start(int64_t count, int64_t part) const { return part * count / parts; }
  int64_t first_step(const Conv3x3& a, int64_t part) const {
    const int64_t of_set = multiplications(a, Conv3x3::SET), before = start(multiplications(a), part);
    const int64_t sets = of_set ? before / of_set : 0, images = a.num_images - sets * Conv3x3::SET;
    int64_t left = before - sets * of_set, step = sets * a.steps(Conv3x3::SET);
    for (int k = 0; k < a.num_kinds && left > 0; ++k) {
      const int64_t all = a.steps(a.kinds[k], std::min(images, Conv3x3::SET));
      const int64_t count = std::min(ceil_divide(left, a.kinds[k].num_matrices()), all);
      step += count;
      left -= count * a.kinds[k].num_matrices();
    }
    return step;
  }

  int64_t parts = 1;  // each with sums of its own, those of a group in a row

 private:
  Group group(const Conv3x3& a, int64_t index) const {
    const int64_t first = index * channel_steps(a) / groups * Conv3x3::CHANNEL_STEP,
                  end = (index + 1) * channel_steps(a) / groups * Conv3x3::CHANNEL_STEP,
                  bytes = a.dtype == Dtype::bfloat16 ? 2 : 4;
    Group own{a, first};
    own.out_channels = end - first;
    if (a.transformed) own.transformed += first * (a.transformed_size() / a.out_channels);
    if (a.sums) own.sums += first * parts * (a.sums_size() / a.out_channels);
    own.y = static_cast<char*>(a.y) + first * bytes;
    own.weight = static_cast<char*>(a.weight) + first * a.weight_out * bytes;
    if (a.bias) own.bias = static_cast<const char*>(a.bias) + first * bytes;
    return own;
  }

  int64_t groups = 1;
};

void run(Conv3x3 a) {
  const Shares shares(a);
  const bool by_pieces = shares.parts == 1 && a.steps() <= Conv3x3::block_steps(a.tile);
  a.transformed = by_pieces ? nullptr : kept(a.transformed_size());
  shares.each(
      a,
      [&](const Group& own, int64_t part) {
        const int64_t count = channel_steps(own);
        if (!by_pieces) kernels().conv3x3_weights(own, shares.start(count, part), shares.start(count, part + 1));
      },
      [&](const Group& own, int64_t part) {
        kernels().conv3x3(own, shares.first_step(a, part), shares.first_step(a, part + 1));
      });
}

Tensor conv3x3(Tensor x,       // [B, C_in, H, W]
               Tensor weight,  // [C_out, C_in, 3, 3]
               std::optional<Tensor> bias /* [C_out] */) {
  Tensor y = output(x, weight.size(0));
  check(OP, x, weight, y, bias);
  Conv3x3 a = arguments(x, weight, y, Of::output);
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  run(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv3x3_backward(Tensor grad_y,  // [B, C_out, H, W]
                                                    Tensor x,       // [B, C_in, H, W]
                                                    Tensor weight,  // [C_out, C_in, 3, 3]
                                                    bool of_input,
                                                    bool of_parameters) {
  check(OP, x, weight, grad_y);
  auto [grad_x, grad_weight, grad_bias] = gradients(x, weight, of_input, of_parameters);
  if (of_input) run(arguments(grad_y, weight, grad_x, Of::input_gradient));
  if (!of_parameters) return {grad_x, grad_weight, grad_bias};
  Conv3x3 a = arguments(x, grad_weight, grad_y, Of::weight_gradient);
  if (a.steps() == 0)  // no tile, so nobody would write them
    return {grad_x, torch::stable::fill_(grad_weight, 0), torch::stable::fill_(grad_bias, 0)};

  const Shares shares(a);
  const int64_t parts = shares.parts;
  std::vector<double> bias_sums(parts * a.out_channels);
  a.sums = kept(parts * a.sums_size());
  shares.each(
      a,
      [&](Group own, int64_t part) {
        own.sums += part * own.sums_size();
        double* sums = &bias_sums[part * a.out_channels + own.first];
        kernels().conv3x3_weight_sums(own, sums, shares.first_step(a, part), shares.first_step(a, part + 1));
      },
      [&](const Group& own, int64_t part) {
        const int64_t count = channel_steps(own), first = shares.start(count, part),
                      end = shares.start(count, part + 1);
        kernels().conv3x3_weight_gradient(own, parts, first, end);
        for (int64_t o = own.first + first * Conv3x3::CHANNEL_STEP; o < own.first + end * Conv3x3::CHANNEL_STEP; ++o) {
          double total = 0;
          for (int64_t part = 0; part < parts; ++part) total += bias_sums[part * a.out_channels + o];
          write(grad_bias.mutable_data_ptr(), a.dtype, o, total);
        }
      });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}

}  // namespace fastdmd
