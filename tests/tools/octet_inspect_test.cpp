// SPDX-License-Identifier: Apache-2.0
// Runs octet_inspect on files whose values are known.
#include <cstring>
#include <vector>

#include "examples/program.hpp"
#include "octet/checkpoint/safetensors.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace octet;
using namespace octet::test;
using nlohmann::json;

namespace {

struct Content {
  std::string name, dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;
};

template <class T>
std::vector<std::uint8_t> raw(const std::vector<T>& values) {
  std::vector<std::uint8_t> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

void save(const std::string& path, const std::vector<Content>& list,
          const std::map<std::string, std::string>& metadata = {}) {
  std::vector<FileTensor> tensors;
  for (const Content& c : list) tensors.push_back({c.name, c.dtype, c.shape, 0, c.bytes.size()});
  SafetensorsWriter writer(path, tensors, metadata);
  for (const Content& c : list) writer.write(c.bytes.data(), c.bytes.size());
  writer.finish();
}

std::vector<std::uint8_t> random_codes(std::size_t count, std::uint32_t seed) {
  Draws draws(seed);
  std::vector<std::uint8_t> codes(count);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(draws());
  return codes;
}

/// Powers of two over a wide range, so that not the largest code alone decides.
std::vector<float> random_scales(std::size_t count, std::uint32_t seed) {
  Draws draws(seed);
  std::vector<float> scales(count);
  for (float& scale : scales) scale = std::ldexp(1.0f, static_cast<int>(draws() % 9) - 12);
  return scales;
}

json entry_of(const json& output, const std::string& name) {
  for (const json& tensor : output["files"][0]["tensors"]) {
    if (tensor["name"] == name) return tensor;
  }
  FAIL("no " << name);
  return {};
}

json run_json(const Folder& folder, const std::string& path) {
  const Outcome outcome = run_program(folder, "--json '" + path + "'");
  INFO(outcome.err);
  REQUIRE(outcome.exit_code == 0);
  return json::parse(outcome.out);
}

/// Largest decoded magnitude, by the definition of E4M3 and the place of each element's scale.
template <class ScaleOf>
double reference_amax(const std::vector<std::uint8_t>& codes, const ScaleOf& scale_of) {
  double amax = 0;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const double value = std::abs(table_of(DType::e4m3).decode(codes[i]));
    if (!std::isnan(value)) amax = std::max(amax, value * static_cast<double>(scale_of(i)));
  }
  return amax;
}

}  // namespace

TEST_CASE("Shares and amax of every dtype") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  std::vector<std::uint8_t> codes(256);
  for (std::size_t i = 0; i < 256; ++i) codes[i] = static_cast<std::uint8_t>(i);
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < 65536; ++i) halves[i] = static_cast<std::uint16_t>(i);
  const std::vector<float> floats = {0.0f, -0.0f, 1e-40f, -3.5f, NAN, INFINITY, 2.0f, -INFINITY};
  const std::vector<double> doubles = {0.0, 5e-324, -1e300, NAN};
  save(path,
       {{"e4m3", "F8_E4M3", {16, 16}, codes},
        {"e5m2", "F8_E5M2", {256}, codes},
        {"f16", "F16", {65536}, raw(halves)},
        {"bf16", "BF16", {256, 256}, raw(halves)},
        {"f32", "F32", {2, 2, 2}, raw(floats)},
        {"f64", "F64", {4}, raw(doubles)},
        {"none", "F32", {0}, {}},
        {"i8", "I8", {4}, {1, 2, 3, 4}}},
       {{"format", "pt"}});
  const json output = run_json(folder, path);
  CHECK(output["files"][0]["file"] == path);
  CHECK(output["files"][0]["metadata"]["format"] == "pt");
  CHECK(output["files"][0]["tensors"].size() == 8);
  struct Expected {
    std::string name;
    double amax, zeros, saturated, subnormal, non_finite;
  };
  // Codes of each kind, of both signs, over all codes.
  const Expected expected[] = {
      {"e4m3", 448, 2 / 256.0, 2 / 256.0, 14 / 256.0, 2 / 256.0},
      {"e5m2", 57344, 2 / 256.0, 2 / 256.0, 6 / 256.0, 8 / 256.0},
      {"f16", 65504, 2 / 65536.0, -1, 2 * 1023 / 65536.0, 2 * 1024 / 65536.0},
      {"bf16", std::ldexp(255.0, 120), 2 / 65536.0, -1, 2 * 127 / 65536.0, 2 * 128 / 65536.0},
      {"f32", 3.5, 2 / 8.0, -1, 1 / 8.0, 3 / 8.0},
      {"f64", 1e300, 1 / 4.0, -1, 1 / 4.0, 1 / 4.0},
      {"none", 0, 0, -1, 0, 0}};
  for (const Expected& e : expected) {
    const json tensor = entry_of(output, e.name);
    INFO(tensor.dump());
    CHECK(tensor["amax"] == e.amax);
    CHECK(tensor["share"]["zeros"] == e.zeros);
    CHECK(tensor["share"].contains("saturated") == (e.saturated >= 0));
    if (e.saturated >= 0) CHECK(tensor["share"]["saturated"] == e.saturated);
    CHECK(tensor["share"]["subnormal"] == e.subnormal);
    CHECK(tensor["share"]["non_finite"] == e.non_finite);
    CHECK(!tensor.contains("scale"));
  }
  CHECK(entry_of(output, "f32")["shape"] == json({2, 2, 2}));
  CHECK(!entry_of(output, "i8").contains("share"));
}

TEST_CASE("Scales of the tensor, of rows, tiles and blocks, as files name them") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  constexpr std::int64_t kRows = 300, kColumns = 697;
  constexpr std::size_t kCount = kRows * kColumns;
  struct Case {
    std::string name, scale;
    std::vector<std::int64_t> shape;
    std::size_t (*place)(std::size_t i);
  };
  // Lengths of octet's own are those of docs: columns of tiles padded to 4, rows to 16.
  const Case cases[] = {
      {"a.weight", "a.weight_scale", {}, [](std::size_t) { return std::size_t{0}; }},
      {"b.weight", "b.weight_scale", {1}, [](std::size_t) { return std::size_t{0}; }},
      {"c.weight", "c.weight_scale", {kRows, 1}, [](std::size_t i) { return i / kColumns; }},
      {"d.weight", "d.weight_scale", {kRows}, [](std::size_t i) { return i / kColumns; }},
      {"e.weight",
       "e.weight_scale_inv",
       {3, 6},
       [](std::size_t i) { return i / kColumns / 128 * 6 + i % kColumns / 128; }},
      {"f.weight",
       "f.weight_scale",
       {kRows, 6},
       [](std::size_t i) { return i / kColumns * 6 + i % kColumns / 128; }},
      {"g.m", "g.m_blocks", {1634}, [](std::size_t i) { return i / 128; }},
      {"h.v.128", "h.v_blocks.128", {1634}, [](std::size_t i) { return i / 128; }},
      {"i.weight",
       "i.weight_blocks",
       {3 * 8},
       [](std::size_t i) { return i / kColumns / 128 * 8 + i % kColumns / 128; }},
      {"j.weight",
       "j.weight_blocks",
       {6 * 304},
       [](std::size_t i) { return i % kColumns / 128 * 304 + i / kColumns; }},
  };
  std::vector<Content> list;
  std::uint32_t seed = 0;
  for (const Case& c : cases) {
    std::size_t count = 1;
    for (std::int64_t dim : c.shape) count *= static_cast<std::size_t>(dim);
    list.push_back({c.name, "F8_E4M3", {kRows, kColumns}, random_codes(kCount, ++seed)});
    list.push_back({c.scale, "F32", c.shape, raw(random_scales(count, seed))});
  }
  // Shapes and a dtype that tell nothing: the scale is named, and there is no amax.
  const std::string unknown[] = {"w.weight", "y.weight", "z.weight"};
  for (const std::string& name : unknown) {
    list.push_back({name, "F8_E4M3", {4, 4}, random_codes(16, 99)});
  }
  list.push_back({"w.weight_scale", "F32", {4, 4}, raw(random_scales(16, 1))});
  list.push_back({"y.weight_scale", "U8", {1}, {1}});
  list.push_back({"z.weight_scale", "F32", {3, 3}, raw(random_scales(9, 1))});
  save(path, list);
  const json output = run_json(folder, path);
  seed = 0;
  for (const Case& c : cases) {
    INFO(c.name);
    const json tensor = entry_of(output, c.name);
    REQUIRE(tensor.contains("scale"));
    CHECK(tensor["scale"]["tensor"] == c.scale);
    const auto codes = random_codes(kCount, ++seed);
    const auto scales = random_scales(tensor["scale"]["count"].get<std::size_t>(), seed);
    CHECK(tensor["scale"]["min"] == *std::min_element(scales.begin(), scales.end()));
    CHECK(tensor["scale"]["max"] == *std::max_element(scales.begin(), scales.end()));
    CHECK(tensor["amax"] ==
          reference_amax(codes, [&](std::size_t i) { return scales[c.place(i)]; }));
  }
  for (const std::string& name : unknown) {
    const json tensor = entry_of(output, name);
    CHECK(tensor["scale"] == json{{"tensor", name + "_scale"}});
    CHECK(!tensor.contains("amax"));
    CHECK(tensor["share"].contains("zeros"));
  }
}

TEST_CASE("Scales of every dtype, negative ones and NaN") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  struct Case {
    std::string name, dtype;
    std::vector<std::uint8_t> one;  ///< 2^-3, but for the last two
  };
  const std::vector<Case> cases = {{"f32", "F32", raw(std::vector<float>{0.125f})},
                                   {"bf16", "BF16", raw(std::vector<std::uint16_t>{0x3E00})},
                                   {"f16", "F16", raw(std::vector<std::uint16_t>{0x3000})},
                                   {"e8m0", "F8_E8M0", {124}},
                                   {"negative", "F32", raw(std::vector<float>{-0.125f})},
                                   {"nan", "F8_E8M0", {0xFF}}};
  std::vector<Content> list;
  for (const Case& c : cases) {
    list.push_back({c.name, "F8_E4M3", {2}, {0x7E, 0x38}});
    list.push_back({c.name + "_scale_inv", c.dtype, {1}, c.one});
  }
  save(path, list);
  const json output = run_json(folder, path);
  for (const Case& c : cases) {
    INFO(c.name);
    const json tensor = entry_of(output, c.name);
    if (c.name == "nan") {
      CHECK(tensor["amax"].is_null());
      CHECK(tensor["scale"]["max"].is_null());
    } else {
      CHECK(tensor["amax"] == 56.0);
      CHECK(tensor["scale"]["min"] == (c.name == "negative" ? -0.125 : 0.125));
    }
  }
}

TEST_CASE("Factors of a checkpoint's arrays, by its index") {
  const Folder folder;
  const std::string first = folder.file("octet-00000007-1-rank-0.safetensors"),
                    second = folder.file("octet-00000007-1-rank-1.safetensors");
  const auto metadata = [](const char* rank, const char* id = "1") {
    return std::map<std::string, std::string>{
        {"format", "octet checkpoint"}, {"id", id}, {"step", "7"}, {"rank", rank}};
  };
  // [weight, master, m, v] of parameters a and b: scale_inv, scale, amax, padding.
  std::vector<float> scales;
  for (int i = 0; i < 8; ++i) {
    for (float word : {std::ldexp(1.0f, -i), std::ldexp(1.0f, i), 0.0f, 0.0f})
      scales.push_back(word);
  }
  const auto save_scales = [&](const char* id) {
    save(second, {{"scales", "F32", {4, 2, 4}, raw(scales)}}, metadata("1", id));
  };
  save(first,
       {{"b.weight", "F8_E4M3", {2}, {0x7E, 0x38}},
        {"b.master.2", "F16", {1}, raw(std::vector<std::uint16_t>{0x3C00})},
        {"a.m", "F8_E4M3", {1}, {0x38}},
        {"a.v", "BF16", {1}, raw(std::vector<std::uint16_t>{0x3F80})}},
       metadata("0"));
  save_scales("1");
  // "a.m" of another rank's file is another tensor.
  const json content = json::parse(R"({
    "id": "1",
    "scales": {"file": 1, "tensor": "scales"},
    "files": [{"name": "octet-00000007-1-rank-0.safetensors"},
              {"name": "octet-00000007-1-rank-1.safetensors"}],
    "params": [
      {"name": "a", "arrays": [
        {"name": "m", "format": "e4m3", "ranges": [{"file": 0, "tensor": "a.m"}]},
        {"name": "v", "format": "bf16", "ranges": [{"file": 0, "tensor": "a.v"}]}]},
      {"name": "b", "arrays": [
        {"name": "weight", "format": "e4m3", "ranges": [{"file": 1, "tensor": "a.m"},
                                                        {"file": 0, "tensor": "b.weight"}]},
        {"name": "master", "format": "f16", "ranges": [{"file": 0, "tensor": "b.master.2"}]}]}]})");
  std::ofstream(folder.file("octet-00000007.json")) << json{{"content", content}};
  const json output = run_json(folder, first);
  CHECK(entry_of(output, "b.weight")["scale"] == json{{"count", 1}, {"min", 0.5}, {"max", 0.5}});
  CHECK(entry_of(output, "b.weight")["amax"] == 224.0);
  CHECK(entry_of(output, "b.master.2")["amax"] == std::ldexp(1.0, -3));
  CHECK(entry_of(output, "a.m")["amax"] == std::ldexp(1.0, -4));
  CHECK(entry_of(output, "a.v")["amax"] == 1.0);
  CHECK(!entry_of(output, "a.v").contains("scale"));

  // Without what belongs to it the file is listed as it is stored.
  save_scales("2");
  CHECK(entry_of(run_json(folder, first), "b.weight")["amax"] == 448.0);
  save_scales("1");
  CHECK(entry_of(run_json(folder, first), "b.weight")["amax"] == 224.0);
  // A name that leads out of the folder is not followed.
  const std::string below = folder.file("below");
  std::filesystem::create_directory(below);
  std::filesystem::copy_file(first, below + "/first");
  json leading = content;
  leading["files"][1]["name"] = "../octet-00000007-1-rank-1.safetensors";
  std::ofstream(below + "/octet-00000007.json") << json{{"content", leading}};
  CHECK(!entry_of(run_json(folder, below + "/first"), "b.weight").contains("scale"));
  std::ofstream(folder.file("octet-00000007.json")) << "{";
  CHECK(!entry_of(run_json(folder, first), "b.weight").contains("scale"));
}

TEST_CASE("A tensor of several pieces") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  std::vector<std::uint8_t> codes((std::size_t{17} << 20) + 5, 0x38);
  codes[(std::size_t{8} << 20) - 1] = 0;
  codes[std::size_t{8} << 20] = 0x7E;
  codes.back() = 0x01;
  const auto count = static_cast<std::int64_t>(codes.size());
  save(path, {{"w", "F8_E4M3", {count}, codes}});
  const json tensor = entry_of(run_json(folder, path), "w");
  const double one = 1.0 / static_cast<double>(count);
  CHECK(tensor["amax"] == 448.0);
  for (const char* kind : {"zeros", "saturated", "subnormal"}) CHECK(tensor["share"][kind] == one);
}

TEST_CASE("The table has a line of every tensor") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors"), other = folder.file("b.safetensors");
  save(path,
       {{"w", "F8_E4M3", {2, 2}, {0x7E, 0x00, 0x38, 0x01}},
        {"w_scale", "F32", {1}, raw(std::vector<float>{0.25f})},
        {"bad\x1Bname", "I64", {}, std::vector<std::uint8_t>(8)},
        {"b\xC2\x9B\xC2\xA7", "I64", {}, std::vector<std::uint8_t>(8)},
        {"u", "F8_E4M3", {1}, {0x38}},
        {"u_scale", "U8", {1}, {1}}},
       {{"format", "pt"}});
  save(other, {{"v", "F32", {1}, raw(std::vector<float>{-1.5f})}});
  const Outcome outcome = run_program(folder, "'" + path + "' '" + other + "'");
  CHECK(outcome.exit_code == 0);
  CHECK(outcome.out ==
        path +
            ": 6 tensors, 26 bytes\n  format = pt\n"
            "tensor    dtype    shape   scale  amax  zeros  saturated  subnormal  not finite\n"
            "w         F8_E4M3  [2, 2]   0.25   112    25%        25%        25%          0%\n"
            "w_scale   F32      [1]         -  0.25     0%          -         0%          0%\n"
            "bad?name  I64      []          -     -      -          -          -           -\n"
            "b?\xC2\xA7      I64      []          -     -      -          -          -           "
            "-\n"
            "u         F8_E4M3  [1]         ?     -     0%         0%         0%          0%\n"
            "u_scale   U8       [1]         -     -      -          -          -           -\n"
            "\n" +
            other +
            ": 1 tensors, 4 bytes\n"
            "tensor  dtype  shape  scale  amax  zeros  saturated  subnormal  not finite\n"
            "v       F32    [1]        -   1.5     0%          -         0%          0%\n");
}

TEST_CASE("A file that is not sound is named, and the others are still listed") {
  const Folder folder;
  const std::string good = folder.file("good.safetensors"), bad = folder.file("bad.safetensors");
  save(good, {{"v", "U8", {1}, {1}}});
  std::ofstream(bad) << "not a file of tensors";
  const Outcome outcome =
      run_program(folder, "--json '" + bad + "' '" + good + "' '" + folder.file("none") + "'");
  CHECK(outcome.exit_code == 1);
  CHECK(missing(outcome.err, {"octet_inspect: " + bad + ": header length", "none"}) == "");
  const json output = json::parse(outcome.out);
  REQUIRE(output["files"].size() == 1);
  CHECK(output["files"][0]["file"] == good);
  CHECK(run_program(folder, "").exit_code == 1);
  const Outcome help = run_program(folder, "--help");
  CHECK(help.exit_code == 0);
  CHECK(missing(help.out, {"FILE", "--json"}) == "");
}
