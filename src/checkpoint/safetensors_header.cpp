// SPDX-License-Identifier: Apache-2.0
// The header of a safetensors file. The parser's events are checked as they come, because a parsed
// document no longer shows that a name stood there twice, and so that depth and size of a document
// never matter.
#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "checkpoint/shown.hpp"
#include "octet/checkpoint/safetensors.hpp"
#include "octet/core/error.hpp"

namespace octet {
namespace {

struct NamedDtype {
  std::string_view name;
  int bits;
};

constexpr NamedDtype kDtypes[] = {
    {"F32", 32},        {"BF16", 16},       {"F16", 16}, {"F8_E4M3", 8}, {"F8_E5M2", 8},
    {"U8", 8},          {"I8", 8},          {"BOOL", 8}, {"I32", 32},    {"U32", 32},
    {"I64", 64},        {"U64", 64},        {"F64", 64}, {"I16", 16},    {"U16", 16},
    {"C64", 64},        {"F8_E8M0", 8},     {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
};
constexpr std::string_view kMetadata = "__metadata__";

/// Bytes of the elements, or nothing where they overflow or do not fill whole bytes.
std::optional<std::uint64_t> bytes_of(const FileTensor& tensor) {
  std::uint64_t bits = 1;
  for (std::int64_t dim : tensor.shape) {
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(dim), &bits)) return std::nullopt;
  }
  const auto each = static_cast<std::uint64_t>(file_dtype_bits(tensor.dtype));
  if (__builtin_mul_overflow(bits, each, &bits) || bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

/// Takes the events of the parser; each returns true to go on and throws octet::Error otherwise.
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderHandler(std::string_view file, SafetensorsHeader& header) : file_(file), header_(header) {}

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) return go(Place::top);
    if (place_ != Place::name) refuse("an object");
    if (name_ != kMetadata) {
      tensor_ = {.name = name_};
      seen_ = {};
      return go(Place::tensor);
    }
    return go(Place::metadata);
  }

  bool end_object() override {
    if (place_ == Place::top) return go(Place::done);
    if (place_ == Place::tensor) end_tensor();
    return go(Place::top);
  }

  bool key(string_t& text) override {
    if (place_ == Place::top) {
      require(names_.insert(text).second, file_, ": the name ", shown_text(text),
              " stands there twice");
      name_ = std::move(text);
      return go(Place::name);
    }
    if (place_ == Place::metadata) {
      require(!header_.metadata.contains(text), file_, ": __metadata__: the key ", shown_text(text),
              " stands there twice");
      field_ = std::move(text);
      return go(Place::metadata_value);
    }
    start_field(text);
    return true;
  }

  bool string(string_t& text) override {
    if (place_ == Place::metadata_value) {
      header_.metadata.emplace(field_, std::move(text));
      return go(Place::metadata);
    }
    if (place_ != Place::dtype) refuse("a string");
    tensor_.dtype = std::move(text);
    require(file_dtype_bits(tensor_.dtype) != 0, where(), "is ", shown_text(tensor_.dtype),
            ", which the format does not have");
    return go(Place::tensor);
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::shape) return go(Place::in_shape);
    if (place_ == Place::offsets) return go(Place::in_offsets);
    refuse("a list");
  }

  bool end_array() override {
    if (place_ == Place::in_offsets) {
      require(offsets_.size() == 2, where(), "has ", offsets_.size(), " numbers; it must have 2");
    }
    return go(Place::tensor);
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::in_offsets) {
      require(offsets_.size() < 2, where(), "has more than 2 numbers");
      offsets_.push_back(value);
      return true;
    }
    if (place_ != Place::in_shape) refuse("a number");
    require(value <= std::uint64_t{std::numeric_limits<std::int64_t>::max()}, where(), "holds ",
            value, ", which is too large");
    tensor_.shape.push_back(static_cast<std::int64_t>(value));
    return true;
  }

  bool number_integer(number_integer_t value) override {
    if (place_ != Place::in_shape && place_ != Place::in_offsets) refuse("a number");
    fail(where(), "holds ", value, "; it must not be negative");
  }
  bool number_float(number_float_t, const string_t& text) override {
    if (place_ != Place::in_shape && place_ != Place::in_offsets) refuse("a number");
    fail(where(), "holds ", shown_text(text), ", which is not an integer of 64 bits");
  }
  bool null() override { refuse("null"); }
  bool boolean(bool) override { refuse("true or false"); }
  bool binary(binary_t&) override { refuse("binary"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail(file_, ": the header is not valid JSON in UTF-8, at byte ", position, ": ",
         shown_text(error.what()));
  }

 private:
  enum class Place {
    outside,
    top,
    name,
    metadata,
    metadata_value,
    tensor,
    dtype,
    shape,
    in_shape,
    offsets,
    in_offsets,
    done
  };
  struct Seen {
    bool dtype = false, shape = false, offsets = false;
  };

  bool go(Place place) {
    place_ = place;
    return true;
  }

  void start_field(const std::string& text) {
    const auto once = [&](bool& seen, Place place) {
      require(!seen, where_tensor(), "the field ", text, " stands there twice");
      seen = true;
      go(place);
    };
    if (text == "dtype") {
      once(seen_.dtype, Place::dtype);
    } else if (text == "shape") {
      once(seen_.shape, Place::shape);
    } else if (text == "data_offsets") {
      once(seen_.offsets, Place::offsets);
      offsets_.clear();
    } else {
      fail(where_tensor(), "a field ", shown_text(text),
           "; the format has dtype, shape and data_offsets");
    }
  }

  void end_tensor() {
    require(seen_.dtype, where_tensor(), "dtype is missing");
    require(seen_.shape, where_tensor(), "shape is missing");
    require(seen_.offsets, where_tensor(), "data_offsets is missing");
    require(offsets_[0] <= offsets_[1], where_tensor(), "data_offsets is [", offsets_[0], ", ",
            offsets_[1], "], the end before the beginning");
    tensor_.begin = offsets_[0];
    tensor_.bytes = offsets_[1] - offsets_[0];
    const std::optional<std::uint64_t> bytes = bytes_of(tensor_);
    require(bytes.has_value(), where_tensor(),
            "shape has a product that does not fit, or does not "
            "fill whole bytes with ",
            tensor_.dtype);
    require(*bytes == tensor_.bytes, where_tensor(), "data_offsets span ", tensor_.bytes,
            " bytes, but shape and dtype ", tensor_.dtype, " take ", *bytes);
    header_.tensors.push_back(std::move(tensor_));
  }

  std::string where_tensor() const {
    return std::string(file_) + ": tensor " + shown_text(name_) + ": ";
  }
  std::string where() const {
    const bool in_shape = place_ == Place::shape || place_ == Place::in_shape;
    return where_tensor() + (in_shape                 ? "shape "
                             : place_ == Place::dtype ? "dtype "
                                                      : "data_offsets ");
  }

  [[noreturn]] void refuse(std::string_view what) const {
    switch (place_) {
      case Place::name:
        fail(file_, ": ", name_ == kMetadata ? "" : "tensor ", shown_text(name_), " is ", what,
             "; it must be an object");
      case Place::metadata_value:
        fail(file_, ": __metadata__: the value of ", shown_text(field_), " is ", what,
             "; it must be a string");
      case Place::dtype: fail(where(), "is ", what, "; it must be a string");
      case Place::shape:
      case Place::offsets: fail(where(), "is ", what, "; it must be a list of integers");
      case Place::in_shape:
      case Place::in_offsets: fail(where(), "holds ", what, "; it must hold integers");
      default: fail(file_, ": the header is ", what, "; it must be an object");
    }
  }

  std::string_view file_;
  SafetensorsHeader& header_;
  Place place_ = Place::outside;
  std::unordered_set<std::string> names_ = {};
  std::string name_ = {}, field_ = {};
  FileTensor tensor_ = {};
  Seen seen_ = {};
  std::vector<std::uint64_t> offsets_ = {};
};

/// Sorts the tensors by their data and checks that they cover it.
void check_cover(std::string_view file, std::vector<FileTensor>& tensors,
                 std::uint64_t data_bytes) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const FileTensor& a, const FileTensor& b) {
    return std::tie(a.begin, a.bytes) < std::tie(b.begin, b.bytes);
  });
  std::uint64_t end = 0;
  const FileTensor* before = nullptr;
  for (const FileTensor& tensor : tensors) {
    const std::uint64_t tensor_end = tensor.begin + tensor.bytes;
    const auto field = [&] { return ": tensor " + shown_text(tensor.name) + ": data_offsets "; };
    require(tensor_end <= data_bytes, file, field(), "end at ", tensor_end, ", beyond the data of ",
            data_bytes, " bytes; the file may be truncated");
    require(tensor.begin >= end, file, field(), "begin at ", tensor.begin,
            ", and overlap those of ", before == nullptr ? "" : shown_text(before->name),
            ", which end at ", end);
    require(tensor.begin == end, file, field(), "begin at ", tensor.begin, "; from ", end,
            " on there are bytes of no tensor");
    end = tensor_end;
    before = &tensor;
  }
  require(end == data_bytes, file, ": the data have ", data_bytes, " bytes, data_offsets end at ",
          end);
}

}  // namespace

std::string_view file_dtype(DType dtype) { return kDtypes[static_cast<int>(dtype)].name; }

std::optional<DType> dtype_of_file(std::string_view dtype) {
  for (DType known : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
    if (file_dtype(known) == dtype) return known;
  }
  return std::nullopt;
}

int file_dtype_bits(std::string_view dtype) {
  for (const NamedDtype& known : kDtypes) {
    if (known.name == dtype) return known.bits;
  }
  return 0;
}

std::uint64_t numel_of(const FileTensor& tensor) {
  std::uint64_t count = 1;
  for (std::int64_t dim : tensor.shape) count *= static_cast<std::uint64_t>(dim);
  return count;
}

std::uint64_t safetensors_header_bytes(std::string_view file, std::string_view prefix,
                                       std::uint64_t file_bytes) {
  require(file_bytes >= 8 && prefix.size() >= 8, file, ": ", file_bytes,
          " bytes are too few for a safetensors file, which starts with 8 bytes of header length");
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(prefix[i]);
  require(length <= kMaxHeaderBytes, file, ": header length is ", length, "; at most ",
          kMaxHeaderBytes, " are allowed, so this may be no safetensors file");
  require(length <= file_bytes - 8, file, ": header length is ", length, ", but only ",
          file_bytes - 8, " bytes follow it; the file may be truncated");
  return length;
}

SafetensorsHeader parse_safetensors_header(std::string_view file, std::string_view header,
                                           std::uint64_t data_bytes) {
  require(header.starts_with('{'), file, ": the header does not start with {");
  // The parser would take a zero byte for the end and not look at what follows.
  require(header.find('\0') == std::string_view::npos, file, ": the header holds a zero byte");
  SafetensorsHeader result;
  HeaderHandler handler(file, result);
  nlohmann::json::sax_parse(header.begin(), header.end(), &handler);
  check_cover(file, result.tensors, data_bytes);
  return result;
}

}  // namespace octet
