// A block of the CUDA kernels on the host: its threads are contexts that change places at barriers and exchanges, so that a thread
// that misses one, or reads shared memory before it is written, is found without a GPU. What it cannot find: races between
// accesses that both orders of the threads happen to do in the right order, and anything about the memory model.
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

// The threads of a block, one running until it waits, then the next.
class Threads {
 public:
  explicit Threads(bool backwards) : backwards_(backwards) {}

  struct Barrier {
    int size = 0, arrived = 0;
    unsigned generation = 0;
  };
  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      progress_ = true;
    } else {
      while (barrier.generation == generation)
        if (_setjmp(places_[current_]) == 0) _longjmp(scheduler_, 1);
    }
  }

  void run(int threads, const std::function<void(int)>& body) {
    body_ = &body;
    contexts_.resize(threads);
    places_.resize(threads);
    started_.assign(threads, false);
    done_.assign(threads, false);
    while (static_cast<int>(stacks_.size()) < threads) stacks_.emplace_back(new char[kStack]);
    block.size = threads;
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
      progress_ = false;
      for (next_ = 0; next_ < threads; ++next_) {
        current_ = backwards_ ? threads - 1 - next_ : next_;
        if (done_[current_]) continue;
        if (_setjmp(scheduler_) == 0) {
          if (started_[current_]) _longjmp(places_[current_], 1);
          started_[current_] = true;
          setcontext(&contexts_[current_]);
        }
        if (done_[current_]) --left_, progress_ = true;
      }
      if (!progress_) {
        std::cerr << "the threads of a block wait at different barriers\n";
        std::abort();
      }
    }
  }

  Barrier block;
  std::vector<Barrier> warps;
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
  bool backwards_, progress_ = false;
  int current_ = 0, next_ = 0, left_ = 0;  // members: setjmp may forget a local variable
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
  int number, count;
  int64_t block, grid;
  char* memory;
  mutable std::vector<std::pair<void*, const void*>> copies;

  int thread() const { return number; }
  int threads() const { return count; }
  int64_t index() const { return block; }
  int64_t blocks() const { return grid; }
  char* shared() const { return memory; }
  void sync() const { all->wait(all->block); }
  template <class A>
  A swap(A x, int bits) const {
    std::memcpy(&all->slots[16 * number], &x, sizeof x);
    all->wait(all->warps[number / 32]);
    std::memcpy(&x, &all->slots[16 * (number ^ bits)], sizeof x);
    all->wait(all->warps[number / 32]);
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
};
