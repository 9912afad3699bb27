// SPDX-License-Identifier: Apache-2.0
// A tensor of more than 2^31 elements: every index must have 64 bits. Some panels of it, updated on
// the CPU as a shard, must have the bits of the whole on the GPU. Matrices have 128 columns, so
// that their panels have as many elements as those of a vector.
#include <cuda_runtime_api.h>

#include <cstring>

#include "octet/optim/adamw.hpp"
#include "support/adamw_formats.hpp"
#include "support/adamw_stored.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr int kSteps = 2;
constexpr float kRate = 1e-3f;
/// Primes: a step of 2^k elements, as a lost bit of an index makes it, shows other values.
constexpr std::size_t kGradientPeriod = 16777213, kValuePeriod = 8388593;

std::vector<std::uint16_t> value_block(std::size_t count) {
  const std::vector<float> values = normal_values(count, 6, 0.02f);
  std::vector<std::uint16_t> codes(count);
  for (std::size_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint16_t>(bits_of(values[i]) >> 16);
  }
  return codes;
}

std::vector<std::uint8_t> bytes_of_codes(const std::vector<std::uint16_t>& codes) {
  std::vector<std::uint8_t> bytes(2 * codes.size());
  std::memcpy(bytes.data(), codes.data(), bytes.size());
  return bytes;
}

/// What is updated: a vector or a matrix of 128 columns.
struct Case {
  Shape shape;
  StateFormats formats;
  DType gradient = DType::e4m3;
};

/// Random E4M3 codes, all of them finite; of BF16 and FP32 gradients normal values.
std::vector<std::uint8_t> gradient_block(DType dtype, std::size_t count) {
  if (dtype == DType::bf16) return bytes_of_codes(value_block(count));
  if (dtype == DType::f32) {
    const std::vector<float> values = normal_values(count, 6, 0.02f);
    std::vector<std::uint8_t> bytes(values.size() * sizeof(float));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  Draws draws(5);
  std::vector<std::uint8_t> codes(count);
  for (std::uint8_t& code : codes) {
    code = static_cast<std::uint8_t>(draws());
    if ((code & 0x7F) == 0x7F) code ^= 1;
  }
  codes.front() = 0x7E;  // what the scale's amax says
  return codes;
}

/// Fills device memory of `bytes` with copies of a block, one after the other.
void repeat(const Context& ctx, void* to, std::size_t bytes,
            const std::vector<std::uint8_t>& block) {
  const Buffer source = upload(ctx, block);
  for (std::size_t begin = 0; begin < bytes; begin += block.size()) {
    copy_bytes(ctx, static_cast<char*>(to) + begin, source.data(),
               std::min(block.size(), bytes - begin));
  }
  ctx.synchronize();  // before the source goes
}

/// The first panel, those around the middle and the last three; of at least eight, so that no panel
/// is taken twice.
std::vector<Piece> watched_pieces(std::int64_t count) {
  const std::int64_t panels = (count + kPanelVectorElements - 1) / kPanelVectorElements;
  const auto piece = [count](std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * kPanelVectorElements;
    return Piece{0, begin, std::min(last * kPanelVectorElements, count) - begin};
  };
  return {piece(0, 1), piece(panels / 2 - 1, panels / 2 + 1), piece(panels - 3, panels)};
}

/// One tensor with its gradient and optimizer: the whole of it, or some pieces, those without a
/// compute weight unless the master needs it.
class Large {
 public:
  Large(const Context& ctx, const Case& what, const std::vector<std::uint8_t>& gradient,
        std::vector<Piece> pieces)
      : ctx_(ctx), pieces_(std::move(pieces)), shape_(what.shape) {
    const bool whole = pieces_.empty();
    AdamWParam param;
    param.name = "large";
    param.shape = shape_;
    param.formats = what.formats;
    if (!whole) param.pieces = pieces_;
    param.gradient_is_shard = !whole;
    std::int64_t owned = whole ? shape_.numel() : 0;
    for (const Piece& piece : pieces_) owned += piece.count;
    gradient_ = Tensor(ctx, what.gradient, whole ? shape_ : Shape{owned});
    if (whole || what.formats.master == StateFormat::split) {
      weight_ = Tensor(ctx, dtype_of(what.formats.weight), shape_);
    } else {
      param.formats.weight = WeightFormat::none;
    }
    if (is_transposed(param.formats.weight)) {
      transposed_ = Tensor(ctx, DType::e4m3, {shape_[1], shape_[0]});
    }
    if (whole) {
      repeat(ctx, gradient_.view().data, gradient_.view().bytes(), gradient);
    } else {
      fill_shard(gradient);
    }
    const bool is_e4m3 = what.gradient == DType::e4m3;
    scale_ = upload<TensorScale>(
        ctx, {is_e4m3 ? TensorScale{0x1p-12f, 0x1p12f, 448 * 0x1p-12f} : TensorScale{1, 1, 0.25f}});
    param.gradient = gradient_.view();
    param.gradient_scale = scale_.as<TensorScale>();
    param.weight = weight_.view();
    param.weight_transposed = transposed_.view();
    optimizer_ = std::make_unique<AdamW>(ctx, AdamWConfig{.weight_decay = 0.1f, .seed = 77},
                                         std::vector<AdamWParam>{param});
  }

  void initialise(const std::vector<std::uint16_t>& block) {
    const Tensor values(ctx_, DType::bf16, shape_);
    repeat(ctx_, values.view().data, values.view().bytes(), bytes_of_codes(block));
    optimizer_->initialise(0, values);
    ctx_.synchronize();
  }

  AdamW& optimizer() { return *optimizer_; }
  const TensorView& weight() const { return weight_.view(); }
  const TensorView& transposed() const { return transposed_.view(); }
  std::vector<float> sums() const {
    return download<float>(ctx_, optimizer_->segment_sums(),
                           static_cast<std::size_t>(optimizer_->total_segments()));
  }
  void set_sums(const std::vector<float>& sums) { write(ctx_, optimizer_->segment_sums(), sums); }
  std::vector<TensorScale> scales() const {
    return download<TensorScale>(ctx_, optimizer_->scales(),
                                 static_cast<std::size_t>(optimizer_->scale_count()));
  }
  void set_scales(const std::vector<TensorScale>& scales) {
    write(ctx_, optimizer_->scales(), scales);
  }

 private:
  void fill_shard(const std::vector<std::uint8_t>& block) {
    const std::size_t width = size_of(gradient_.view().dtype);
    std::vector<std::uint8_t> bytes;
    for (const Piece& piece : pieces_) {
      const std::size_t begin = static_cast<std::size_t>(piece.begin) * width;
      const std::size_t end = begin + static_cast<std::size_t>(piece.count) * width;
      for (std::size_t i = begin; i < end; ++i) bytes.push_back(block[i % block.size()]);
    }
    write(ctx_, gradient_.view().data, bytes);
  }

  Context ctx_;
  std::vector<Piece> pieces_;
  Shape shape_;
  Tensor gradient_, weight_, transposed_;
  Buffer scale_;
  std::unique_ptr<AdamW> optimizer_;
};

/// Bytes of the watched pieces of device memory that holds the whole tensor.
std::vector<std::uint8_t> gathered(const Context& ctx, const void* data, std::size_t width,
                                   const std::vector<Piece>& pieces) {
  std::vector<std::uint8_t> all;
  for (const Piece& piece : pieces) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    from += static_cast<std::size_t>(piece.begin) * width;
    const auto part =
        download<std::uint8_t>(ctx, from, static_cast<std::size_t>(piece.count) * width);
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

/// The same of a state: codes, then the scales of its blocks.
std::vector<std::uint8_t> gathered(const Context& ctx, const StateView& view,
                                   const std::vector<Piece>& pieces) {
  auto all = gathered(ctx, view.data, size_of(view.format), pieces);
  if (!is_block(view.format)) return all;
  std::vector<Piece> blocks;
  for (const Piece& piece : pieces) {
    blocks.push_back({0, piece.begin / kStateBlock, block_count(view.format, piece.count)});
  }
  const auto scales = gathered(ctx, view.blocks, sizeof(float), blocks);
  all.insert(all.end(), scales.begin(), scales.end());
  return all;
}

/// Calls each(values, first) with `count` values in device memory, read in parts.
template <class T, class Each>
void read_in_parts(const Context& ctx, const void* data, std::int64_t count, Each each) {
  constexpr std::int64_t kPart = std::int64_t{1} << 27;
  for (std::int64_t begin = 0; begin < count; begin += kPart) {
    const auto size = static_cast<std::size_t>(std::min(kPart, count - begin));
    each(download<T>(ctx, static_cast<const T*>(data) + begin, size), begin);
  }
}

/// The largest code without its sign of a whole state.
template <class T>
std::uint32_t largest_code(const Context& ctx, const StateView& view) {
  constexpr T kMask = static_cast<T>(static_cast<T>(~T{0}) >> 1);
  T largest = 0;
  read_in_parts<T>(ctx, view.data, view.count, [&](const std::vector<T>& codes, std::int64_t) {
    for (T code : codes) largest = std::max(largest, static_cast<T>(code & kMask));
  });
  return largest;
}

/// The amax of a whole state, from all of it; not of FP32, which would take minutes to read.
double amax_of_state(const Context& ctx, const StateView& view, const TensorView& weight,
                     const TensorScale& scale) {
  if (is_block(view.format)) {
    float largest = 0;
    read_in_parts<float>(ctx, view.blocks, block_count(view.format, view.count),
                         [&](const std::vector<float>& blocks, std::int64_t) {
                           for (float block : blocks) largest = std::max(largest, block);
                         });
    const float top = 448.0f * largest;
    return static_cast<double>(is_root(view.format) ? top * top : top);
  }
  const auto inv = static_cast<double>(scale.scale_inv);
  if (view.format == StateFormat::split) {
    std::int32_t largest = 0;
    read_in_parts<std::uint8_t>(
        ctx, weight.data, view.count,
        [&](const std::vector<std::uint8_t>& codes, std::int64_t begin) {
          const auto* from = static_cast<const std::int8_t*>(view.data) + begin;
          const auto remainders = download<std::int8_t>(ctx, from, codes.size());
          for (std::size_t i = 0; i < codes.size(); ++i) {
            largest = std::max(largest, 256 * (codes[i] & 0x7F) + remainders[i]);
          }
        });
    return split_value(static_cast<std::uint32_t>(largest)) * inv;
  }
  const std::uint32_t top = size_of(view.format) == 1 ? largest_code<std::uint8_t>(ctx, view)
                                                      : largest_code<std::uint16_t>(ctx, view);
  return table_of(table_dtype(view.format)).decode(top) * inv;
}

/// Decoded master elements of the watched pieces: FP32 or FP16.
Doubles decoded_master(const std::vector<std::uint8_t>& bytes, StateFormat format,
                       const TensorScale& scale) {
  Doubles values;
  for (std::size_t i = 0; i < bytes.size(); i += size_of(format)) {
    std::uint32_t code = 0;
    std::memcpy(&code, bytes.data() + i, size_of(format));
    values.push_back(format == StateFormat::f32 ? static_cast<double>(float_from_bits(code))
                                                : table_of(DType::f16).decode(code) *
                                                      static_cast<double>(scale.scale_inv));
  }
  return values;
}

/// How many weights are not the nearest code to the stored master.
int wrong_weights(DType dtype, const std::vector<std::uint8_t>& weight, const Doubles& master,
                  const TensorScale& scale) {
  int wrong = 0;
  for (std::size_t i = 0; i < master.size(); ++i) {
    std::uint32_t code = 0;
    std::memcpy(&code, weight.data() + i * size_of(dtype), size_of(dtype));
    wrong += code != table_of(dtype).encode(master[i] * static_cast<double>(scale.scale));
  }
  return wrong;
}

/// The transposed weight of the watched panels of a matrix, put back into rows.
std::vector<std::uint8_t> rows_of_transposed(const Context& ctx, const TensorView& transposed,
                                             const std::vector<Piece>& pieces) {
  const std::int64_t columns = transposed.shape[0], rows = transposed.shape[1];
  std::vector<std::uint8_t> all;
  for (const Piece& piece : pieces) {
    const std::int64_t first = piece.begin / columns, count = piece.count / columns;
    std::vector<std::uint8_t> panel(static_cast<std::size_t>(piece.count));
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto* from = static_cast<const std::uint8_t*>(transposed.data) + column * rows + first;
      const auto part = download<std::uint8_t>(ctx, from, static_cast<std::size_t>(count));
      for (std::int64_t row = 0; row < count; ++row) {
        panel[static_cast<std::size_t>(row * columns + column)] =
            part[static_cast<std::size_t>(row)];
      }
    }
    all.insert(all.end(), panel.begin(), panel.end());
  }
  return all;
}

/// What a step left in the whole and in the pieces.
void compare_states(const Context& ctx, Large& whole, Large& part, const Case& what,
                    const std::vector<Piece>& pieces) {
  const Context host = Context::cpu();
  const bool is_split = what.formats.master == StateFormat::split;
  const std::vector<TensorScale> scales = whole.scales();
  std::vector<TensorScale> shared = part.scales();
  // Weight, master, m, v; the pieces have no weight unless the master needs it.
  for (std::size_t slot = is_split ? 0 : 1; slot < 4; ++slot) {
    CHECK(shared[slot].scale == scales[slot].scale);
    CHECK(shared[slot].amax <= scales[slot].amax);
    shared[slot].amax = scales[slot].amax;
  }
  part.set_scales(shared);  // as ranks do

  const StateView states[] = {whole.optimizer().master(0), whole.optimizer().m(0),
                              whole.optimizer().v(0)};
  const StateView parts[] = {part.optimizer().master(0), part.optimizer().m(0),
                             part.optimizer().v(0)};
  std::vector<std::uint8_t> master;
  for (std::size_t s = 0; s < 3; ++s) {
    REQUIRE(states[s].count == what.shape.numel());
    INFO(name_of(states[s].format) << " state " << s);
    const auto bytes = gathered(ctx, states[s], pieces);
    CHECK(first_difference(bytes, download_state(host, parts[s])) == "");
    if (s == 0) master = bytes;
    if (states[s].format == StateFormat::f32) continue;
    CHECK(static_cast<double>(scales[s + 1].amax) ==
          amax_of_state(ctx, states[s], whole.weight(), scales[s + 1]));
  }
  const DType dtype = whole.weight().dtype;
  if (dtype == DType::f32) return;  // its own master
  const auto weight = gathered(ctx, whole.weight().data, size_of(dtype), pieces);
  if (is_split) {
    const auto expected = gathered(host, part.weight().data, 1, pieces);
    CHECK(first_difference(weight, expected) == "");
  } else {
    const Doubles values = decoded_master(master, what.formats.master, scales[1]);
    CHECK(wrong_weights(dtype, weight, values, scales[0]) == 0);
  }
  if (!whole.transposed().empty()) {
    CHECK(first_difference(rows_of_transposed(ctx, whole.transposed(), pieces), weight) == "");
  }
}

/// The whole tensor on `ctx` against its watched pieces on the CPU.
void compare(const Context& ctx, const Case& what, std::size_t gradient_period,
             std::size_t value_period) {
  const std::vector<Piece> pieces = watched_pieces(what.shape.numel());
  const std::vector<std::uint8_t> gradient = gradient_block(what.gradient, gradient_period);
  const Context host = Context::cpu();
  Large whole(ctx, what, gradient, {}), part(host, what, gradient, pieces);
  const std::vector<std::uint16_t> values = value_block(value_period);
  whole.initialise(values);
  part.initialise(values);
  for (int t = 1; t <= kSteps; ++t) {
    INFO(to_string(ctx.device()) << ", " << describe(what.formats, what.gradient) << ", "
                                 << to_string(what.shape) << ", step " << t);
    for (Large* each : {&whole, &part}) each->optimizer().measure();
    const std::vector<float> sums = whole.sums(), own = part.sums();
    REQUIRE(sums.size() == own.size());
    int wrong = 0;
    for (const Segment& segment : part.optimizer().segments()) {
      const auto at = static_cast<std::size_t>(segment.index);
      wrong += bits_of(sums[at]) != bits_of(own[at]);
    }
    CHECK(wrong == 0);
    part.set_sums(sums);
    const AdamWStep step{.lr = kRate, .max_norm = 0.5f};
    for (Large* each : {&whole, &part}) each->optimizer().step(step);

    const auto scalars = download_one<AdamwScalars>(ctx, whole.optimizer().scalars());
    const auto same = download_one<AdamwScalars>(host, part.optimizer().scalars());
    CHECK(scalars.step == t);
    CHECK(scalars.clip < 1.0f);
    CHECK(bits_of(scalars.clip) == bits_of(same.clip));
    const bool is_fast = ctx.device().type == DeviceType::cuda;
    CHECK(download_one<AdamwTensorStep>(ctx, whole.optimizer().tensor_step(0)).row ==
          (is_fast ? adamw_row_of(what.gradient, what.formats) : 0));
    compare_states(ctx, whole, part, what, pieces);
  }
}

/// The levels, O2 and FP32 with FP32 gradients, the smallest states, one that takes the general
/// code on CUDA, and a transpose: of 2^31 + 3 elements, the matrix of a few more in rows of 128.
std::vector<Case> cases() {
  const Shape vector = {(std::int64_t{1} << 31) + 3};
  const StateFormats general = {WeightFormat::e4m3, StateFormat::f16, StateFormat::bf16,
                                StateFormat::f16};
  StateFormats transposed = kO2;
  transposed.weight = WeightFormat::e4m3_and_transpose;
  return {{vector, kO0, DType::bf16},
          {vector, kO1},
          {vector, kO2},
          {vector, kO2, DType::f32},
          {vector, kPlain, DType::f32},
          {vector, kSmall},
          {vector, general},
          {{(std::int64_t{1} << 24) + 8, 128}, transposed}};
}

/// Free memory of device 0 in bytes; 0 without one.
std::size_t free_device_memory() {
  std::size_t free = 0, total = 0;
  if (cuda_device_count() == 0 || cudaSetDevice(0) != cudaSuccess) return 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

}  // namespace

TEST_CASE("some panels of a tensor have the bits of the whole") {
  for (const Context& ctx : test_contexts()) {
    for (const Case& c : cases()) {
      Case what = c;
      const bool is_matrix = c.shape.rank() == 2;
      for (std::int64_t count : {7 * kPanelVectorElements + 3, 8 * kPanelVectorElements}) {
        what.shape = is_matrix ? Shape{8 * ((count + 1023) / 1024), 128} : Shape{count};
        compare(ctx, what, 9973, 5003);
      }
    }
  }
}

TEST_CASE("a tensor of more than 2^31 elements has the bits of its panels") {
  constexpr std::size_t kNeeded = std::size_t{40} << 30;
  if (free_device_memory() < kNeeded) {
    WARN("skipped: no CUDA device with 40 GiB of free memory");
    return;
  }
  for (const Case& c : cases())
    compare(Context::cuda(0, nullptr), c, kGradientPeriod, kValuePeriod);
}

}  // namespace octet::test
