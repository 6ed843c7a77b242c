// Philox4x32-10 against the known answers that its authors publish with Random123.
#include "../philox.h"

#include "check.h"

int main() {
  struct {
    iwsgd::Counter counter;
    uint32_t key[2];
    uint32_t words[4];
  } const known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu}},
      {{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u},
       {0xA4093822u, 0x299F31D0u},
       {0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u}},
  };
  for (const auto& answer : known) {
    const iwsgd::Words words = iwsgd::philox(answer.counter, answer.key[0] | uint64_t(answer.key[1]) << 32);
    for (int i = 0; i < 4; ++i) CHECK(words.w[i] == answer.words[i], "word ", i, " of key ", answer.key[0], ", ", answer.key[1]);
  }
  return test::report();
}
