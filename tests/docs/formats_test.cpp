// SPDX-License-Identifier: Apache-2.0
// The table of formats in docs/numerics.md is what the lists say.
#include <fstream>
#include <sstream>
#include <string>

#include "octet/ops/state_format.hpp"
#include "support/catch.hpp"

namespace octet::test {
namespace {

template <class Format, std::size_t Count>
std::string row(const std::string& field, const Format (&formats)[Count]) {
  std::string text = "| " + field + " | ";
  for (std::size_t i = 0; i < Count; ++i) {
    text += (i == 0 ? "" : ", ") + std::string(name_of(formats[i]));
  }
  return text + " |\n";
}

}  // namespace

TEST_CASE("the documented formats are those of the lists") {
  const std::string table = "| field | formats |\n|---|---|\n" + row("gradient", kGradientFormats) +
                            row("weight", kWeightFormats) + row("master", kMasterFormats) +
                            row("m", kMFormats) + row("v", kVFormats);
  std::ifstream file(OCTET_DOCS "/numerics.md");
  std::ostringstream text;
  text << file.rdbuf();
  INFO("docs/numerics.md must contain\n" << table);
  CHECK(text.str().find("\n" + table + "\n") != std::string::npos);
}

}  // namespace octet::test
