// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>

#include "checkpoint/file_handle.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/weights.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

namespace fs = std::filesystem;

/// What a path stands for: a folder for the index in it, or else for the file in it.
std::string file_of(const std::string& path) {
  std::error_code ignored;  // opening the file says what is wrong
  if (!fs::is_directory(path, ignored)) return path;
  for (const char* name : {"model.safetensors.index.json", "model.safetensors"}) {
    const fs::path file = fs::path(path) / name;
    if (fs::exists(file, ignored)) return file.string();
  }
  fail(path, ": the folder has neither model.safetensors.index.json nor model.safetensors");
}

bool same_shape(const FileTensor& tensor, const Shape& shape) {
  if (tensor.shape.size() != static_cast<std::size_t>(shape.rank())) return false;
  for (int i = 0; i < shape.rank(); ++i) {
    if (tensor.shape[static_cast<std::size_t>(i)] != shape[i]) return false;
  }
  return true;
}

std::string shape_text(const FileTensor& tensor) {
  std::string text;
  for (std::int64_t dim : tensor.shape) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

}  // namespace

struct WeightFiles::Impl {
  struct Place {
    std::size_t file;
    const FileTensor* tensor;  // of that file's reader, whose list does not move
  };

  explicit Impl(const std::string& given) : path(file_of(given)) {
    if (path.ends_with(".json")) {
      open_index();
      return;
    }
    files.emplace_back(path);
    for (const FileTensor& tensor : files[0].tensors())
      places.emplace(tensor.name, Place{0, &tensor});
  }

  void open_index() {
    std::map<std::string, std::size_t> opened;
    const fs::path folder = fs::path(path).parent_path();
    for (const auto& [name, shard] : parse_weight_index(path, read_text(path, kMaxHeaderBytes))) {
      const auto [entry, is_new] = opened.emplace(shard, files.size());
      const std::string file = (folder / shard).string();
      std::error_code ignored;
      require(!is_new || fs::exists(file, ignored), path, ": weight_map: ", shown_text(name),
              " is in ", shown_text(shard), ", and that file is missing");
      if (is_new) files.emplace_back(file);
      const FileTensor* tensor = files[entry->second].find(name);
      require(tensor != nullptr, path, ": weight_map: ", shown_text(name), " is in ",
              shown_text(shard), ", but that file has no such tensor");
      places.emplace(name, Place{entry->second, tensor});
    }
  }

  std::string path;
  std::vector<SafetensorsReader> files = {};
  std::map<std::string, Place, std::less<>> places = {};
};

WeightFiles::WeightFiles(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
WeightFiles::~WeightFiles() = default;
WeightFiles::WeightFiles(WeightFiles&&) noexcept = default;
WeightFiles& WeightFiles::operator=(WeightFiles&&) noexcept = default;

std::vector<std::string> WeightFiles::names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : impl_->places) names.push_back(name);
  return names;
}

const FileTensor* WeightFiles::find(std::string_view name) const {
  const auto place = impl_->places.find(name);
  return place == impl_->places.end() ? nullptr : place->second.tensor;
}

void WeightFiles::read_sync(const Context& ctx, std::string_view name, const TensorView& out,
                            std::size_t piece_bytes) const {
  const auto place = impl_->places.find(name);
  require(place != impl_->places.end(), impl_->path, ": has no tensor ", shown_text(name));
  const SafetensorsReader& file = impl_->files[place->second.file];
  const FileTensor& tensor = *place->second.tensor;
  const std::string where = file.path() + ": tensor " + shown_text(name) + ": ";
  const std::optional<DType> dtype = dtype_of_file(tensor.dtype);
  require(dtype && !is_fp8(*dtype), where, "dtype is ", tensor.dtype,
          "; what is read must be F32, BF16 or F16");
  require(!is_fp8(out.dtype), where, "is to be read as ", name_of(out.dtype),
          "; allowed are f32, bf16, f16");
  require(same_shape(tensor, out.shape), where, "shape is ", shape_text(tensor),
          ", and it is to be read into ", out.shape);
  require(out.device == ctx.device(), where, "is to be read to ", out.device,
          ", the context is on ", ctx.device());
  require(out.data != nullptr || out.numel() == 0, where, "is to be read to a null pointer");

  const Context host = Context::cpu();
  const std::int64_t count = out.numel();
  const auto most =
      static_cast<std::int64_t>(std::max<std::size_t>(piece_bytes, 4) / size_of(*dtype));
  const std::int64_t piece = std::min(most, count);
  const Tensor read(host, *dtype, {piece}), converted(host, out.dtype, {piece});
  for (std::int64_t at = 0; at < count; at += piece) {
    const std::int64_t n = std::min(piece, count - at);
    const TensorView from = {read.view().data, *dtype, {n}, {}};
    const TensorView to = {converted.view().data, out.dtype, {n}, {}};
    file.read(tensor, static_cast<std::uint64_t>(at) * size_of(*dtype), from.bytes(), from.data);
    convert(host, {from, nullptr}, to);
    copy_bytes(ctx, out.as<char>() + static_cast<std::size_t>(at) * size_of(out.dtype), to.data,
               to.bytes());
    ctx.synchronize();
  }
}

}  // namespace octet
