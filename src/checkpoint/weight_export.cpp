// SPDX-License-Identifier: Apache-2.0
// Weights of an engine to a file. What the device stores (a byte per value in FP8) comes to the
// host as it is, and is decoded there: that takes none of the device's memory, and has the same
// bits.
#include <algorithm>
#include <exception>
#include <optional>

#include "checkpoint/shown.hpp"
#include "octet/checkpoint/weights.hpp"
#include "octet/ops/block_quantize.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

constexpr std::int64_t kBlock = 128;

constexpr std::int64_t blocks_of(std::int64_t count) { return (count + kBlock - 1) / kBlock; }

/// One tensor of the file: a weight's values or codes, or its scales.
struct Item {
  FileTensor tensor;
  ParamId id = {};
  int unit = 0;  ///< that must be whole for it
  Shape shape = {};
  WeightFormat format = WeightFormat::f32;  ///< as the engine stores it
  DType dtype = DType::f32;                 ///< of values
  bool is_scales = false;
};

/// A weight as the engine stores it.
struct Stored {
  TensorView data = {};
  const TensorScale* scale = nullptr;  ///< of weights with one scale
  BlockScaledView blocks = {};         ///< of weights with scales of blocks
};

Stored stored_of(const Engine& engine, const Item& item) {
  if (has_block_scales(item.format)) {
    const BlockScaledView blocks = engine.block_weight(item.id);
    return {.data = blocks.data, .blocks = blocks};
  }
  const ScaledView weight = engine.weight(item.id);
  return {.data = weight.data, .scale = weight.scale};
}

FileTensor file_tensor(const std::string& name, DType dtype, const Shape& shape) {
  FileTensor tensor = {.name = name, .dtype = std::string(file_dtype(dtype))};
  for (int i = 0; i < shape.rank(); ++i) tensor.shape.push_back(shape[i]);
  tensor.bytes = static_cast<std::uint64_t>(shape.numel()) * size_of(dtype);
  return tensor;
}

/// The shape that the scales of an FP8 weight have in the file.
Shape shape_of_scales(WeightFormat format, const Shape& shape, ScaleNaming naming,
                      const std::string& where) {
  const Granularity granularity = granularity_of(format);
  if (naming == ScaleNaming::weight_scale_inv) {
    require(shape.rank() == 2, where, "shape is ", shape,
            "; weight_scale_inv has a scale for every tile of a matrix");
    require(granularity != Granularity::row_block, where, "the weight is ", name_of(format),
            "; weight_scale_inv has scales of tiles, and weight_scale can hold these");
  } else if (granularity == Granularity::tensor) {
    return {1};
  }
  const std::int64_t columns = blocks_of(shape[1]);
  return {granularity == Granularity::row_block ? shape[0] : blocks_of(shape[0]), columns};
}

std::vector<Item> items_of(const Engine& engine, const std::string& subject,
                           const std::vector<NamedWeight>& weights, const WeightExport& how) {
  std::vector<Item> items;
  for (const NamedWeight& weight : weights) {
    const ParamSpec& spec = engine.spec(weight.id);
    Item item = {.tensor = {},
                 .id = weight.id,
                 .unit = spec.unit,
                 .shape = spec.shape,
                 .format = engine.weight_format(weight.id)};
    const bool as_codes = how.dtype == DType::e4m3 && is_e4m3(item.format);
    item.dtype = as_codes ? DType::e4m3 : how.dtype == DType::e4m3 ? how.others : how.dtype;
    item.tensor = file_tensor(weight.name, item.dtype, item.shape);
    items.push_back(item);
    if (!as_codes) continue;
    const std::string suffix = how.scales == ScaleNaming::weight_scale ? "_scale" : "_scale_inv";
    const std::string where = subject + ": weight " + shown_text(weight.name) + ": ";
    item.tensor = file_tensor(weight.name + suffix, DType::f32,
                              shape_of_scales(item.format, item.shape, how.scales, where));
    item.dtype = DType::f32;
    item.is_scales = true;
    items.push_back(item);
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return size_of(a.dtype) > size_of(b.dtype);
  });
  return items;
}

void check(const std::string& subject, const WeightExport& how) {
  require(how.dtype != DType::e5m2, subject, ": dtype is ", name_of(how.dtype),
          "; weights are written in f32, bf16, f16 or e4m3");
  require(!is_fp8(how.others), subject, ": others is ", name_of(how.others),
          "; allowed are f32, bf16, f16");
}

std::vector<FileTensor> tensors_of(const std::vector<Item>& items) {
  std::vector<FileTensor> tensors;
  for (const Item& item : items) tensors.push_back(item.tensor);
  return tensors;
}

std::map<std::string, std::string> metadata_of(const WeightExport& how) {
  std::map<std::string, std::string> metadata = how.metadata;
  metadata.emplace("format", "pt");
  return metadata;
}

/// A file, and host memory for what goes into it.
class Export {
 public:
  Export(const Context& ctx, const std::string& path, const std::vector<Item>& items,
         const WeightExport& how)
      : ctx_(ctx),
        writer_(path, tensors_of(items), metadata_of(how)),
        piece_bytes_(std::max<std::size_t>(how.piece_bytes, 4)) {}

  void finish() { writer_.finish(); }

  void write(const Item& item, const Stored& stored) {
    if (item.is_scales) return write_scales(item, stored);
    if (has_block_scales(item.format) && !is_fp8(item.dtype)) return write_blocks(item, stored);
    const TensorView& data = stored.data;
    TensorScale scale = scale_of(stored);
    TensorScale* decode = stored.scale == nullptr ? nullptr : &scale;
    const std::size_t widest = std::max(size_of(data.dtype), size_of(item.dtype));
    const auto piece = static_cast<std::int64_t>(piece_bytes_ / widest);
    for (std::int64_t at = 0; at < data.numel(); at += piece) {
      const Shape shape = {std::min(piece, data.numel() - at)};
      const TensorView codes = fetch(data, at, shape);
      if (is_fp8(item.dtype)) {
        writer_.write(codes.data, codes.bytes());
      } else {
        write_values(item.dtype, shape, [&](const TensorView& out) {
          convert(host_, {codes, decode}, out);
        });
      }
    }
  }

 private:
  TensorScale scale_of(const Stored& stored) {
    TensorScale scale;
    if (stored.scale != nullptr) read_bytes_sync(ctx_, &scale, stored.scale, sizeof scale);
    return scale;
  }

  /// Elements from `at` on, on the host until the next call.
  TensorView fetch(const TensorView& data, std::int64_t at, const Shape& shape) {
    const std::size_t size = size_of(data.dtype);
    fetched_.resize(static_cast<std::size_t>(shape.numel()) * size);
    read_bytes_sync(ctx_, fetched_.data(),
                    data.as<const char>() + static_cast<std::size_t>(at) * size, fetched_.size());
    return {fetched_.data(), data.dtype, shape, {}};
  }

  template <class Decode>
  void write_values(DType dtype, const Shape& shape, Decode&& decode) {
    values_.resize(static_cast<std::size_t>(shape.numel()) * size_of(dtype));
    decode(TensorView{values_.data(), dtype, shape, {}});
    writer_.write(values_.data(), values_.size());
  }

  std::vector<float> fetch_scales(const BlockScaledView& blocks) {
    const Shape& shape = blocks.data.shape;
    const std::int64_t bytes = scale_bytes(blocks.granularity, shape[0], shape[1]);
    return read_sync<float>(ctx_, blocks.scales, static_cast<std::size_t>(bytes) / sizeof(float));
  }

  /// The scale of a block of 128 columns, of a row or of a tile's row.
  static float scale_at(const BlockScaledView& blocks, const std::vector<float>& scales,
                        std::int64_t row, std::int64_t column) {
    const Shape& shape = blocks.data.shape;
    const std::int64_t at = blocks.granularity == Granularity::tile
                                ? row * ((blocks_of(shape[1]) + 3) / 4 * 4) + column
                                : column * padded_rows(shape[0]) + row;
    return scales[static_cast<std::size_t>(at)];
  }

  void write_scales(const Item& item, const Stored& stored) {
    const BlockScaledView& blocks = stored.blocks;
    const auto count = static_cast<std::size_t>(numel_of(item.tensor));
    std::vector<float> out(count, scale_of(stored).scale_inv);
    if (has_block_scales(item.format)) {
      const std::vector<float> scales = fetch_scales(blocks);
      const std::int64_t columns = blocks_of(blocks.data.shape[1]);
      for (std::size_t i = 0; i < count; ++i) {
        const auto at = static_cast<std::int64_t>(i);
        out[i] = scale_at(blocks, scales, at / columns, at % columns);
      }
    }
    writer_.write(out.data(), count * sizeof(float));
  }

  /// Pieces of whole rows, 128 at least, which have scales of their own in the same order.
  void write_blocks(const Item& item, const Stored& stored) {
    const BlockScaledView& blocks = stored.blocks;
    const std::int64_t rows = blocks.data.shape[0], columns = blocks.data.shape[1];
    if (columns == 0) return;
    const std::vector<float> scales = fetch_scales(blocks);
    const auto values = static_cast<std::int64_t>(piece_bytes_ / size_of(item.dtype));
    const std::int64_t piece = std::max<std::int64_t>(values / columns / kBlock, 1) * kBlock;
    for (std::int64_t row = 0; row < rows; row += piece) {
      const Shape shape = {std::min(piece, rows - row), columns};
      BlockScaledView part = blocks;
      part.data = fetch(blocks.data, row * columns, shape);
      Buffer own = scales_of_rows(blocks, scales, row, shape);
      part.scales = own.data();
      write_values(item.dtype, shape,
                   [&](const TensorView& out) { block_dequantize(host_, part, out); });
    }
  }

  Buffer scales_of_rows(const BlockScaledView& blocks, const std::vector<float>& scales,
                        std::int64_t row, const Shape& shape) {
    const auto bytes =
        static_cast<std::size_t>(scale_bytes(blocks.granularity, shape[0], shape[1]));
    Buffer own(host_, bytes);
    std::fill_n(own.as<float>(), bytes / sizeof(float), 0.0f);
    const bool tiles = blocks.granularity == Granularity::tile;
    const std::int64_t lines = tiles ? blocks_of(shape[0]) : shape[0];
    const std::int64_t line = tiles ? row / kBlock : row;
    const std::int64_t row_stride = tiles ? (blocks_of(shape[1]) + 3) / 4 * 4 : 1;
    const std::int64_t column_stride = tiles ? 1 : padded_rows(shape[0]);
    for (std::int64_t r = 0; r < lines; ++r) {
      for (std::int64_t c = 0; c < blocks_of(shape[1]); ++c) {
        own.as<float>()[r * row_stride + c * column_stride] = scale_at(blocks, scales, line + r, c);
      }
    }
    return own;
  }

  Context ctx_;
  Context host_ = Context::cpu();
  SafetensorsWriter writer_;
  std::size_t piece_bytes_;
  std::vector<char> fetched_ = {}, values_ = {};
};

/// Calls visit(item) for all while their units are whole.
template <class Visit>
void visit_by_units(Engine& engine, const std::vector<Item>& items, const Visit& visit) {
  for (auto item = items.begin(); item != items.end();) {
    const int unit = item->unit;
    engine.gather(unit);
    for (; item != items.end() && item->unit == unit; ++item) visit(*item);
    engine.release(unit);
  }
}

}  // namespace

// A rank that cannot write goes on gathering, because the others do.
void export_weights_sync(const Context& ctx, Engine& engine, const std::string& path,
                         const std::vector<NamedWeight>& weights, const WeightExport& how) {
  const std::string subject = path.empty() ? "export_weights_sync" : path;
  check(subject, how);
  const std::vector<Item> items = items_of(engine, subject, weights, how);
  const bool has_codes =
      std::any_of(items.begin(), items.end(), [](const Item& item) { return item.is_scales; });
  require(how.dtype != DType::e4m3 || has_codes, subject,
          ": dtype is e4m3, but none of the weights is FP8-managed");
  engine.plan();  // throws before freeze()
  std::optional<Export> file;
  std::exception_ptr failure;
  const auto attempt = [&](const auto& work) {
    if (path.empty() || failure != nullptr) return;
    try {
      work();
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
  };
  attempt([&] { file.emplace(ctx, path, items, how); });
  visit_by_units(engine, items, [&](const Item& item) {
    attempt([&] { file->write(item, stored_of(engine, item)); });
  });
  attempt([&] { file->finish(); });
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace octet
