// Finds two accesses to the same memory by different threads of a kernel, one of them a write, without a barrier or wait between them:
// whatever order the threads ran in. The compiler's -fsanitize=thread calls the functions at the end for each access; they stand here
// in place of its own library, which knows nothing of these threads. Without that option no access is seen; a build with it defines
// IWSGD_SEES_ACCESSES.
//
// Each thread has a clock that goes on when others are told of what it did, and knows of each other thread up to which clock it was
// told (vector clocks). An access that a thread makes is ordered behind those that it was told of.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <set>
#include <utility>
#include <vector>

// A fault that no thread survives on a GPU either.
[[noreturn]] inline void fault(const char* text) {
  std::cerr << text << std::endl;
  std::abort();
}

// A function whose accesses are not seen; and one that touches none of the kernels' memory, so that calls for them would only take time.
#define IWSGD_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define IWSGD_QUICK __attribute__((no_sanitize("thread")))

class Races {
 public:
  using Clock = std::shared_ptr<std::vector<uint32_t>>;  // of each thread; null: of none

  static Races& all() {
    static Races one;
    return one;
  }
  int found = 0;
  bool tells = true;               // on standard error
  static inline int current = -1;  // the thread that runs, or none

  // ---- memory whose accesses are seen ----

  static constexpr std::size_t kBytes = std::size_t(64) << 20;
  static inline char* begin_ = nullptr;

  char* take(std::size_t bytes) {
    const std::size_t begin = top_;
    top_ += (bytes + 1023) / 1024 * 1024;
    if (top_ > kBytes) fault("too much memory is watched");
    ++live_;
    return begin_ + begin;
  }
  void give_back(const char* memory, std::size_t bytes) {
    if (memory + (bytes + 1023) / 1024 * 1024 == begin_ + top_) top_ = memory - begin_;
    if (--live_ == 0) top_ = 0;
  }

  IWSGD_UNSEEN static void unseen_copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

  // ---- what threads are told ----

  // All that happened before is ordered before what these threads do.
  void begin(int threads) {
    floor_ = ++highest_;
    own_.assign(threads, floor_);
    at_warp_.assign(threads, 0);
    base_.assign(threads, std::make_shared<std::vector<uint32_t>>(threads, 0));
  }
  // n threads from `first` on have met, and know of one another.
  IWSGD_QUICK void meet(int first, int n) {
    Clock base = base_[first];
    bool copied = false;
    const Clock* before = &base_[first];
    const auto merge = [&](const Clock& other) {
      if (!copied) base = std::make_shared<std::vector<uint32_t>>(*base), copied = true;
      raise(*base, *other);
    };
    for (int i = first; i < first + n; ++i)
      if (base_[i] != *before) merge(base_[i]), before = &base_[i];
    if (n == 32) {  // a warp: what they tell one another need not be copied for all
      for (int i = first; i < first + n; ++i) at_warp_[i] = own_[i];
    } else {
      if (!copied) base = std::make_shared<std::vector<uint32_t>>(*base);
      for (int i = first; i < first + n; ++i) (*base)[i] = own_[i];
    }
    for (int i = first; i < first + n; ++i) base_[i] = base, advance(i);
  }
  // What thread i knows, for whoever hears of it.
  Clock tell(int i) {
    auto clock = std::make_shared<std::vector<uint32_t>>(*base_[i]);
    for (int j = i / 32 * 32; j < std::min<int>(i / 32 * 32 + 32, own_.size()); ++j) (*clock)[j] = std::max((*clock)[j], at_warp_[j]);
    (*clock)[i] = own_[i];
    advance(i);
    return clock;
  }
  static void join(Clock& clock, const Clock& other) {
    if (clock == nullptr || other == nullptr) {
      if (other != nullptr) clock = other;
      return;
    }
    clock = std::make_shared<std::vector<uint32_t>>(*clock);
    raise(*clock, *other);
  }
  void hear(int i, const Clock& clock) {
    if (clock == nullptr) return;
    if (base_[i] != heard_from_ || clock != heard_) heard_from_ = base_[i], heard_ = clock, now_known_ = base_[i], join(now_known_, clock);
    base_[i] = now_known_;
  }

  // ---- accesses ----

  // By thread i; or, where there is a clock, by what it has started, which knows no more than that.
  IWSGD_QUICK void access(int i, const void* at, std::size_t bytes, bool writes, const void* code, const Clock& started = nullptr) {
    const std::size_t offset = static_cast<const char*>(at) - begin_;
    const auto where = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(&program()));
    const Access now{started == nullptr ? own_[i] : (*started)[i], where, i};
    const auto ordered = [&](const Access& before) {
      if (before.clock < floor_) return true;
      if (started != nullptr) return before.clock <= (*started)[before.thread];
      if (before.thread == i || before.clock <= (*base_[i])[before.thread]) return true;
      return before.thread / 32 == i / 32 && before.clock <= at_warp_[before.thread];
    };
    for (Cell* cell = cells_ + offset / 2; cell <= cells_ + (offset + bytes - 1) / 2; ++cell) {
      if (!ordered(cell->write)) report(cell->write, "write", now, writes, at);
      if (writes) {
        for (const Access& read : cell->reads)
          if (!ordered(read)) report(read, "read", now, writes, at);
        *cell = {now, {}};
      } else if (ordered(cell->reads[0])) {
        cell->reads[0] = now;
      } else if (ordered(cell->reads[1]) || (turn_++ & 1) != 0) {  // of more than two, some are forgotten
        cell->reads[1] = now;
      }
    }
  }

 private:
  struct Access {
    uint32_t clock, code;
    int thread;
  };
  struct Cell {  // of two bytes
    Access write, reads[2];
  };
  Races() {
    const auto map = [](std::size_t bytes) {
      void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) fault("no memory to watch");
      return static_cast<char*>(memory);
    };
    begin_ = map(kBytes);
    cells_ = reinterpret_cast<Cell*>(map(kBytes / 2 * sizeof(Cell)));
  }
  static const char& program();
  IWSGD_QUICK static void raise(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
    for (std::size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
  }
  void advance(int i) { highest_ = std::max(highest_, ++own_[i]); }
  void report(const Access& before, const char* kind, const Access& now, bool writes, const void* at) {
    ++found;
    if (!tells || !reported_.insert({before.code, now.code}).second || reported_.size() > 10) return;
    std::cerr << std::dec << "a race: thread " << before.thread << "'s " << kind << " and thread " << now.thread << "'s "
              << (writes ? "write" : "read") << " of " << at << " (addr2line -iCfe PROGRAM " << std::hex << before.code << ' ' << now.code
              << ")\n"
              << std::dec;
  }

  Cell* cells_;
  std::size_t top_ = 0, live_ = 0;
  uint32_t floor_ = 1, highest_ = 1;
  unsigned turn_ = 0;
  std::vector<uint32_t> own_, at_warp_;  // clocks: now, and when last told to the own warp
  std::vector<Clock> base_;              // what each was told otherwise
  Clock heard_from_, heard_, now_known_;
  std::set<std::pair<uint32_t, uint32_t>> reported_;
};

template <class X>
struct WatchedAllocator {
  using value_type = X;
  WatchedAllocator() = default;
  template <class Y>
  WatchedAllocator(const WatchedAllocator<Y>&) {}
  X* allocate(std::size_t n) { return reinterpret_cast<X*>(Races::all().take(n * sizeof(X))); }
  void deallocate(X* memory, std::size_t n) { Races::all().give_back(reinterpret_cast<char*>(memory), n * sizeof(X)); }
  template <class Y>
  bool operator==(const WatchedAllocator<Y>&) const {
    return true;
  }
  template <class Y>
  bool operator!=(const WatchedAllocator<Y>&) const {
    return false;
  }
};
template <class X>
using Watched = std::vector<X, WatchedAllocator<X>>;

// ---- what the compiler calls ----

extern "C" {
extern const char __executable_start;  // of the linker
#define IWSGD_CALLED __attribute__((no_sanitize("thread"), used, visibility("default")))
// Most accesses are to other memory; this must be quick for them.
#define IWSGD_ACCESS(at, bytes, writes)                                                                              \
  if (static_cast<std::size_t>(static_cast<const char*>(at) - Races::begin_) < Races::kBytes && Races::current >= 0) \
  Races::all().access(Races::current, at, bytes, writes, __builtin_return_address(0))
#define IWSGD_ACCESSES(bytes)                                                                  \
  IWSGD_CALLED void __tsan_read##bytes(void* at) { IWSGD_ACCESS(at, bytes, false); }           \
  IWSGD_CALLED void __tsan_write##bytes(void* at) { IWSGD_ACCESS(at, bytes, true); }           \
  IWSGD_CALLED void __tsan_unaligned_read##bytes(void* at) { IWSGD_ACCESS(at, bytes, false); } \
  IWSGD_CALLED void __tsan_unaligned_write##bytes(void* at) { IWSGD_ACCESS(at, bytes, true); }
IWSGD_ACCESSES(1)
IWSGD_ACCESSES(2)
IWSGD_ACCESSES(4)
IWSGD_ACCESSES(8)
IWSGD_ACCESSES(16)
IWSGD_CALLED void __tsan_read_range(void* at, std::size_t bytes) { IWSGD_ACCESS(at, bytes, false); }
IWSGD_CALLED void __tsan_write_range(void* at, std::size_t bytes) { IWSGD_ACCESS(at, bytes, true); }
IWSGD_CALLED void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {  // of clang, which calls these for memcpy and memset
  IWSGD_ACCESS(from, bytes, false);
  IWSGD_ACCESS(to, bytes, true);
  return std::memcpy(to, from, bytes);
}
IWSGD_CALLED void* __tsan_memset(void* to, int value, std::size_t bytes) {
  IWSGD_ACCESS(to, bytes, true);
  return std::memset(to, value, bytes);
}
// The standard library's own, of static variables and shared_ptr.
IWSGD_CALLED unsigned char __tsan_atomic8_load(const volatile void* at, int) { return *static_cast<const volatile unsigned char*>(at); }
IWSGD_CALLED unsigned __tsan_atomic32_fetch_add(volatile void* at, unsigned by, int) {
  return __atomic_fetch_add(static_cast<volatile unsigned*>(at), by, __ATOMIC_RELAXED);
}
IWSGD_CALLED void __tsan_vptr_update(void**, void*) {}
IWSGD_CALLED void __tsan_vptr_read(void**) {}
IWSGD_CALLED void __tsan_init() {}
IWSGD_CALLED void __tsan_func_entry(void*) {}
IWSGD_CALLED void __tsan_func_exit() {}
}

inline const char& Races::program() { return __executable_start; }
