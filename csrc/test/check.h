// CHECK(condition, text...): counts a failure and prints where and with what; report() is main's return value.
#pragma once
#include <cstdint>
#include <iostream>

namespace test {

inline int failures = 0;

template <class... Text>
void fail(const char* file, int line, const char* condition, const Text&... text) {
  if (++failures > 20) return;
  std::cerr << file << ":" << line << ": not " << condition << ": ";
  (std::cerr << ... << text) << "\n";
}

inline int report() {
  if (failures > 0) std::cerr << failures << " failures\n";
  return failures > 0 ? 1 : 0;
}

// Addresses for tests that try many: splitmix64, unrelated to the generator under test.
class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint32_t word() { return static_cast<uint32_t>(next() >> 32); }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t(word()) * n) >> 32); }

 private:
  uint64_t state_;
};

}  // namespace test

#define CHECK(condition, ...)                                                  \
  do {                                                                         \
    if (!(condition)) test::fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (false)
