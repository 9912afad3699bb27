// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <unordered_map>

#include "checkpoint/file_handle.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/safetensors.hpp"

namespace octet {

struct SafetensorsReader::Impl {
  explicit Impl(const std::string& name) : path(name), file(open_to_read(name)) {
    const std::uint64_t bytes = file.bytes;
    std::string text(std::min<std::uint64_t>(bytes, 8), '\0');
    read(0, text.size(), text.data());
    const std::uint64_t length = safetensors_header_bytes(path, text, bytes);
    text.resize(length);
    read(8, length, text.data());
    data_at = 8 + length;
    header = parse_safetensors_header(path, text, bytes - data_at);
    for (std::size_t i = 0; i < header.tensors.size(); ++i) {
      places.emplace(header.tensors[i].name, i);
    }
  }

  void read(std::uint64_t offset, std::uint64_t bytes, void* to) const {
    read_all(file.handle.get(), path, offset, bytes, to);
  }

  std::string path;
  OpenedFile file;
  std::uint64_t data_at = 0;
  SafetensorsHeader header = {};
  std::unordered_map<std::string_view, std::size_t> places = {};  // of the header's names
};

SafetensorsReader::SafetensorsReader(const std::string& path)
    : impl_(std::make_unique<Impl>(path)) {}
SafetensorsReader::~SafetensorsReader() = default;
SafetensorsReader::SafetensorsReader(SafetensorsReader&&) noexcept = default;
SafetensorsReader& SafetensorsReader::operator=(SafetensorsReader&&) noexcept = default;

const std::string& SafetensorsReader::path() const { return impl_->path; }
const std::vector<FileTensor>& SafetensorsReader::tensors() const { return impl_->header.tensors; }
const std::map<std::string, std::string>& SafetensorsReader::metadata() const {
  return impl_->header.metadata;
}

const FileTensor* SafetensorsReader::find(std::string_view name) const {
  const auto place = impl_->places.find(name);
  return place == impl_->places.end() ? nullptr : &impl_->header.tensors[place->second];
}

const FileTensor& SafetensorsReader::at(std::string_view name) const {
  const FileTensor* tensor = find(name);
  require(tensor != nullptr, impl_->path, ": has no tensor ", shown_text(name));
  return *tensor;
}

void SafetensorsReader::read(const FileTensor& tensor, std::uint64_t offset, std::uint64_t bytes,
                             void* to) const {
  require(offset <= tensor.bytes && bytes <= tensor.bytes - offset, impl_->path, ": tensor ",
          shown_text(tensor.name), ": ", bytes, " bytes from ", offset,
          " on were asked for; it has ", tensor.bytes);
  impl_->read(impl_->data_at + tensor.begin + offset, bytes, to);
}

}  // namespace octet
