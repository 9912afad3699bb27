// SPDX-License-Identifier: Apache-2.0
// The fuzzer's corpus and changes of it, in every build: no crash, nothing but octet::Error.
#include "fuzz/corpus.hpp"
#include "fuzz/safetensors_input.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

/// A whole file of a few tensors, all of whose bytes but the data and padding mean something.
std::string valid_file() {
  return file_bytes(
      "{\"__metadata__\":{\"step\":\"7\"},"
      "\"wte\":{\"dtype\":\"F8_E4M3\",\"shape\":[2,3],\"data_offsets\":[0,6]},"
      "\"bias\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[6,10]}}",
      10);
}

}  // namespace

TEST_CASE("The corpus is replayed: what is valid passes, nothing else does") {
  const std::set<std::string> valid = {"data_length_and_header",
                                       "empty",
                                       "empty_tensor",
                                       "escapes",
                                       "several",
                                       "spaces",
                                       "sub_byte"};
  check_corpus(CORPUS, valid, check_input);
}

TEST_CASE("A file from disk is refused for what its bytes are refused for") {
  for (const auto& path : corpus_files(CORPUS)) {
    const std::string bytes = read_file(path.string());
    const std::string by_bytes = error_of([&] { parse_file(path.string(), bytes); });
    CHECK(error_of([&] { SafetensorsReader reader(path.string()); }) == by_bytes);
  }
}

TEST_CASE("A valid file that is cut anywhere or has a byte more is refused") {
  const std::string whole = valid_file();
  REQUIRE(error_of([&] { parse_file("f", whole); }) == "no error");
  for (std::size_t length = 0; length < whole.size(); ++length) {
    INFO(length);
    CHECK(error_of([&] { parse_file("f", whole.substr(0, length)); }) != "no error");
  }
  CHECK(error_of([&] { parse_file("f", whole + '\0'); }) != "no error");
}

TEST_CASE("A valid file with any bit flipped is refused, or is another valid file") {
  const std::string whole = valid_file();
  const SafetensorsHeader header = parse_file("f", whole);
  std::size_t refused = 0, other = 0;
  for (std::size_t bit = 0; bit < 8 * (whole.size() - 10); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    check_input(flipped);
    try {
      const SafetensorsHeader changed = parse_file("f", flipped);
      // Only names, texts, and dtypes and shapes of as many bytes can have changed.
      INFO(flipped);
      CHECK((changed.tensors != header.tensors || changed.metadata != header.metadata));
      check_promises(changed, 10);
      ++other;
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(refused > 8 * other);
  CHECK(other > 0);
}

TEST_CASE("Random changes of the corpus make no crash") {
  check_changes(CORPUS, 30'000, check_input);
}
