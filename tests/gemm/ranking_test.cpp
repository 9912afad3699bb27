// SPDX-License-Identifier: Apache-2.0
// Backends and ways that differ in nothing but their time, and the file that keeps it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <locale>
#include <sstream>
#include <thread>

#include "octet/gemm/gemm.hpp"
#include "support/catch.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

/// What a test sees of a backend.
struct Log {
  std::string selected;
  int runs = 0;
  std::vector<std::string> refused;  ///< ways that select() does not take
};

/// A backend with ways named by the microseconds that they take; "broken" throws.
class Timed final : public GemmBackend {
 public:
  Timed(std::string name, std::vector<std::string> ways, Log& log, std::string version = "7")
      : name_(name), version_(version), ways_(ways), log_(log) {}
  std::string name() const override { return name_; }
  std::string version() const override { return version_; }
  GemmSupport query(const GemmProblem& p, const GemmDevice&) const override {
    if (p.k != 32) return {GemmVerdict::no, "k is not 32"};
    return {GemmVerdict::native, "timed", 4096, 0};
  }
  std::vector<std::string> candidates(const Context&, const GemmProblem&) override {
    return ways_.size() > 1 ? ways_ : std::vector<std::string>();
  }
  bool select(const Context&, const GemmProblem&, const std::string& way) override {
    for (const std::string& refused : log_.refused) {
      if (way == refused) return false;
    }
    log_.selected = way;
    return true;
  }
  void run(const Context& ctx, const GemmProblem&, const GemmArgs& args) override {
    CHECK(args.a != nullptr);
    CHECK(ctx.workspace_bytes() >= 4096);
    ++log_.runs;
    const std::string& way = ways_.size() > 1 ? log_.selected : ways_.front();
    require(way != "broken", "this way is broken");
    std::this_thread::sleep_for(std::chrono::microseconds(std::stoi(way)));
  }

 private:
  std::string name_, version_;
  std::vector<std::string> ways_;
  Log& log_;
};

const GemmProblem kProblem{.m = 16, .n = 8, .k = 32};

/// A registry on the CPU with the library's reference, which takes no time worth mentioning here,
/// out of the way.
struct Bench {
  GemmRegistry gemms{Context::cpu()};
  Log slow, fast;

  void add(const std::string& slow_ways, const std::string& fast_ways, const char* version = "7") {
    gemms.add(std::make_unique<Timed>("fast", split(fast_ways), fast, version));
    gemms.add(std::make_unique<Timed>("slow", split(slow_ways), slow, version));
  }
  static std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> words;
    std::istringstream in(text);
    for (std::string word; in >> word;) words.push_back(word);
    return words;
  }
};

/// A path that no file has, and none has afterwards.
struct Path {
  std::string name = "ranking_test_file.txt";
  Path() { std::remove(name.c_str()); }
  ~Path() { std::remove(name.c_str()); }
  std::string text() const {
    std::ifstream file(name);
    return {std::istreambuf_iterator<char>(file), {}};
  }
};

}  // namespace

TEST_CASE("ranking: prepare() finds the fastest backend, whoever was added last") {
  Bench bench;
  bench.add("4000", "1000");
  CHECK(bench.gemms.choose(kProblem).backend->name() == "slow");
  CHECK(bench.slow.runs + bench.fast.runs == 0);  // asking runs nothing
  bench.gemms.prepare(kProblem);
  CHECK((bench.slow.runs > 0 && bench.fast.runs > 0));
  const GemmRegistry::Choice choice = bench.gemms.choose(kProblem);
  CHECK(choice.backend->name() == "reference");
  CHECK(missing(choice.report,
                {"slow: native, timed, measured ", "fast: native, timed, measured "}) == "");
  // Without the reference among the natives.
  Bench alone;
  alone.add("4000", "1000");
  alone.gemms.force("slow");
  alone.gemms.prepare(kProblem);
  CHECK(alone.fast.runs == 0);
  CHECK(alone.gemms.choose(kProblem).backend->name() == "slow");
}

TEST_CASE("ranking: of the ways of a backend the fastest stays selected") {
  Bench bench;
  bench.add("4000", "5000 1500 broken 6000");
  bench.gemms.force("fast");
  bench.gemms.prepare(kProblem);
  CHECK(bench.fast.selected == "1500");
  Bench hopeless;
  hopeless.add("4000", "broken broken");
  hopeless.gemms.force("fast");
  CHECK(missing(error_of([&] { hopeless.gemms.prepare(kProblem); }), {"this way is broken"}) == "");
}

TEST_CASE("ranking: the likeliest way gets a second chance, and a long list an end") {
  /// Ways are numbers; way 0 is slow at first.
  struct Many final : GemmBackend {
    explicit Many(int ways) : calls(static_cast<std::size_t>(ways), 0) {}
    std::string name() const override { return "many"; }
    GemmSupport query(const GemmProblem&, const GemmDevice&) const override {
      return {GemmVerdict::native, "many"};
    }
    std::vector<std::string> candidates(const Context&, const GemmProblem&) override {
      std::vector<std::string> list;
      for (std::size_t i = 0; i < calls.size(); ++i) list.push_back(std::to_string(i));
      return list;
    }
    bool select(const Context&, const GemmProblem&, const std::string& way) override {
      selected = static_cast<std::size_t>(std::stoi(way));
      return true;
    }
    void run(const Context&, const GemmProblem&, const GemmArgs&) override {
      const bool is_fast = selected == 0 && calls[0] >= 2;
      std::this_thread::sleep_for(std::chrono::microseconds(is_fast ? 50 : 3000));
      ++calls[selected];
    }
    std::vector<int> calls;
    std::size_t selected = 0;
  };
  for (int ways : {40, 2000}) {
    auto owned = std::make_unique<Many>(ways);
    const Many& many = *owned;
    GemmRegistry gemms(Context::cpu());
    gemms.add(std::move(owned));
    gemms.force("many");
    gemms.prepare(kProblem);
    CHECK(many.selected == 0);
    CHECK(many.calls[1] >= 2);
    if (ways == 40) CHECK(*std::min_element(many.calls.begin(), many.calls.end()) >= 2);
    if (ways == 2000) CHECK(many.calls.back() == 0);
  }
}

TEST_CASE("ranking: a file keeps what was measured for device, backend, version and problem") {
  const Path path;
  {
    Bench bench;
    bench.gemms.keep_ranking(path.name);
    bench.add("4000", "3000 500");
    bench.gemms.prepare(kProblem);
  }
  const std::string first = path.text();
  CHECK(missing(first, {"cpu\tfast\t7\tgemm m=16 n=8 k=32 a=e4m3 b=e4m3 d=f32\t500\t",
                        "cpu\tslow\t7\t"}) == "");
  {
    Bench again;
    again.gemms.keep_ranking(path.name);
    again.add("4000", "3000 500");
    again.gemms.prepare(kProblem);
    CHECK(again.slow.runs + again.fast.runs == 0);
    CHECK(again.fast.selected == "500");
    CHECK(path.text() == first);
    again.gemms.prepare({.m = 17, .n = 8, .k = 32});  // another problem
    CHECK(again.fast.runs > 0);
  }
  CHECK(path.text().size() > first.size());
  {
    Bench newer;
    newer.gemms.keep_ranking(path.name);
    newer.add("4000", "3000 500", "8");
    newer.gemms.prepare(kProblem);
    CHECK((newer.slow.runs > 0 && newer.fast.runs > 0));
  }
  CHECK(missing(path.text(), {"cpu\tfast\t8\t"}) == "");
  {
    Bench changed;  // a way that is no longer taken is no way
    changed.fast.refused = {"500"};
    changed.gemms.keep_ranking(path.name);
    changed.add("4000", "3000 700");
    changed.gemms.prepare(kProblem);
    CHECK(changed.slow.runs == 0);
    CHECK(changed.fast.selected == "700");
  }
}

TEST_CASE("ranking: OCTET_GEMM_RANKING names the file") {
  const Path path;
  REQUIRE(setenv("OCTET_GEMM_RANKING", path.name.c_str(), 1) == 0);
  Bench bench;
  REQUIRE(unsetenv("OCTET_GEMM_RANKING") == 0);
  bench.add("2000", "1000");
  bench.gemms.prepare(kProblem);
  CHECK(missing(path.text(), {"# octet GEMM ranking", "cpu\tslow\t7\t"}) == "");
}

TEST_CASE("ranking: a file that is none is refused by name and line, and changes nothing") {
  const Path path;
  for (const char* line : {"nonsense", "a\tb\tc\td\te", "a\tb\tc\td\te\tfast", "a\tb\tc\td\te\t-1",
                           "a\tb\tc\td\te\t0", "a\tb\tc\td\te\t1.5x", "a\tb\tc\td\te\t1\t2"}) {
    std::ofstream(path.name) << "# a comment\n\n" << line << "\n";
    GemmRegistry gemms(Context::cpu());
    CHECK(missing(error_of([&] { gemms.keep_ranking(path.name); }), {path.name, "line 3", line}) ==
          "");
    CHECK(gemms.choose(kProblem).backend != nullptr);
  }
  Bench bench;
  bench.gemms.keep_ranking("no/such/directory/file");
  bench.add("2000", "1000");
  CHECK(missing(error_of([&] { bench.gemms.prepare(kProblem); }),
                {"no/such/directory/file", "cannot be written"}) == "");
}

TEST_CASE("ranking: what is written can be read, whatever the program's locale and the way") {
  /// Numbers as in "1.234,5".
  struct Continental final : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const Path path;
  {
    const std::locale before =
        std::locale::global(std::locale(std::locale::classic(), new Continental));
    Bench bench;
    bench.gemms.keep_ranking(path.name);
    bench.add("4000", "1500");
    bench.gemms.prepare(kProblem);
    std::locale::global(before);
  }
  Bench again;
  again.gemms.keep_ranking(path.name);
  again.add("4000", "1500");
  again.gemms.prepare(kProblem);
  CHECK(again.slow.runs + again.fast.runs == 0);

  /// Runs everything in ways that no line of a file can hold.
  struct Tabular final : GemmBackend {
    std::string name() const override { return "tabular"; }
    GemmSupport query(const GemmProblem&, const GemmDevice&) const override {
      return {GemmVerdict::native, "tabular"};
    }
    std::vector<std::string> candidates(const Context&, const GemmProblem&) override {
      return {"a\tb", "c\nd"};
    }
    bool select(const Context&, const GemmProblem&, const std::string&) override { return true; }
    void run(const Context&, const GemmProblem&, const GemmArgs&) override {}
  };
  const std::string text = path.text();
  again.gemms.add(std::make_unique<Tabular>());
  CHECK(missing(error_of([&] { again.gemms.prepare(kProblem); }), {"the way", "tab"}) == "");
  CHECK(path.text() == text);
}

TEST_CASE("ranking: prepare() of what nobody runs is an error, of an empty product nothing") {
  GemmRegistry gemms(Context::cpu());
  gemms.force("nobody");
  CHECK(missing(error_of([&] { gemms.prepare(kProblem); }), {"no backend", "nobody"}) == "");
  Bench bench;
  bench.add("2000", "1000");
  bench.gemms.prepare({.m = 0, .n = 8, .k = 32});
  CHECK(bench.slow.runs + bench.fast.runs == 0);
}

TEST_CASE("ranking: what was prepared gives the bits of what was not, on every device") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry prepared(ctx), plain(ctx);
    const GemmProblem p{.m = 48, .n = 64, .k = 128, .d = DType::bf16};
    const std::vector<std::uint8_t> ones(64 * 128, 0x38);  // 1.0 in E4M3
    const Buffer operand = upload(ctx, ones), scale = upload<float>(ctx, {2.0f, 0, 0, 0});
    const Buffer d(ctx, 48 * 64 * 2);
    const GemmArgs args{operand.data(), scale.data(), operand.data(), scale.data(), d.data()};
    prepared.prepare(p);
    prepared.run(p, args);
    const auto first = download<std::uint16_t>(ctx, d.data(), 48 * 64);
    plain.run(p, args);
    CHECK(download<std::uint16_t>(ctx, d.data(), 48 * 64) == first);
    CHECK(first == std::vector<std::uint16_t>(48 * 64, 0x4400));  // 512
  }
}
