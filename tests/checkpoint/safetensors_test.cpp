// SPDX-License-Identifier: Apache-2.0
#include "octet/checkpoint/safetensors.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"
#include "support/safetensors_bytes.hpp"

using namespace octet;
using namespace octet::test;
using Names = std::initializer_list<std::string>;

namespace {

std::string entry(const std::string& name, const std::string& shape, int begin, int end,
                  const std::string& dtype = "U8") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

std::string refusal(const std::string& header, std::uint64_t data_bytes = 4) {
  return error_of([&] { parse_safetensors_header("f.st", header, data_bytes); });
}

std::vector<unsigned char> pattern(std::uint64_t bytes) {
  std::vector<unsigned char> data(bytes);
  for (std::size_t i = 0; i < data.size(); ++i)
    data[i] = static_cast<unsigned char>(i * 7 + i / 251);
  return data;
}

}  // namespace

TEST_CASE("A file has the layout of the format, byte for byte") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  SafetensorsWriter writer(path, {{"b", "U8", {3}, 99, 3}, {"a", "F32", {}, 99, 4}},
                           {{"k", "v\n"}});
  CHECK(writer.tensors()[1].begin == 3);
  writer.write("abc", 3);
  writer.write("defg", 4);
  writer.finish();
  std::string header =
      "{\"__metadata__\":{\"k\":\"v\\n\"},"
      "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
      "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[3,7]}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  CHECK(read_file(path) == header_length(header.size()) + header + "abcdefg");
  CHECK(writer.file_bytes() == 8 + header.size() + 7);
  CHECK(!std::filesystem::exists(writer.temporary_path()));
}

TEST_CASE("What is written in any pieces is read in any pieces") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  const std::vector<FileTensor> list = {{"w.0", "F8_E4M3", {7, 11}, 0, 77},
                                        {"empty", "F32", {0, 5}, 0, 0},
                                        {"ünï \"q\"\\ \t", "I64", {2, 1, 1, 1, 3}, 0, 48},
                                        {"scalar", "F32", {}, 0, 4},
                                        {"last empty", "BF16", {0}, 0, 0}};
  const auto data = pattern(77 + 48 + 4);
  const auto piece = GENERATE(std::size_t{1}, std::size_t{13}, std::size_t{1000});
  SafetensorsWriter writer(path, list, {{"format", "pt"}, {"", "\x01 €"}});
  for (std::size_t at = 0; at < data.size(); at += piece) {
    writer.write(data.data() + at, std::min(piece, data.size() - at));
  }
  writer.finish();

  const SafetensorsReader reader(path);
  CHECK(reader.path() == path);
  CHECK(reader.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"", "\x01 €"}});
  REQUIRE(reader.tensors().size() == list.size());
  for (const FileTensor& wanted : list) {
    const FileTensor& tensor = reader.at(wanted.name);
    CHECK((tensor.dtype == wanted.dtype && tensor.shape == wanted.shape));
    REQUIRE(tensor.bytes == wanted.bytes);
    std::vector<unsigned char> got(tensor.bytes);
    for (std::size_t at = 0; at < got.size(); at += piece) {
      reader.read(tensor, at, std::min(piece, got.size() - at), got.data() + at);
    }
    CHECK(std::equal(got.begin(), got.end(), data.data() + tensor.begin));
  }
  CHECK(reader.find("w") == nullptr);
  CHECK(missing(error_of([&] { reader.at("w"); }), {path, "\"w\""}) == "");
  char byte;
  CHECK(missing(error_of([&] { reader.read(reader.at("w.0"), 77, 1, &byte); }),
                {path, "\"w.0\"", "77"}) == "");
  CHECK(missing(error_of([&] { reader.read(reader.at("w.0"), ~0ull, 2, &byte); }), {"\"w.0\""}) ==
        "");
}

TEST_CASE("Headers that other writers make are read") {
  CHECK(parse_safetensors_header("f", "{}", 0).tensors.empty());
  CHECK(parse_safetensors_header("f", "{ }  \n\t ", 0).tensors.empty());
  CHECK(parse_safetensors_header("f", "{\"__metadata__\":{}}", 0).metadata.empty());
  // Fields in any order, tensors in another order than their data, metadata at the end, empty
  // tensors in between, escapes in names.
  const SafetensorsHeader header = parse_safetensors_header(
      "f",
      "{\"b\": {\"data_offsets\": [4, 8], \"shape\": [2], \"dtype\": \"F16\"}, " +
          entry("z", "[0]", 4, 4) + "," + entry("a\\u0041", "[1,4]", 0, 4) +
          ",\"__metadata__\":{\"x\":\"y\"}}",
      8);
  REQUIRE(header.tensors.size() == 3);
  CHECK(header.tensors[0] == FileTensor{"aA", "U8", {1, 4}, 0, 4});
  CHECK(header.tensors[1] == FileTensor{"z", "U8", {0}, 4, 0});
  CHECK(header.tensors[2] == FileTensor{"b", "F16", {2}, 4, 4});
  CHECK(header.metadata.at("x") == "y");
  CHECK(parse_safetensors_header("f", "{" + entry("a", "[2,4]", 0, 4, "F4") + "}", 4)
            .tensors[0]
            .bytes == 4);
}

TEST_CASE("Every rule of the header has an error that names file and field") {
  struct Case {
    std::string header;
    Names words;
  };
  const auto field = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const std::string d = "\"dtype\":\"U8\"", s = "\"shape\":[4]", o = "\"data_offsets\":[0,4]";
  const Case cases[] = {
      {"", {"start with {"}},
      {" {}", {"start with {"}},
      {"[]", {"start with {"}},
      {"\xEF\xBB\xBF{}", {"start with {"}},
      {"{", {"not valid JSON", "byte"}},
      {"{} x", {"not valid JSON"}},
      {"{}{}", {"not valid JSON"}},
      {std::string("{}\0junk", 7), {"zero byte"}},
      {"{\"w\xFF\":{}}", {"not valid JSON", "UTF-8"}},
      {"{\"w\":1}", {"\"w\"", "a number", "must be an object"}},
      {"{\"w\":null}", {"\"w\"", "null"}},
      {"{\"w\":\"x\"}", {"\"w\"", "a string"}},
      {"{\"w\":[]}", {"\"w\"", "a list"}},
      {"{\"w\":[[[[[[]]]]]]}", {"\"w\"", "a list"}},
      {"{" + entry("w", "[4]", 0, 4) + "," + entry("w", "[4]", 0, 4) + "}", {"\"w\"", "twice"}},
      {"{" + entry("w", "[4]", 0, 4) + ",\"\\u0077\":{}}", {"\"w\"", "twice"}},
      {"{\"__metadata__\":{},\"__metadata__\":{}}", {"__metadata__", "twice"}},
      {"{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", {"__metadata__", "\"k\"", "twice"}},
      {"{\"__metadata__\":{\"k\":1}}", {"__metadata__", "\"k\"", "must be a string"}},
      {"{\"__metadata__\":{\"k\":{}}}", {"__metadata__", "\"k\"", "must be a string"}},
      {"{\"__metadata__\":[]}", {"__metadata__", "must be an object"}},
      {"{\"__metadata__\":\"x\"}", {"__metadata__", "must be an object"}},
      {field(s + "," + o), {"\"w\"", "dtype is missing"}},
      {field(d + "," + o), {"\"w\"", "shape is missing"}},
      {field(d + "," + s), {"\"w\"", "data_offsets is missing"}},
      {field(d + "," + d), {"\"w\"", "dtype", "twice"}},
      {field(s + "," + s), {"\"w\"", "shape", "twice"}},
      {field(d + ",\"extra\":1"), {"\"w\"", "\"extra\""}},
      {field("\"dtype\":\"F7\""), {"\"w\"", "dtype", "\"F7\""}},
      {field("\"dtype\":\"\""), {"\"w\"", "dtype"}},
      {field("\"dtype\":8"), {"\"w\"", "dtype", "a number"}},
      {field("\"shape\":4"), {"\"w\"", "shape", "a number"}},
      {field("\"shape\":[\"4\"]"), {"\"w\"", "shape", "a string"}},
      {field("\"shape\":[[4]]"), {"\"w\"", "shape", "a list"}},
      {field("\"shape\":[-4]"), {"\"w\"", "shape", "-4"}},
      {field("\"shape\":[4.0]"), {"\"w\"", "shape", "4.0"}},
      {field("\"shape\":[true]"), {"\"w\"", "shape", "true"}},
      {field("\"shape\":[18446744073709551616]"), {"\"w\"", "shape", "18446744073709551616"}},
      {field("\"shape\":[9223372036854775808]"), {"\"w\"", "shape", "9223372036854775808"}},
      {field("\"shape\":[1e999]"), {"not valid JSON"}},
      {"{" + entry("w", "[4294967296,4294967296,4294967296]", 0, 4) + "}", {"\"w\"", "shape"}},
      {"{" + entry("w", "[4611686018427387904]", 0, 0, "F32") + "}", {"\"w\"", "shape"}},
      {"{" + entry("w", "[3]", 0, 1, "F4") + "}", {"\"w\"", "shape", "F4"}},
      {field("\"data_offsets\":4"), {"\"w\"", "data_offsets", "a number"}},
      {field("\"data_offsets\":[0]"), {"\"w\"", "data_offsets", "1 numbers"}},
      {field("\"data_offsets\":[0,4,8]"), {"\"w\"", "data_offsets", "more than 2"}},
      {field("\"data_offsets\":[0,-4]"), {"\"w\"", "data_offsets", "-4"}},
      {field("\"data_offsets\":[0,4.5]"), {"\"w\"", "data_offsets", "4.5"}},
      {field("\"data_offsets\":[0,null]"), {"\"w\"", "data_offsets", "null"}},
      {"{" + entry("w", "[4]", 4, 0) + "}", {"\"w\"", "data_offsets", "[4, 0]"}},
      {"{" + entry("w", "[8]", 0, 8) + "}", {"\"w\"", "data_offsets", "beyond"}},
      {"{" + entry("w", "[3]", 0, 4) + "}", {"\"w\"", "data_offsets", "4", "3"}},
      {"{" + entry("w", "[4]", 0, 4, "F32") + "}", {"\"w\"", "F32", "4", "16"}},
      {"{" + entry("v", "[3]", 0, 3) + "," + entry("w", "[2]", 2, 4) + "}",
       {"\"w\"", "overlap", "\"v\""}},
      {"{" + entry("v", "[4]", 0, 4) + "," + entry("w", "[4]", 0, 4) + "}", {"overlap"}},
      {"{" + entry("v", "[1]", 0, 1) + "," + entry("w", "[2]", 2, 4) + "}", {"\"w\"", "no tensor"}},
      {"{" + entry("w", "[3]", 1, 4) + "}", {"\"w\"", "no tensor"}},
      {"{" + entry("w", "[3]", 0, 3) + "}", {"data have 4 bytes", "3"}},
      {"{}", {"data have 4 bytes"}},
      {field("\"data_offsets\":[0,18446744073709551615],\"shape\":[18446744073709551615]"),
       {"shape"}},
  };
  for (const Case& c : cases) {
    const std::string message = refusal(c.header);
    INFO(c.header);
    CHECK(missing(message, {"f.st"}) == "");
    CHECK(missing(message, c.words) == "");
  }
}

TEST_CASE("A header as deep or as wide as one likes is refused without recursion") {
  for (const std::string open : {"[", "{\"a\":"}) {
    std::string deep = "{\"w\":";
    for (int i = 0; i < 1'000'000; ++i) deep += open;
    CHECK(missing(refusal(deep), {"\"w\""}) == "");
  }
  const std::string message = refusal("{\"" + std::string(1'000'000, 'x') + "\":1}");
  CHECK(message.size() < 1000);
  CHECK(refusal("{\"w\x1B[2J\":1}").find('\x1B') == std::string::npos);
}

TEST_CASE("Files that are cut, too long or no files are refused by name") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  const auto open = [&] { SafetensorsReader reader(path); };
  CHECK(missing(error_of(open), {path, "No such file"}) == "");
  const std::string good = file_bytes("{" + entry("w", "[4]", 0, 4) + "}", 4);
  for (std::size_t length = 0; length < good.size(); ++length) {
    write_bytes(path, good.substr(0, length));
    INFO(length);
    CHECK(missing(error_of(open), {path}) == "");
  }
  write_bytes(path, good + "x");
  CHECK(missing(error_of(open), {path, "data have 5 bytes"}) == "");
  write_bytes(path, header_length(100'000'001) + std::string(64, ' '));
  CHECK(missing(error_of(open), {path, "header length is 100000001", "100000000"}) == "");
  write_bytes(path, header_length(~0ull) + std::string(64, ' '));
  CHECK(missing(error_of(open), {path, "header length is 18446744073709551615"}) == "");
  write_bytes(path, good);
  CHECK(error_of(open) == "no error");
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  CHECK(missing(error_of(open), {path, "regular file"}) == "");
  std::filesystem::remove(path);
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);  // must not wait for a writer
  CHECK(missing(error_of(open), {path, "regular file"}) == "");
}

TEST_CASE("A file that becomes shorter while it is open makes read() throw") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  write_bytes(path, file_bytes("{" + entry("w", "[4]", 0, 4) + "}", 4));
  SafetensorsReader opened(path);
  const SafetensorsReader reader = std::move(opened);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  char data[4];
  CHECK(missing(error_of([&] { reader.read(reader.at("w"), 0, 4, data); }), {path, "shorter"}) ==
        "");
}

TEST_CASE("What stands under the final name is the old file until finish()") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  write_bytes(path, "old");
  std::string temporary;
  {
    SafetensorsWriter writer(path, {{"w", "U8", {4}, 0, 4}, {"v", "U8", {4}, 0, 4}});
    temporary = writer.temporary_path();
    writer.write("abcde", 5);
    CHECK(missing(error_of([&] { writer.finish(); }), {path, "5 of 8", "\"v\""}) == "");
    CHECK(missing(error_of([&] { writer.write("abcde", 5); }), {path, "5 bytes", "8"}) == "");
    CHECK(read_file(path) == "old");
    CHECK(std::filesystem::exists(temporary));
  }
  CHECK(!std::filesystem::exists(temporary));
  CHECK(read_file(path) == "old");
  {
    SafetensorsWriter writer(path, {{"w", "U8", {4}, 0, 4}});
    writer.write("abcd", 4);
    writer.put_aside();
    CHECK(missing(error_of([&] { writer.write("", 0); }), {path, "put_aside"}) == "");
  }
  CHECK(read_file(path) == "old");
  CHECK(SafetensorsReader(temporary).at("w").bytes == 4);
  rename_durably(temporary, path);
  CHECK(SafetensorsReader(path).at("w").bytes == 4);
  {
    SafetensorsWriter writer(path, {});
    writer.put_aside();
    writer.finish();
    CHECK(missing(error_of([&] { writer.finish(); }), {path, "already"}) == "");
  }
  CHECK(SafetensorsReader(path).tensors().empty());
  CHECK(!std::filesystem::exists(temporary));
}

TEST_CASE("Two writers of one path at a time do not mix") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  const std::vector<FileTensor> list = {{"w", "U8", {4}, 0, 4}};
  SafetensorsWriter first(path, list);
  first.write("ab", 2);
  const auto second = [&] { SafetensorsWriter writer(path, list); };
  CHECK(missing(error_of(second), {path, "another writer"}) == "");
  first.write("cd", 2);
  first.put_aside();
  CHECK(missing(error_of(second), {path, "another writer"}) == "");
  first.finish();
  CHECK(error_of(second) == "no error");
  // What a writer that died has left is taken over.
  write_bytes(path + ".tmp", std::string(1000, 'x'));
  SafetensorsWriter third(path, list);
  third.write("efgh", 4);
  third.finish();
  char data[4];
  const SafetensorsReader reader(path);
  reader.read(reader.at("w"), 0, 4, data);
  CHECK(std::string(data, 4) == "efgh");
}

TEST_CASE("A file that cannot be renamed is not left behind") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  std::filesystem::create_directories(path + "/full");
  {
    SafetensorsWriter writer(path, {});
    CHECK(missing(error_of([&] { writer.finish(); }), {path, "renamed"}) == "");
  }
  CHECK(!std::filesystem::exists(path + ".tmp"));
}

TEST_CASE("A list that a reader would refuse is refused before a file is made") {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  const auto write = [&](const std::vector<FileTensor>& list, const std::string& value = "v") {
    const std::string message = error_of([&] {
      SafetensorsWriter writer(path, list, {{"k", value}});
    });
    CHECK(!std::filesystem::exists(path + ".tmp"));
    CHECK(missing(message, {path}) == "");
    return message;
  };
  CHECK(missing(write({{"w", "U8", {4}, 0, 4}, {"w", "U8", {4}, 0, 4}}), {"\"w\"", "twice"}) == "");
  CHECK(missing(write({{"w", "U9", {4}, 0, 4}}), {"\"w\"", "U9"}) == "");
  CHECK(missing(write({{"w", "U8", {4}, 0, 5}}), {"\"w\"", "5", "4"}) == "");
  CHECK(missing(write({{"w", "U8", {-4}, 0, 4}}), {"\"w\"", "-4"}) == "");
  CHECK(missing(write({{"w\xFF", "U8", {4}, 0, 4}}), {"UTF-8"}) == "");
  CHECK(missing(write({}, "\xFF"), {"UTF-8"}) == "");
  CHECK(missing(write({{"__metadata__", "U8", {4}, 0, 4}}), {"__metadata__"}) == "");
  CHECK(missing(error_of([&] { SafetensorsWriter writer(folder.file("no/a"), {}); }),
                {"no/a", "created", "No such file"}) == "");
}

TEST_CASE("A full disk makes write() throw, and leaves nothing behind") {
  struct stat status = {};
  if (stat("/dev/full", &status) != 0) return;
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  std::filesystem::create_symlink("/dev/full", path + ".tmp");
  CHECK(missing(error_of([&] { SafetensorsWriter writer(path, {}); }), {path, "No space left"}) ==
        "");
  CHECK(!std::filesystem::is_symlink(path + ".tmp"));
}

TEST_CASE("Names of dtypes") {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
    CHECK(dtype_of_file(file_dtype(dtype)) == dtype);
    CHECK(file_dtype_bits(file_dtype(dtype)) == static_cast<int>(8 * size_of(dtype)));
  }
  CHECK(file_dtype(DType::e4m3) == "F8_E4M3");
  CHECK(file_dtype(DType::bf16) == "BF16");
  CHECK(!dtype_of_file("I64"));
  CHECK(file_dtype_bits("I64") == 64);
  CHECK(file_dtype_bits("f32") == 0);
  CHECK(numel_of({"a", "F32", {3, 5}, 0, 60}) == 15);
  CHECK(numel_of({"a", "F32", {}, 0, 4}) == 1);
}
