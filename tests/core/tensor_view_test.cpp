// SPDX-License-Identifier: Apache-2.0
#include "octet/core/tensor_view.hpp"

#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {

TEST_CASE("shapes count their elements") {
  CHECK(Shape{}.numel() == 1);
  CHECK(Shape{}.rank() == 0);
  CHECK(Shape{7}.numel() == 7);
  CHECK(Shape{7}.row_numel() == 1);
  CHECK(Shape{3, 5}.numel() == 15);
  CHECK(Shape{3, 5}.row_numel() == 5);
  CHECK(Shape{2, 3, 5, 7}.numel() == 210);
  CHECK(Shape{2, 3, 5, 7}.row_numel() == 105);
  CHECK(Shape{0, 5}.numel() == 0);
  CHECK(Shape{std::int64_t{1} << 20, std::int64_t{1} << 20}.numel() == std::int64_t{1} << 40);
  CHECK(Shape{2, 3} == Shape{2, 3});
  CHECK_FALSE(Shape{2, 3} == Shape{3, 2});
  CHECK_FALSE(Shape{2} == Shape{2, 1});
}

TEST_CASE("impossible shapes are refused by name") {
  CHECK(missing(error_of([] { Shape{3, -1}; }), {"-1", "negative"}) == "");
  CHECK(missing(error_of([] { Shape{1, 2, 3, 4, 5}; }), {"5", "4"}) == "");
}

TEST_CASE("shapes and devices as text") {
  CHECK(to_string(Shape{768, 3072}) == "[768, 3072]");
  CHECK(to_string(Shape{5}) == "[5]");
  CHECK(to_string(Shape{}) == "[]");
  CHECK(to_string(Device{}) == "cpu");
  CHECK(to_string(Device{DeviceType::cuda, 3}) == "cuda:3");
}

TEST_CASE("views know their bytes") {
  const TensorView view{nullptr, DType::f16, {3, 5}, {}};
  CHECK(view.numel() == 15);
  CHECK(view.bytes() == 30);
  CHECK(view.empty());
  CHECK(TensorView{nullptr, DType::e4m3, {3, 5}, {}}.bytes() == 15);
}

TEST_CASE("errors join their parts") {
  CHECK(error_of([] { fail("width is ", 7, "; it must be a multiple of ", 2); }) ==
        "width is 7; it must be a multiple of 2");
  CHECK(error_of([] { require(true, "never"); }) == "no error");
  CHECK(error_of([] { require(false, "always"); }) == "always");
}

}  // namespace octet::test
