// SPDX-License-Identifier: Apache-2.0
// Ordinary files of weights read into tensors of every dtype, against the formats' definitions in
// double precision.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <vector>

#include "octet/checkpoint/weights.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/safetensors_bytes.hpp"

namespace octet::test {
namespace {

constexpr DType kWide[] = {DType::f32, DType::bf16, DType::f16};

template <class T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// Every code of a 16-bit dtype; of f32 random ones, ties of both 16-bit formats, limits, specials.
std::string all_kinds_of(DType dtype) {
  if (dtype != DType::f32) {
    std::vector<std::uint16_t> codes(65536);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint16_t>(i);
    return raw(codes);
  }
  std::vector<float> values = normal_values(3001, 5);
  Draws draws(3);
  for (int i = 0; i < 3001; ++i) values.push_back(bits_to_float(draws()));
  for (std::uint32_t top = 0; top < 65536; top += 7) {
    for (std::uint32_t low : {0x8000u, 0x7FFFu, 0x8001u, 0x1000u, 0x3000u}) {
      values.push_back(bits_to_float(top << 16 | low));
    }
  }
  return raw(values);
}

/// Element i of raw bytes, in double.
double value_at(DType dtype, const std::string& bytes, std::size_t i) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    return static_cast<double>(value);
  }
  std::uint16_t code;
  std::memcpy(&code, bytes.data() + 2 * i, 2);
  return table_of(dtype).decode(code);
}

double rounded_to(DType dtype, double x) {
  return dtype == DType::f32 ? x : table_of(dtype).round(x);
}

std::string file_of(DType dtype, const std::string& data) {
  const std::size_t count = data.size() / size_of(dtype);
  const std::string header = "{\"w\":{\"dtype\":\"" + std::string(file_dtype(dtype)) +
                             "\",\"shape\":[" + std::to_string(count) + "],\"data_offsets\":[0," +
                             std::to_string(data.size()) + "]}}";
  return header_length(header.size()) + header + data;
}

/// Where what was read first differs from the reference; empty when nowhere.
std::string difference(DType from, const std::string& data, DType to, const std::string& got) {
  for (std::size_t i = 0; i < data.size() / size_of(from); ++i) {
    const double wanted = rounded_to(to, value_at(from, data, i));
    const double value = value_at(to, got, i);
    const bool same = std::isnan(wanted)
                          ? std::isnan(value)
                          : value == wanted && std::signbit(value) == std::signbit(wanted);
    if (!same) {
      return std::to_string(i) + ": " + std::to_string(value) + " instead of " +
             std::to_string(wanted);
    }
  }
  return {};
}

void save(const std::string& path, const std::vector<std::string>& names) {
  std::vector<FileTensor> list;
  for (const std::string& name : names) list.push_back({name, "F32", {2}, 0, 8});
  SafetensorsWriter writer(path, list);
  for (const std::string& name : names) {
    const float values[] = {static_cast<float>(name[0]), 2.0f};
    writer.write(values, sizeof values);
  }
  writer.finish();
}

std::string index_text(const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string text =
      "{\"metadata\":{\"total_size\":24,\"deep\":[[{\"weight_map\":[1]}]]},\n"
      "\"weight_map\":{";
  for (const auto& [name, file] : entries) {
    text += (text.back() == '{' ? "\"" : ",\"") + name + "\":\"" + file + "\"";
  }
  return text + "}}";
}

float first_of(const WeightFiles& files, const std::string& name) {
  const Context ctx = Context::cpu();
  const Tensor out(ctx, DType::f32, {2});
  files.read_sync(ctx, name, out);
  return out.as<float>()[0];
}

}  // namespace

TEST_CASE("Every dtype is read into every dtype, rounded once, in pieces of any size") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  for (DType from : kWide) {
    const std::string data = all_kinds_of(from);
    write_bytes(path, file_of(from, data));
    const WeightFiles files(path);
    const auto count = static_cast<std::int64_t>(data.size() / size_of(from));
    for (DType to : kWide) {
      for (const Context& ctx : test_contexts()) {
        for (std::size_t piece : {std::size_t{12345}, std::size_t{1} << 20}) {
          const Guarded out(ctx, static_cast<std::size_t>(count) * size_of(to));
          files.read_sync(ctx, "w", out.view(to, {count}), piece);
          INFO(name_of(from) << " to " << name_of(to) << " on " << ctx.device());
          CHECK(difference(from, data, to, raw(out.values<std::uint8_t>())) == "");
          CHECK(out.intact());
        }
      }
    }
  }
}

TEST_CASE("Tensors of every rank and of no elements; pieces of a single element") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  SafetensorsWriter writer(path, {{"scalar", "BF16", {}, 0, 2},
                                  {"empty", "F16", {3, 0, 2}, 0, 0},
                                  {"four", "BF16", {1, 2, 1, 3}, 0, 12}});
  const std::uint16_t codes[] = {0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  writer.write(codes, sizeof codes);
  writer.finish();
  const WeightFiles files(path);
  CHECK(files.names() == std::vector<std::string>{"empty", "four", "scalar"});
  for (const Context& ctx : test_contexts()) {
    const Guarded one(ctx, 4), none(ctx, 0), four(ctx, 24);
    files.read_sync(ctx, "scalar", one.view(DType::f32, {}));
    files.read_sync(ctx, "empty", none.view(DType::f32, {3, 0, 2}));
    files.read_sync(ctx, "four", four.view(DType::f32, {1, 2, 1, 3}), 1);
    CHECK(one.values<float>() == std::vector<float>{1});
    CHECK(four.values<float>() == std::vector<float>{2, 3, 4, 5, 6, 7});
    CHECK((one.intact() && none.intact() && four.intact()));
  }
}

TEST_CASE("What does not fit is refused by name, and nothing is touched") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  SafetensorsWriter writer(path, {{"w", "F32", {2, 3}, 0, 24}, {"codes", "F8_E4M3", {4}, 0, 4}});
  writer.write(std::string(28, 'x').data(), 28);
  writer.finish();
  const WeightFiles files(path);
  const Context ctx = Context::cpu();
  const Guarded out(ctx, 24);
  const auto error = [&](const char* name, const TensorView& view) {
    return error_of([&] { files.read_sync(ctx, name, view); });
  };
  CHECK(missing(error("v", out.view(DType::f32, {2, 3})), {path, "\"v\""}) == "");
  CHECK(missing(error("codes", out.view(DType::f32, {4})), {path, "\"codes\"", "F8_E4M3"}) == "");
  CHECK(missing(error("w", out.view(DType::e4m3, {2, 3})), {path, "\"w\"", "e4m3"}) == "");
  CHECK(missing(error("w", out.view(DType::f32, {3, 2})), {"\"w\"", "[2, 3]", "[3, 2]"}) == "");
  CHECK(missing(error("w", out.view(DType::f32, {6})), {"\"w\"", "[2, 3]", "[6]"}) == "");
  CHECK(missing(error("w", {out.data(), DType::f32, {2, 3}, {DeviceType::cuda, 0}}),
                {"\"w\"", "cuda:0", "cpu"}) == "");
  CHECK(missing(error("w", {nullptr, DType::f32, {2, 3}, {}}), {"\"w\"", "null"}) == "");
  CHECK(out.values<std::uint8_t>() == std::vector<std::uint8_t>(24, Guarded::kFill));
}

TEST_CASE("A model in several files is read by its index, and by its folder") {
  const Folder folder;
  const std::string index = folder.file("model.safetensors.index.json");
  save(folder.file("m-1.safetensors"), {"a", "c"});
  save(folder.file("m-2.safetensors"), {"b", "not in the map"});
  write_bytes(
      index,
      index_text({{"a", "m-1.safetensors"}, {"b", "./m-2.safetensors"}, {"c", "m-1.safetensors"}}));
  for (const std::string& path : {index, folder.file("")}) {
    const WeightFiles files(path);
    CHECK(files.names() == std::vector<std::string>{"a", "b", "c"});
    for (const char* name : {"a", "b", "c"}) {
      CHECK(first_of(files, name) == static_cast<float>(name[0]));
    }
    CHECK(files.find("not in the map") == nullptr);
  }
  std::filesystem::remove(index);
  CHECK(missing(error_of([&] { WeightFiles files(folder.file("")); }), {"model.safetensors"}) ==
        "");
  save(folder.file("model.safetensors"), {"d"});
  CHECK(first_of(WeightFiles(folder.file("")), "d") == static_cast<float>('d'));
}

TEST_CASE("An index whose files lack something is refused by name") {
  const Folder folder;
  const std::string index = folder.file("x.json");
  save(folder.file("m-1.safetensors"), {"a"});
  const auto open = [&] { WeightFiles files(index); };
  CHECK(missing(error_of(open), {index}) == "");
  write_bytes(index, index_text({{"a", "m-1.safetensors"}, {"b", "m-2.safetensors"}}));
  CHECK(missing(error_of(open), {index, "\"b\"", "m-2.safetensors", "missing"}) == "");
  write_bytes(index, index_text({{"a", "m-1.safetensors"}, {"b", "m-1.safetensors"}}));
  CHECK(missing(error_of(open), {index, "\"b\"", "m-1.safetensors", "no such tensor"}) == "");
  write_bytes(folder.file("m-2.safetensors"), "no");
  write_bytes(index, index_text({{"b", "m-2.safetensors"}}));
  CHECK(missing(error_of(open), {"m-2.safetensors", "too few"}) == "");
}

TEST_CASE("A path that cannot be looked at is an error of the library's") {
  const Folder folder;
  const std::string loop = folder.file("loop");
  std::filesystem::create_symlink(loop, loop);
  for (const std::string& path : {loop, loop + "/model.safetensors", loop + "/an.index.json"}) {
    std::string message;
    try {
      WeightFiles files(path);
    } catch (const Error& error) {
      message = error.what();
    }
    CHECK(missing(message, {path, "opened"}) == "");
  }
}

TEST_CASE("Every rule of an index has an error that names the entry") {
  const auto error = [](const std::string& text) {
    const std::string message = error_of([&] { parse_weight_index("i.json", text); });
    CHECK(missing(message, {"i.json"}) == "");
    return message;
  };
  const auto map = [](const std::string& inside) { return "{\"weight_map\":" + inside + "}"; };
  CHECK(missing(error(""), {"not valid JSON"}) == "");
  CHECK(missing(error("{"), {"not valid JSON"}) == "");
  CHECK(missing(error(std::string("{}\0", 3)), {"zero byte"}) == "");
  CHECK(missing(error("{\"\xFF\":1}"), {"not valid JSON"}) == "");
  CHECK(missing(error("[]"), {"a list", "must be an object"}) == "");
  CHECK(missing(error("7"), {"a number", "must be an object"}) == "");
  CHECK(missing(error("{}"), {"weight_map is missing"}) == "");
  CHECK(missing(error("{\"a\":{\"weight_map\":{}}}"), {"weight_map is missing"}) == "");
  CHECK(missing(error(map("[]")), {"weight_map is a list"}) == "");
  CHECK(missing(error(map("\"x\"")), {"weight_map is a string"}) == "");
  CHECK(missing(error(map("{\"a\":1}")), {"\"a\"", "a number"}) == "");
  CHECK(missing(error(map("{\"a\":{}}")), {"\"a\"", "an object"}) == "");
  CHECK(missing(error(map("{\"a\":[\"f\"]}")), {"\"a\"", "a list"}) == "");
  CHECK(missing(error(map("{\"a\":\"f\",\"a\":\"g\"}")), {"\"a\"", "twice"}) == "");
  CHECK(missing(error("{\"weight_map\":{},\"weight_map\":{}}"), {"twice"}) == "");
  for (const char* name : {"", "/etc/f", "../f", "a/../../f", "f\\u0000g"}) {
    CHECK(missing(error(map("{\"a\":\"" + std::string(name) + "\"}")), {"\"a\"", "folder"}) == "");
  }
  CHECK(error_of([&] { parse_weight_index("i.json", map("{\"a\":\"sub/f\"}")); }) == "no error");
}

}  // namespace octet::test
