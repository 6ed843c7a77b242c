// The emulation of a block, host_block.h, does what a GPU may do: exchanges bring what they should; copies and pushes land late or
// early, and no wait returns too soon.
#include "host_block.h"

#include <set>
#include <string>

// Each test's body(block) for `together` blocks of `count` threads, in several orders.
template <class Body>
void in_all_orders(int together, int count, int64_t shared, const Body& body) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Threads threads(seed == 0 ? Order::forwards : seed == 1 ? Order::backwards : Order::random, seed);
    launch_on_host(threads, together, together, count, shared, body, [](int64_t at) { CHECK(false, "written behind, at ", at); });
  }
}

void exchanges() {
  in_all_orders(2, 64, 0, [](const HostBlock& block) {
    const int self = 100 * static_cast<int>(block.index()) + block.thread(), first = self / 4 * 4 - block.thread() % 32 / 4 * 4;
    for (int bits = 0; bits < 32; ++bits) {
      const int got = block.swap(self, bits), want = first + (block.thread() % 32 ^ bits);
      CHECK(got == want, "swap ", self, " by ", bits, ": ", got);
    }
    for (int lane = 0; lane < 32; ++lane) CHECK(block.shuffle(self + 0.5, lane) == first + lane + 0.5, "shuffle ", self, " from ", lane);
    CHECK(block.shuffle(self, (block.thread() + 1) % 32) == first + (block.thread() + 1) % 32, "shuffle ", self);
  });
}

void barriers() {
  in_all_orders(3, 96, 1024, [](const HostBlock& block) {
    int* shared = reinterpret_cast<int*>(block.shared());
    shared[block.thread()] = block.thread();
    block.sync_warp();
    CHECK(shared[block.thread() ^ 31] == (block.thread() ^ 31), "a warp's barrier");
    block.sync();
    CHECK(shared[95 - block.thread()] == 95 - block.thread(), "a block's barrier");
    block.sync();
    shared[block.thread()] = 7;
    block.sync_cluster();
    for (int rank = 0; rank < 3; ++rank) CHECK(block.of_rank(shared, rank)[95 - block.thread()] == 7, "a cluster's barrier");
    block.sync_cluster();
  });
}

// What a thread sees, over all orders, where a GPU may show the one or the other.
using Seen = std::set<std::string>;

void copies() {
  Seen before, source, uncommitted;
  in_all_orders(1, 32, 32 * 64, [&](const HostBlock& block) {
    char* to = block.shared() + 64 * block.thread();
    std::memcpy(to, "oldoldoldoldold", 16);
    std::memcpy(to + 16, "oldoldoldoldold", 16);
    std::memcpy(to + 32, "oldoldoldoldold", 16);
    alignas(16) char first[17] = "first, 16 bytes.", second[9] = "second 8", third[5] = "3, 4";
    block.copy16(to, first);
    block.commit_copies();
    block.copy<8>(to + 16, second);
    block.commit_copies();
    block.copy<4>(to + 32, third);
    const char* now = to;
    before.insert(std::string(now, 5));
    block.wait_copies<1>();
    CHECK(std::memcmp(now, first, 16) == 0, "the first group is there");
    block.wait_copies<0>();
    CHECK(std::memcmp(now + 16, "second 8dold", 12) == 0, "the second group is there, and no byte more");
    uncommitted.insert(std::string(now + 32, 4));
    std::memcpy(third, "late", 4);
    block.finish_copies();
    source.insert(std::string(now + 32, 4));
  });
  CHECK((before == Seen{"first", "oldol", std::string(5, '\xFF')}), "a copy has landed, has not begun, or is under way: ", before.size());
  CHECK((uncommitted == Seen{"3, 4", "oldo", std::string(4, '\xFF')}), "no group's copy may be late: ", uncommitted.size());
  CHECK((source == Seen{"3, 4", "late"}), "a copy's source is read until the wait: ", source.size());
}

IWSGD_UNSEEN double peek(const double* x) { return *x; }

// Each rank pushes to all, two phases, with what they send in the first pushed before or after the receiver expects it.
void pushes() {
  struct Memory {
    uint64_t barrier[2];
    double one[4];
    float four[4][4];
  };
  struct Four {
    float x[4];
  };
  Seen early;
  in_all_orders(4, 32, sizeof(Memory), [&](const HostBlock& block) {
    auto* memory = reinterpret_cast<Memory*>(block.shared());
    const int rank = static_cast<int>(block.index());
    if (block.thread() == 0) block.init_arrivals(memory->barrier, 1), block.init_arrivals(memory->barrier + 1, 2);
    block.sync_cluster();
    block.wait_arrivals(memory->barrier, 1);  // the phase before the first
    for (int phase = 0; phase < 3; ++phase) {
      if (block.thread() == 0 && rank % 2 == 0) block.expect_bytes(memory->barrier, 4 * 24);
      if (block.thread() < 4) {
        block.push(100.0 * phase + rank, memory->one + rank, block.thread(), memory->barrier);
        const auto x = static_cast<float>(phase + rank);
        block.push(Four{{x, x, x, x}}, reinterpret_cast<Four*>(memory->four[rank]), block.thread(), memory->barrier);
      }
      if (phase == 0) early.insert(peek(memory->one + (rank + 1) % 4) >= 0 ? "early" : "late");
      if (block.thread() == 0 && rank % 2 == 1) block.expect_bytes(memory->barrier, 4 * 24);
      block.wait_arrivals(memory->barrier, phase % 2);
      for (int other = 0; other < 4; ++other)
        CHECK(memory->one[other] == 100.0 * phase + other && memory->four[other][3] == phase + other, "pushed by ", other, " in ", phase);
      block.sync_cluster();  // all have read
    }
    // Two arrivals, of no bytes: the phase runs until the second.
    if (block.thread() == 0) block.expect_bytes(memory->barrier + 1, 0);
    block.wait_arrivals(memory->barrier + 1, 1);
    block.sync();  // a thread that waited later would wait for the second phase
    if (block.thread() == 1) block.expect_bytes(memory->barrier + 1, 0);
    block.wait_arrivals(memory->barrier + 1, 0);
  });
  CHECK((early == Seen{"early", "late"}), "pushes land early and late");
}

volatile int result;  // else nobody would have to read what body returns

// Whether body(block), of two blocks of 64 threads, is found to have a race, whatever the order.
template <class Body>
void has_race(bool want, const char* name, const Body& body) {
  Races& races = Races::all();
  for (const Order order : {Order::forwards, Order::backwards, Order::random}) {
    const int before = races.found;
    Threads threads(order);
    launch_on_host(threads, 2, 2, 64, 1024, [&](const HostBlock& block) { result = body(block); }, [](int64_t) {});
    CHECK((races.found > before) == want, name, ": ", races.found - before, " races");
    races.found = before;
  }
}

void races() {
  Races::all().tells = false;
  const auto neighbour = [](const HostBlock& block, const auto& between) {
    int* const shared = reinterpret_cast<int*>(block.shared());
    shared[block.thread()] = 1;
    between();
    return shared[block.thread() ^ 1] + shared[block.thread()];
  };
  const auto far = [](const HostBlock& block, const auto& between) {
    int* const shared = reinterpret_cast<int*>(block.shared());
    shared[block.thread()] = 1;
    between();
    return shared[block.thread() ^ 32];
  };
  has_race(true, "no barrier", [&](const HostBlock& block) { return neighbour(block, [] {}); });
  has_race(true, "a swap is no barrier", [&](const HostBlock& block) { return neighbour(block, [&] { block.swap(1, 1); }); });
  has_race(false, "a warp's barrier", [&](const HostBlock& block) { return neighbour(block, [&] { block.sync_warp(); }); });
  has_race(true, "a warp's barrier for two", [&](const HostBlock& block) { return far(block, [&] { block.sync_warp(); }); });
  has_race(false, "a block's barrier", [&](const HostBlock& block) { return far(block, [&] { block.sync(); }); });
  has_race(true, "written while others read", [&](const HostBlock& block) {
    const int got = far(block, [&] { block.sync(); });
    reinterpret_cast<int*>(block.shared())[block.thread()] = 2;
    return got;
  });
  const auto other_block = [](const HostBlock& block, const auto& between) {
    int* const shared = reinterpret_cast<int*>(block.shared());
    if (block.thread() == 0) *shared = 1;
    between();
    const int got = block.thread() == 5 ? *block.of_rank(shared, 1 - static_cast<int>(block.index())) : 1;
    block.sync_cluster();
    return got;
  };
  has_race(true, "a block's barrier for two", [&](const HostBlock& block) { return other_block(block, [&] { block.sync(); }); });
  has_race(false, "a cluster's barrier", [&](const HostBlock& block) { return other_block(block, [&] { block.sync_cluster(); }); });
  has_race(false, "a grid's barrier",
           [&](const HostBlock& block) { return other_block(block, [&] { block.wait_grid(block.arrive_grid()); }); });
  const auto pushed = [](const HostBlock& block, int who_waits) {
    auto* const barrier = reinterpret_cast<uint64_t*>(block.shared());
    int* const shared = reinterpret_cast<int*>(block.shared()) + 4;
    if (block.thread() == 0) block.init_arrivals(barrier, 1), block.expect_bytes(barrier, 4);
    block.sync_cluster();
    if (block.thread() == 0) block.push(7, shared, 1 - static_cast<int>(block.index()), barrier);
    if (block.thread() >= who_waits) block.wait_arrivals(barrier, 0);
    const int got = *shared;
    block.sync_cluster();
    block.wait_arrivals(barrier, 0);
    return got;
  };
  has_race(false, "a push that all wait for", [&](const HostBlock& block) { return pushed(block, 0); });
  has_race(true, "a push that one does not wait for", [&](const HostBlock& block) { return pushed(block, 1); });
}

int main() {
  exchanges();
  barriers();
  copies();
  pushes();
  CHECK(Races::all().found == 0, Races::all().found, " races");
#if defined(IWSGD_SEES_ACCESSES)
  races();
#endif
  return test::report();
}
