// SPDX-License-Identifier: Apache-2.0
// The corpus of the indexes' fuzzer and changes of it, in every build: no crash, nothing but
// octet::Error.
#include "fuzz/corpus.hpp"
#include "fuzz/index_input.hpp"

using namespace octet;
using namespace octet::test;

TEST_CASE("The corpus of indexes is replayed: what is valid passes, nothing else does") {
  check_corpus(CORPUS, {"content", "weight_map"}, check_index);
}

TEST_CASE("An index that is nested as deep as one likes is refused without recursion") {
  for (const std::size_t depth : {std::size_t{17}, std::size_t{100'000}, std::size_t{2'000'000}}) {
    const std::string nest = std::string(depth, '[') + std::string(depth, ']');
    for (const std::string& text :
         {nest, R"({"content":)" + nest + "}", R"({"content":{"a":)" + nest + "}}"}) {
      CHECK(!check_index(text));
    }
  }
}

TEST_CASE("Random changes of the corpus of indexes make no crash") {
  check_changes(CORPUS, 10'000, check_index);
}
