// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/index.hpp"

#include <charconv>
#include <cmath>
#include <limits>

#include "checkpoint/layout.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/xxh64.hpp"

namespace octet {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "octet checkpoint";
constexpr std::int64_t kVersion = 1;
constexpr int kDeepest = 16;  ///< of JSON; an index has 8

json json_of(const AdamwHyper& h) {
  return {{"lr_factor", h.lr_factor},
          {"beta1", h.beta1},
          {"beta2", h.beta2},
          {"eps", h.eps},
          {"weight_decay", h.weight_decay}};
}

json json_of(const IndexParam& param) {
  json arrays = json::array();
  for (const IndexArray& array : param.arrays) {
    json ranges = json::array();
    for (const IndexRange& range : array.ranges) {
      json one = octet::json_of(range.tensor);
      one["begin"] = range.begin;
      one["count"] = range.count;
      ranges.push_back(std::move(one));
    }
    arrays.push_back(
        {{"name", array.name}, {"format", array.format}, {"ranges", std::move(ranges)}});
  }
  return {{"name", param.name},
          {"shape", param.shape},
          {"hyper", json_of(param.hyper)},
          {"arrays", std::move(arrays)}};
}

json content_of(const Index& index) {
  json content = {
      {"id", index.id},
      {"step", index.step},
      {"skipped", index.skipped},
      {"level", index.level},
      {"sharding", index.sharding},
      {"adamw",
       {{"seed", index.adamw.seed},
        {"decoupled_weight_decay", index.adamw.decoupled_weight_decay},
        {"maximize", index.adamw.maximize},
        {"stochastic_rounding", index.adamw.stochastic_rounding}}},
      {"gradients",
       {{"gradient", index.gradients.gradient},
        {"reduced", index.gradients.reduced},
        {"accumulator", index.gradients.accumulator},
        {"micro_batches", index.gradients.micro_batches}}},
      {"metadata", index.metadata},
      {"scales", octet::json_of(index.scales)},
  };
  for (const char* list : {"files", "params", "extras"}) content[list] = json::array();
  for (const IndexFile& file : index.files) {
    content["files"].push_back({{"name", file.name}, {"bytes", file.bytes}});
  }
  for (const IndexParam& param : index.params) content["params"].push_back(json_of(param));
  for (const IndexExtra& extra : index.extras) {
    json ranks = json::array();
    for (const IndexTensor& tensor : extra.ranks) ranks.push_back(octet::json_of(tensor));
    content["extras"].push_back(
        {{"name", extra.name}, {"bytes", extra.bytes}, {"ranks", std::move(ranks)}});
  }
  return content;
}

IndexTensor read_tensor(const JsonField& field, std::size_t files) {
  IndexTensor tensor;
  const std::int64_t file = field.at("file").integer();
  if (static_cast<std::uint64_t>(file) >= files) {
    field.at("file").refuse("is ", file, "; there are ", files, " files");
  }
  tensor.file = static_cast<int>(file);
  tensor.name = field.at("tensor").text();
  tensor.hash = field.at("xxh64").hash();
  return tensor;
}

AdamwHyper read_hyper(const JsonField& field) {
  return {.lr_factor = field.at("lr_factor").number(),
          .beta1 = field.at("beta1").number(),
          .beta2 = field.at("beta2").number(),
          .eps = field.at("eps").number(),
          .weight_decay = field.at("weight_decay").number()};
}

std::int64_t numel_of(const JsonField& field, const std::vector<std::int64_t>& shape) {
  std::int64_t count = 1;
  for (std::int64_t dim : shape) {
    if (__builtin_mul_overflow(count, dim, &count)) field.refuse("has too many elements");
  }
  return count;
}

IndexArray read_array(const JsonField& field, std::int64_t numel, std::size_t files) {
  IndexArray array{
      .name = field.at("name").text(), .format = field.at("format").text(), .ranges = {}};
  std::int64_t end = 0;
  for (const JsonField& range : field.at("ranges").items()) {
    const std::int64_t begin = range.at("begin").integer(), count = range.at("count").integer();
    if (begin != end) {
      range.at("begin").refuse("is ", begin, "; the range before ends at ", end,
                               ", and ranges follow one another without a gap or an overlap");
    }
    if (count == 0 || count > numel - begin) {
      range.at("count").refuse("is ", count, " from ", begin, " on; the parameter has ", numel,
                               " elements");
    }
    array.ranges.push_back({read_tensor(range, files), begin, count});
    end = begin + count;
  }
  if (end != numel) {
    field.at("ranges").refuse("end at element ", end, "; the parameter has ", numel);
  }
  return array;
}

IndexParam read_param(const JsonField& field, std::size_t files) {
  IndexParam param;
  param.name = field.at("name").text();
  for (const JsonField& dim : field.at("shape").items()) param.shape.push_back(dim.integer());
  param.hyper = read_hyper(field.at("hyper"));
  const std::int64_t numel = numel_of(field.at("shape"), param.shape);
  for (const JsonField& array : field.at("arrays").items()) {
    param.arrays.push_back(read_array(array, numel, files));
  }
  return param;
}

IndexExtra read_extra(const JsonField& field, std::size_t files) {
  IndexExtra extra{
      .name = field.at("name").text(), .bytes = field.at("bytes").unsigned_integer(), .ranks = {}};
  for (const JsonField& rank : field.at("ranks").items()) {
    extra.ranks.push_back(read_tensor(rank, files));
  }
  if (extra.ranks.size() != files) {
    field.at("ranks").refuse("has ", extra.ranks.size(), " entries; ", files, " ranks saved");
  }
  return extra;
}

// A name from a file never becomes a path unless it is the one that this file must have.
void read_files(const JsonField& field, Index& index) {
  const std::vector<JsonField> items = field.items();
  if (items.empty()) field.refuse("is empty");
  const int ranks = static_cast<int>(items.size());
  for (int rank = 0; rank < ranks; ++rank) {
    const JsonField& item = items[static_cast<std::size_t>(rank)];
    const std::string name = item.at("name").text();
    const std::string expected = rank_file_name(index.step, index.id, rank, ranks);
    if (name != expected) {
      item.at("name").refuse("is ", shown_text(name), "; that of rank ", rank, " of ", ranks,
                             " must be \"", expected, "\"");
    }
    index.files.push_back({name, item.at("bytes").unsigned_integer()});
  }
}

Index read_content(const JsonField& content) {
  Index index;
  index.id = hex_of(content.at("id").hash());
  index.step = content.at("step").integer();
  index.skipped = content.at("skipped").integer();
  index.level = content.at("level").text();
  index.sharding = content.at("sharding").text();
  const JsonField adamw = content.at("adamw");
  index.adamw.seed = adamw.at("seed").unsigned_integer();
  index.adamw.decoupled_weight_decay = adamw.at("decoupled_weight_decay").boolean();
  index.adamw.maximize = adamw.at("maximize").boolean();
  index.adamw.stochastic_rounding = adamw.at("stochastic_rounding").boolean();
  const JsonField gradients = content.at("gradients");
  index.gradients = {.gradient = gradients.at("gradient").text(),
                     .reduced = gradients.at("reduced").text(),
                     .accumulator = gradients.at("accumulator").text(),
                     .micro_batches = gradients.at("micro_batches").integer()};
  const JsonField metadata = content.at("metadata");
  if (!metadata.value().is_object()) metadata.refuse("is no object");
  for (const auto& entry : metadata.value().items()) {
    index.metadata[entry.key()] = metadata.at(entry.key().c_str()).text();
  }
  read_files(content.at("files"), index);
  const std::size_t files = index.files.size();
  for (const JsonField& param : content.at("params").items()) {
    index.params.push_back(read_param(param, files));
  }
  index.scales = read_tensor(content.at("scales"), files);
  for (const JsonField& extra : content.at("extras").items()) {
    index.extras.push_back(read_extra(extra, files));
  }
  return index;
}

}  // namespace

nlohmann::json json_of(const IndexTensor& tensor) {
  return {{"file", tensor.file}, {"tensor", tensor.name}, {"xxh64", hex_of(tensor.hash)}};
}

std::string index_text(const Index& index) {
  const json content = content_of(index);
  const std::string text = content.dump();
  const json all = {{"format", kFormat},
                    {"version", kVersion},
                    {"xxh64", hex_of(xxh64(text.data(), text.size()))},
                    {"content", content}};
  return all.dump(1) + "\n";
}

Index parse_index(const std::string& file, const std::string& text) {
  // What writes a value as text calls itself for every level of it.
  const auto check_depth = [&file](int depth, json::parse_event_t, const json&) {
    require(depth <= kDeepest, file, ": is nested more than ", kDeepest, " deep");
    return true;
  };
  json all;
  try {
    all = json::parse(text, check_depth);
  } catch (const json::exception& error) {
    fail(file, ": is not JSON: ", shown_text(error.what()));
  }
  const JsonField root(file, all);
  if (const std::string format = root.at("format").text(); format != kFormat) {
    root.at("format").refuse("is ", shown_text(format), "; it must be \"", kFormat, "\"");
  }
  if (const std::int64_t version = root.at("version").integer(); version != kVersion) {
    root.at("version").refuse("is ", version, "; this library reads ", kVersion);
  }
  const JsonField content = root.at("content");
  const std::string dumped = content.value().dump();
  const std::uint64_t found = xxh64(dumped.data(), dumped.size()), kept = root.at("xxh64").hash();
  if (found != kept) {
    content.refuse("its checksum is ", hex_of(found), ", but xxh64 is ", hex_of(kept),
                   "; the index is damaged");
  }
  return read_content(content);
}

JsonField JsonField::at(const char* key) const {
  if (!value_->is_object()) refuse("is no object");
  const auto found = value_->find(key);
  if (found == value_->end()) refuse("has no ", shown_text(key));
  return {file_, *found, place_.empty() ? std::string(key) : place_ + "." + key};
}

std::vector<JsonField> JsonField::items() const {
  if (!value_->is_array()) refuse("is no array");
  std::vector<JsonField> list;
  for (std::size_t i = 0; i < value_->size(); ++i) {
    list.emplace_back(file_, (*value_)[i], place_ + "[" + std::to_string(i) + "]");
  }
  return list;
}

std::string JsonField::text() const {
  if (!value_->is_string()) refuse("is no text");
  return value_->get<std::string>();
}

std::int64_t JsonField::integer() const {
  const std::uint64_t value = unsigned_integer();
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    refuse("is ", value, ", which is too large");
  }
  return static_cast<std::int64_t>(value);
}

std::uint64_t JsonField::unsigned_integer() const {
  if (!value_->is_number_unsigned()) refuse("is no whole number from 0 on");
  return value_->get<std::uint64_t>();
}

float JsonField::number() const {
  if (!value_->is_number()) refuse("is no number");
  return value_->get<float>();
}

bool JsonField::boolean() const {
  if (!value_->is_boolean()) refuse("is neither true nor false");
  return value_->get<bool>();
}

std::uint64_t JsonField::hash() const {
  const std::string digits = text();
  std::uint64_t value = 0;
  const char* const end = digits.data() + digits.size();
  const auto [stop, error] = std::from_chars(digits.data(), end, value, 16);
  if (digits.size() != 16 || error != std::errc{} || stop != end || hex_of(value) != digits) {
    refuse("is ", shown_text(digits), "; it must have 16 hexadecimal digits");
  }
  return value;
}

std::string hex_of(std::uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (int i = 15; i >= 0; --i, value >>= 4)
    text[static_cast<std::size_t>(i)] = kDigits[value & 15];
  return text;
}

}  // namespace octet
