// Blocks of the CUDA kernels on the host: their threads are contexts that change places at barriers and exchanges, so that a thread
// that misses one, or reads shared memory before it is written, is found without a GPU. Blocks that know of one another (of a
// cluster, or of a grid that is launched together) run side by side. What it cannot find: races between accesses that both orders
// of the threads happen to do in the right order, and anything about the memory model.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

// The threads of one or several blocks, one running until it waits, then the next; a block goes as far as it can without the others,
// so that one which does not wait for them where it should is far ahead.
class Threads {
 public:
  explicit Threads(bool backwards) : backwards_(backwards) {}

  struct Barrier {
    int size = 0, arrived = 0;
    unsigned generation = 0;
  };
  // The generation to wait for.
  unsigned arrive(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      progress_ = true;
    }
    return generation;
  }
  void wait_for(Barrier& barrier, unsigned generation) {
    while (barrier.generation == generation)
      if (_setjmp(places_[current_]) == 0) _longjmp(scheduler_, 1);
    progress_ = true;
  }
  void wait(Barrier& barrier) { wait_for(barrier, arrive(barrier)); }

  // body(number), of count threads in each of several blocks, one block after the other in number.
  void run(int several, int count, const std::function<void(int)>& body) {
    const int threads = several * count;
    body_ = &body;
    contexts_.resize(threads);
    places_.resize(threads);
    started_.assign(threads, false);
    done_.assign(threads, false);
    while (static_cast<int>(stacks_.size()) < threads) stacks_.emplace_back(new char[kStack]);
    blocks.assign(several, Barrier{count});
    grid = Barrier{several};
    cluster = Barrier{threads};
    warps.assign(threads / 32, Barrier{32});
    slots.assign(threads * 16, 0);
    for (int i = 0; i < threads; ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = nullptr;
      const auto self = reinterpret_cast<uintptr_t>(this);
      const auto enter_there = reinterpret_cast<void (*)()>(&Threads::enter);
      makecontext(&contexts_[i], enter_there, 2, static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    }
    for (left_ = threads; left_ > 0;) {
      moved_ = false;
      for (block_ = 0; block_ < several; ++block_)
        do {
          progress_ = false;
          for (next_ = 0; next_ < count; ++next_) {
            current_ = block_ * count + next_;
            if (backwards_) current_ = threads - 1 - current_;
            if (done_[current_]) continue;
            if (_setjmp(scheduler_) == 0) {
              if (started_[current_]) _longjmp(places_[current_], 1);
              started_[current_] = true;
              setcontext(&contexts_[current_]);
            }
            if (done_[current_]) --left_, progress_ = true;
          }
          moved_ = moved_ || progress_;
        } while (progress_);
      if (!moved_) {
        std::cerr << "the threads of a block wait at different barriers\n";
        std::abort();
      }
    }
  }

  std::vector<Barrier> blocks, warps;
  Barrier grid, cluster;
  std::vector<char> slots;

 private:
  static constexpr std::size_t kStack = 64 * 1024;
  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Threads*>(static_cast<uintptr_t>(high) << 32 | low);
    const int i = self->current_;
    (*self->body_)(i);
    self->done_[i] = true;
    _longjmp(self->scheduler_, 1);
  }
  bool backwards_, progress_ = false, moved_ = false;
  int current_ = 0, next_ = 0, block_ = 0, left_ = 0;  // members: setjmp may forget a local variable
  const std::function<void(int)>* body_ = nullptr;
  // A context is entered once; from then on setjmp changes places, without the system calls of swapcontext.
  struct Place {
    jmp_buf at;
    operator jmp_buf&() { return at; }
  };
  jmp_buf scheduler_;
  std::vector<ucontext_t> contexts_;
  std::vector<Place> places_;
  std::vector<bool> started_, done_;
  std::vector<std::unique_ptr<char[]>> stacks_;
};

struct HostBlock {
  Threads* all;
  int number, count;  // the thread, among the count of its block
  int64_t block, grid;
  int at;                          // the block among those that run side by side
  const std::vector<char*>* each;  // their shared memories
  mutable std::vector<std::pair<void*, const void*>> copies;

  int thread() const { return number; }
  int threads() const { return count; }
  int64_t index() const { return block; }
  int64_t blocks() const { return grid; }
  char* shared() const { return (*each)[at]; }
  void sync() const { all->wait(all->blocks[at]); }
  void sync_warp() const { all->wait(all->warps[(at * count + number) / 32]); }
  template <class A>
  A swap(A x, int bits) const {
    const int self = at * count + number;
    std::memcpy(&all->slots[16 * self], &x, sizeof x);
    all->wait(all->warps[self / 32]);
    std::memcpy(&x, &all->slots[16 * (self ^ bits)], sizeof x);
    all->wait(all->warps[self / 32]);
    return x;
  }
  void copy16(void* to, const void* from) const {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) std::abort();
    copies.emplace_back(to, from);
  }
  void finish_copies() const {
    for (const auto& [to, from] : copies) std::memcpy(to, from, 16);
    copies.clear();
  }

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
    if (number == 0) *flag = (*finished)++ == grid - 1;
    sync();
    return *flag != 0;
  }

  void sync_cluster() const { all->wait(all->cluster); }
  template <class X>
  const X* of_rank(const X* x, int rank) const {
    return reinterpret_cast<const X*>(reinterpret_cast<const char*>(x) - (*each)[at] + (*each)[rank]);
  }
};

// A kernel: body(block) for each thread. `together` of its blocks, a divisor of their number, run side by side. Calls spilled(bytes)
// for a write behind a block's shared memory, which is full of NaN when the block begins.
template <class Body, class Spilled>
void launch_on_host(Threads& threads, int64_t blocks, int together, int count, int64_t shared, const Body& body, const Spilled& spilled) {
  constexpr int64_t kGuard = 256;
  std::vector<std::vector<std::pair<double, double>>> memory(together);  // 16 bytes each
  std::vector<char*> each;
  for (auto& of_block : memory) {
    of_block.resize((shared + kGuard) / 16 + 1);
    each.push_back(reinterpret_cast<char*>(of_block.data()));
  }
  for (int64_t first = 0; first < blocks; first += together) {
    for (char* bytes : each) std::memset(bytes, 0xFF, memory[0].size() * 16);
    threads.run(together, count, [&](int i) { body(HostBlock{&threads, i % count, count, first + i / count, blocks, i / count, &each, {}}); });
    for (const char* bytes : each)
      for (int64_t i = shared; i < shared + kGuard; ++i)
        if (static_cast<unsigned char>(bytes[i]) != 0xFF) spilled(i - shared);
  }
}
