// SPDX-License-Identifier: Apache-2.0
// The index of a model that a hub has in several files.
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/shown.hpp"
#include "octet/checkpoint/weights.hpp"
#include "octet/core/error.hpp"

namespace octet {
namespace {

/// Takes "weight_map" of the outermost object; what else is there counts its depth and is passed.
class IndexHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  IndexHandler(std::string_view file, std::map<std::string, std::string>& map)
      : file_(file), map_(map) {}

  bool start_object(std::size_t) override {
    if (depth_ == 1 && key_ == kMap) {
      require(!found_, file_, ": weight_map stands there twice");
      found_ = in_map_ = true;
    } else {
      value("an object");
    }
    ++depth_;
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override {
    value("a list");
    ++depth_;
    return true;
  }
  bool end_array() override { return close(); }
  bool key(string_t& text) override {
    if (depth_ == 1 || in_map_) key_ = std::move(text);
    return true;
  }
  bool string(string_t& text) override {
    if (!in_map_) return value("a string");
    const std::filesystem::path name(text);
    const std::filesystem::path plain = name.lexically_normal();
    require(!text.empty() && text.find('\0') == std::string::npos && !name.is_absolute() &&
                *plain.begin() != "..",
            where(), "is ", shown_text(text), "; it must be a file below the folder of the index");
    require(map_.emplace(key_, text).second, where(), "stands there twice");
    return true;
  }
  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("true or false"); }
  bool number_integer(number_integer_t) override { return value("a number"); }
  bool number_unsigned(number_unsigned_t) override { return value("a number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number"); }
  bool binary(binary_t&) override { return value("binary"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail(file_, ": not valid JSON in UTF-8, at byte ", position, ": ", shown_text(error.what()));
  }
  bool found() const { return found_; }

 private:
  static constexpr std::string_view kMap = "weight_map";

  bool value(std::string_view what) const {
    require(depth_ > 0 || what == "an object", file_, ": is ", what, "; it must be an object");
    require(depth_ != 1 || key_ != kMap, file_, ": weight_map is ", what, "; it must be an object");
    require(!in_map_, where(), "is ", what, "; it must be the name of a file");
    return true;
  }
  bool close() {
    --depth_;
    in_map_ = false;  // nothing is nested in the map
    return true;
  }
  std::string where() const {
    return std::string(file_) + ": weight_map: " + shown_text(key_) + " ";
  }

  std::string_view file_;
  std::map<std::string, std::string>& map_;
  std::uint64_t depth_ = 0;
  bool found_ = false, in_map_ = false;
  std::string key_ = {};
};

}  // namespace

std::map<std::string, std::string> parse_weight_index(std::string_view file,
                                                      std::string_view text) {
  // The parser would take a zero byte for the end and not look at what follows.
  require(text.find('\0') == std::string_view::npos, file, ": holds a zero byte");
  std::map<std::string, std::string> map;
  IndexHandler handler(file, map);
  nlohmann::json::sax_parse(text.begin(), text.end(), &handler);
  require(handler.found(), file, ": weight_map is missing");
  return map;
}

}  // namespace octet
