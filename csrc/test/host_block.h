// Blocks of the CUDA kernels on the host: their threads are contexts that change places at barriers and exchanges, so that a thread
// that misses one, or reads shared memory before it is written, is found without a GPU. Blocks that know of one another (of a
// cluster, or of a grid that is launched together) run side by side. What takes its time on a GPU (a copy, a push) takes it here:
// mostly it lands as late as its waits allow. host_races.h sees what is left to chance by that. What they cannot find: anything about
// the memory model.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "host_races.h"

// What an mbarrier holds in its 8 bytes. A phase ends when neither arrivals nor bytes are awaited; bytes may land before they are
// expected, and are negative then. 0xFF in all bytes is none.
struct Arrivals {
  int32_t bytes;
  uint16_t expected;                  // arrivals of each phase
  uint16_t pending : 15, parity : 1;  // of the phase that runs

  IWSGD_UNSEEN static Arrivals of(const uint64_t* barrier) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fault("an mbarrier lies to 8 bytes");
    Arrivals a;
    std::memcpy(&a, barrier, sizeof a);
    if (a.expected == 0 || a.expected > 0x3FFF || a.pending > a.expected) fault("an mbarrier is used before init_arrivals");
    return a;
  }
  // Whether the phase ends with this.
  IWSGD_UNSEEN bool put(uint64_t* barrier) {
    if (bytes <= -(1 << 20) || bytes >= 1 << 20) fault("an mbarrier counts less than 2^20 bytes");
    const bool ends = pending == 0 && bytes == 0;
    if (ends) pending = expected, parity ^= 1;
    std::memcpy(barrier, this, sizeof *this);
    return ends;
  }
};
static_assert(sizeof(Arrivals) == 8, "");

// Which thread runs next, of those that can: the first or the last one, or a random one.
enum class Order { forwards, backwards, random };

// The threads of one or several blocks, one running until it waits, then the next; a block mostly goes as far as it can without the
// others, so that one which does not wait for them where it should is far ahead.
class Threads {
 public:
  explicit Threads(Order order, uint64_t seed = 1) : order(order), random(seed) {}

  const Order order;
  test::Random random;
  IWSGD_QUICK bool seldom(uint32_t n) { return order == Order::random && random.below(n) == 0; }

  struct Barrier {
    int size = 0, arrived = 0;
    int first = 0;  // the threads from there on take part; -1: of each block the first
    unsigned generation = 0;
    bool orders = true;  // accesses before and behind it
    Races::Clock told, heard;
    std::vector<int> waiting;
  };
  // The generation to wait for.
  IWSGD_QUICK unsigned arrive(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (barrier.first < 0) Races::join(barrier.told, races.tell(current_));
    if (++barrier.arrived == barrier.size) {
      if (barrier.first < 0) barrier.heard = std::move(barrier.told), barrier.told = nullptr;
      else if (barrier.orders) races.meet(barrier.first, barrier.size);
      barrier.arrived = 0;
      ++barrier.generation;
      wake(barrier.waiting);
    }
    return generation;
  }
  IWSGD_QUICK void wait_for(Barrier& barrier, unsigned generation) {
    if (barrier.generation != generation && order == Order::random) give_way();  // who comes last is not first to go on
    while (barrier.generation == generation) sleep(barrier.waiting);
    if (barrier.first < 0) races.hear(current_, barrier.heard);
  }
  IWSGD_QUICK void wait(Barrier& barrier) { wait_for(barrier, arrive(barrier)); }

  // ---- pushes and the mbarriers that count them ----

  struct Push {
    char value[16];
    int bytes, block;  // where to
    char* to;
    uint64_t* barrier;
    int thread = 0;  // from where, and what it knew
    Races::Clock clock = nullptr;
  };
  void push(Push push) {
    push.thread = current_;
    push.clock = races.tell(current_);
    pushes_.push_back(push);
    if (seldom(8)) land(pushes_.size() - 1);
  }
  void init(uint64_t* barrier, int arrivals) {
    races.access(current_, barrier, 8, true, __builtin_return_address(0));
    if (arrivals < 1 || arrivals > 0x3FFF) fault("an mbarrier counts 1 to 16383 arrivals here");
    Arrivals a{0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
    a.put(barrier);
    told_[barrier] = {};
  }
  void expect(uint64_t* barrier, int bytes) {
    races.access(current_, barrier, 8, false, __builtin_return_address(0));
    Arrivals a = Arrivals::of(barrier);
    if (a.pending == 0) fault("more arrive at an mbarrier than it expects");
    a.bytes += bytes, --a.pending;
    update(a, barrier, races.tell(current_));
  }
  void wait_phase(uint64_t* barrier, int parity) {
    races.access(current_, barrier, 8, false, __builtin_return_address(0));
    while (Arrivals::of(barrier).parity == parity) sleep(arrivals_waiting_);
    races.hear(current_, told_[barrier].second);
  }

  // One more has been here, with all before it. Whether it was the last of `size`.
  bool count_up(unsigned* finished, unsigned size) {
    races.access(current_, finished, sizeof *finished, false, __builtin_return_address(0));
    Races::join(finished_, races.tell(current_));
    races.hear(current_, finished_);
    return add_one(finished) == size;
  }

  // body(number), of count threads in each of several blocks, one block after the other in number.
  IWSGD_QUICK void run(int several, int count, const std::function<void(int)>& body) {
    const int threads = several * count;
    body_ = &body;
    count_ = count;
    contexts_.resize(threads);
    places_.resize(threads);
    started_.assign(threads, false);
    while (static_cast<int>(stacks_.size()) < threads) stacks_.emplace_back(new char[kStack]);
    const auto barrier = [](int size, int first) {
      Barrier one;
      one.size = size, one.first = first;
      return one;
    };
    blocks.clear(), warps.clear(), exchanges.clear();
    for (int i = 0; i < threads; i += count) blocks.push_back(barrier(count, i));
    for (int i = 0; i < threads; i += 32) {
      warps.push_back(barrier(32, i));
      exchanges.push_back(barrier(32, i));
      exchanges.back().orders = false;  // __shfl_sync orders no access to memory
    }
    grid = barrier(several, -1);
    cluster = barrier(threads, 0);
    finished_ = nullptr;
    told_.clear();
    races.begin(threads);
    slots.assign(threads * 32, 0);
    ready_.assign(several, {});
    left_.assign(several, count);
    block_ = order == Order::backwards ? several - 1 : 0;
    std::vector<int> all(threads);
    for (int i = 0; i < threads; ++i) {
      prepare(i);
      all[i] = order == Order::backwards ? threads - 1 - i : i;
    }
    wake(all);
    while (next()) {
      races.current = current_;
      resume();
      races.current = -1;
    }
    for (const int left : left_)
      if (left > 0) fault("the threads of a block wait at different barriers");
  }

  std::vector<Barrier> blocks, warps, exchanges;  // exchanges: of swap and shuffle
  Barrier grid, cluster;
  std::vector<char> slots;  // two of 16 bytes for each thread
  Races& races = Races::all();

 private:
  static constexpr std::size_t kStack = 64 * 1024;
  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Threads*>(static_cast<uintptr_t>(high) << 32 | low);
    const int i = self->current_;
    (*self->body_)(i);
    --self->left_[i / self->count_];
    _longjmp(self->scheduler_, 1);
  }

  // Functions of their own: what else is in them, setjmp and getcontext may forget.
  IWSGD_UNSEEN void prepare(int i) {
    ucontext_t& context = contexts_[i];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[i].get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    const auto enter_there = reinterpret_cast<void (*)()>(&Threads::enter);
    makecontext(&context, enter_there, 2, static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }
  IWSGD_UNSEEN void resume() {
    if (_setjmp(scheduler_) == 0) {
      if (started_[current_]) _longjmp(places_[current_], 1);
      started_[current_] = true;
      setcontext(&contexts_[current_]);
    }
  }
  IWSGD_UNSEEN void leave() {
    if (_setjmp(places_[current_]) == 0) _longjmp(scheduler_, 1);
  }
  IWSGD_QUICK void sleep(std::vector<int>& waiting) {
    waiting.push_back(current_);
    leave();
  }
  IWSGD_QUICK void give_way() {
    ready_[block_].push_back(current_);
    leave();
  }
  IWSGD_QUICK void wake(std::vector<int>& waiting) {
    for (const int i : waiting) ready_[i / count_].push_back(i);
    waiting.clear();
  }

  // Makes the next thread current_, if there is one.
  IWSGD_QUICK bool next() {
    if (!pushes_.empty() && seldom(16)) land(random.below(static_cast<uint32_t>(pushes_.size())));
    const int several = static_cast<int>(ready_.size());
    for (;;) {
      if (seldom(256)) block_ = static_cast<int>(random.below(several));
      for (int i = 0; i < several && ready_[block_].empty(); ++i)
        block_ = (block_ + (order == Order::backwards ? several - 1 : 1)) % several;
      if (!ready_[block_].empty()) break;
      if (pushes_.empty()) return false;
      land(order == Order::forwards    ? pushes_.size() - 1
           : order == Order::backwards ? 0
                                       : random.below(static_cast<uint32_t>(pushes_.size())));
    }
    current_ = ready_[block_].take(order == Order::random ? random.below(ready_[block_].left()) : 0);
    return true;
  }

  void land(std::size_t which) {
    const Push push = pushes_[which];
    pushes_.erase(pushes_.begin() + which);
    if (left_[push.block] == 0) fault("a push lands in a block that has ended");
    const void* const code = __builtin_return_address(0);
    races.access(push.thread, push.barrier, 8, false, code, push.clock);
    races.access(push.thread, push.to, push.bytes, true, code, push.clock);
    races.unseen_copy(push.to, push.value, push.bytes);
    Arrivals a = Arrivals::of(push.barrier);
    a.bytes -= push.bytes;
    update(a, push.barrier, push.clock);
  }
  // Who waits for the end of the phase knows what they know who have ended it.
  void update(Arrivals a, uint64_t* barrier, const Races::Clock& clock) {
    auto& [running, ended] = told_[barrier];
    Races::join(running, clock);
    if (!a.put(barrier)) return;
    ended = std::move(running), running = nullptr;
    wake(arrivals_waiting_);
  }
  IWSGD_UNSEEN static unsigned add_one(unsigned* finished) { return ++*finished; }

  struct Queue {
    std::vector<int> items;
    std::size_t taken = 0;
    IWSGD_QUICK bool empty() const { return taken == items.size(); }
    IWSGD_QUICK uint32_t left() const { return static_cast<uint32_t>(items.size() - taken); }
    IWSGD_QUICK void push_back(int i) { items.push_back(i); }
    IWSGD_QUICK int take(uint32_t which) {
      int* const first = items.data() + taken;
      const int i = first[which];
      first[which] = *first;
      if (++taken == items.size()) items.clear(), taken = 0;
      return i;
    }
  };

  int count_ = 0, current_ = 0, block_ = 0;
  const std::function<void(int)>* body_ = nullptr;
  // A context is entered once; from then on setjmp changes places, without the system calls of swapcontext.
  struct Place {
    jmp_buf at;
    operator jmp_buf&() { return at; }
  };
  jmp_buf scheduler_;
  std::vector<ucontext_t> contexts_;
  std::vector<Place> places_;
  std::vector<char> started_;
  std::vector<int> left_;     // threads of each block that have not ended
  std::vector<Queue> ready_;  // of each block
  std::vector<int> arrivals_waiting_;
  std::vector<Push> pushes_;
  std::map<const uint64_t*, std::pair<Races::Clock, Races::Clock>> told_;  // in the phase that runs, and before it
  Races::Clock finished_;
  std::vector<std::unique_ptr<char[]>> stacks_;
};

struct HostBlock {
  Threads* all;
  int number, count;  // the thread, among the count of its block
  int64_t block, grid;
  int at;                          // the block among those that run side by side
  const std::vector<char*>* each;  // their shared memories

  int thread() const { return number; }
  int threads() const { return count; }
  int64_t index() const { return block; }
  int64_t blocks() const { return grid; }
  char* shared() const { return (*each)[at]; }
  IWSGD_QUICK void sync() const {
    drift();
    all->wait(all->blocks[at]);
  }
  IWSGD_QUICK void sync_warp() const {
    drift();
    all->wait(all->warps[of_all() / 32]);
  }

  template <class A>
  IWSGD_QUICK A swap(A x, int bits) const {
    if (bits < 0 || bits > 31) fault("a swap leaves the warp");
    return exchange(x, of_all() ^ bits);
  }
  template <class A>
  IWSGD_QUICK A shuffle(A x, int lane) const {
    if (lane < 0 || lane > 31) fault("a shuffle leaves the warp");
    return exchange(x, of_all() / 32 * 32 + lane);
  }

  // ---- copies ----

  // What is copied is read, and written, at some time between here and the wait. Until then the place may hold anything.
  template <int N>
  void copy(void* to, const void* from) const {
    static_assert(N == 4 || N == 8 || N == 16, "");
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % N != 0) fault("a copy lies to its own size");
    drift();
    if (all->order == Order::backwards || all->seldom(2)) std::memset(to, 0xFF, N);
    copies.push_back({to, from, N, N, committed});
    if (all->seldom(8)) land(copies.size() - 1);
  }
  // 16 bytes: the first ones, and zeros behind them.
  void copy16(void* to, const void* from, int bytes = 16) const {
    copy<16>(to, from);
    if (!copies.empty() && copies.back().to == to) copies.back().read = bytes;
    else std::memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);  // has landed
  }
  void commit_copies() const { ++committed; }
  template <int N>
  void wait_copies() const {
    drift();
    for (std::size_t i = copies.size(); i-- > 0;)
      if (copies[i].group < committed - N) land(i);
  }
  void finish_copies() const {
    while (!copies.empty()) land(copies.size() - 1);
  }

  // ---- between the blocks of a grid that was launched together ----

  double fresh(const double* x) const { return *x; }
  unsigned arrive_grid() const {
    sync();
    return number == 0 ? all->arrive(all->grid) : 0;
  }
  void wait_grid(unsigned arrival) const {
    if (number == 0) all->wait_for(all->grid, arrival);
    sync();
  }
  bool last(unsigned* finished, int* flag) const {
    if (number == 0) *flag = all->count_up(finished, static_cast<unsigned>(grid));
    sync();
    return *flag != 0;
  }

  // ---- between the blocks of a cluster ----

  void sync_cluster() const {
    drift();
    all->wait(all->cluster);
  }
  template <class X>
  X* of_rank(X* x, int rank) const {
    if (rank < 0 || rank >= static_cast<int>(each->size())) fault("a cluster has no such rank");
    return reinterpret_cast<X*>(reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>((*each)[at]) +
                                reinterpret_cast<uintptr_t>((*each)[rank]));
  }

  void init_arrivals(uint64_t* barrier, int arrivals) const { all->init(barrier, arrivals); }
  void expect_bytes(uint64_t* barrier, int bytes) const { all->expect(barrier, bytes); }
  // Lands at some time, in any order, in the place of `to` in the block of that rank; counts there, where `barrier` is here.
  template <class X>
  void push(const X& value, X* to, int rank, uint64_t* barrier) const {
    static_assert(sizeof(X) == 4 || sizeof(X) == 8 || sizeof(X) == 16, "");
    if (reinterpret_cast<uintptr_t>(to) % sizeof(X) != 0) fault("a push lies to its own size");
    Threads::Push push{{}, sizeof(X), rank, reinterpret_cast<char*>(of_rank(to, rank)), of_rank(barrier, rank), 0, nullptr};
    std::memcpy(push.value, &value, sizeof(X));
    all->push(push);
  }
  // Until the phase of this parity has ended; the one before the first has parity 1.
  void wait_arrivals(uint64_t* barrier, int parity) const {
    drift();
    all->wait_phase(barrier, parity);
  }

 private:
  int of_all() const { return at * count + number; }

  // Two slots for each thread: who writes the next one may be ahead of who still reads this one, but not of the next barrier.
  template <class A>
  IWSGD_QUICK A exchange(A x, int from) const {
    static_assert(sizeof(A) <= 16 && std::is_trivially_copyable_v<A>, "");
    drift();
    const int which = exchanged++ % 2;
    std::memcpy(&all->slots[32 * of_all() + 16 * which], &x, sizeof x);
    all->wait(all->exchanges[of_all() / 32]);
    std::memcpy(&x, &all->slots[32 * from + 16 * which], sizeof x);
    return x;
  }

  struct Copy {
    void* to;
    const void* from;
    int bytes, read, group;
  };
  void land(std::size_t which) const {
    const Copy& copy = copies[which];
    std::memcpy(copy.to, copy.from, copy.read);
    std::memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
    copies.erase(copies.begin() + which);
  }
  // Some copies land before anybody waits for them.
  IWSGD_QUICK void drift() const {
    if (copies.empty()) return;
    for (std::size_t i = copies.size(); i-- > 0;)
      if (all->seldom(16)) land(i);
  }

 public:
  HostBlock(Threads* all, int number, int count, int64_t block, int64_t grid, int at, const std::vector<char*>* each)
      : all(all), number(number), count(count), block(block), grid(grid), at(at), each(each) {}

 private:
  mutable int exchanged = 0, committed = 0;
  mutable std::vector<Copy> copies;
};

// A kernel: body(block) for each thread. `together` of its blocks, a divisor of their number, run side by side. Calls spilled(bytes)
// for a write behind a block's shared memory, which is full of NaN when the block begins.
template <class Body, class Spilled>
void launch_on_host(Threads& threads, int64_t blocks, int together, int count, int64_t shared, const Body& body, const Spilled& spilled) {
  constexpr int64_t kGuard = 256;
  const int64_t pitch = (shared + kGuard) / 128 * 128 + 128;
  Watched<char> memory(pitch * together);
  std::vector<char*> each;
  for (int i = 0; i < together; ++i) each.push_back(memory.data() + i * pitch);
  for (int64_t i = 0; i < blocks; i += together) {
    const int64_t first = threads.order == Order::backwards ? blocks - together - i : i;
    std::memset(memory.data(), 0xFF, memory.size());
    threads.run(together, count, [&](int i) { body(HostBlock(&threads, i % count, count, first + i / count, blocks, i / count, &each)); });
    for (const char* bytes : each)
      for (int64_t i = shared; i < shared + kGuard; ++i)
        if (static_cast<unsigned char>(bytes[i]) != 0xFF) spilled(i - shared);
  }
}
