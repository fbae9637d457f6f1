// A thread block of a Hopper GPU in software: what hopper_in_software.h makes its instructions of.
//
// Threads are fibres, which change over only where one waits. What is asynchronous takes effect as late as it may: tiles come
// when every thread waits, in any order; a product is made when its group is waited for, from what then lies in shared memory
// and in registers. Until then NaN stand where results will: so a wait that is missing, a stage that is given back too early
// or filled while it is still read gives wrong numbers instead of right ones by luck.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#include "../cuda/core/hopper_tile.h"

namespace mmk::hopper {

struct TensorMap {
  HeadsBox heads;
};

// --- numbers ------------------------------------------------------------------------------------------------------------
inline float widen(std::uint16_t bits, bool bfloat16) {
  std::uint32_t wide;
  if (bfloat16) {
    wide = static_cast<std::uint32_t>(bits) << 16;
  } else {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    if (exponent == 0) return (sign != 0 ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    wide = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// To the nearest, of two equally near the even one.
inline std::uint16_t narrow(float value, bool bfloat16) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  if (std::isnan(value)) return 0x7fff;
  if (bfloat16) return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (size < 0x1p-14f) return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(size * 0x1p24f)));
  bits &= 0x7fffffff;
  return static_cast<std::uint16_t>(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}

// --- the thread block ---------------------------------------------------------------------------------------------------
class Block {
 public:
  // Runs `body` in `threads` threads; `seed` decides who goes first wherever that is open. Throws what a thread throws, where
  // all wait for ever, and where something is left undone.
  Block(int threads, std::uint32_t shared_begin, std::uint32_t shared_bytes, std::uint64_t seed)
      : shared_(shared_bytes, 0xff), shared_begin_(shared_begin), random_(seed * 2 + 1), threads_(threads) {
    stacks_ = std::make_unique_for_overwrite<char[]>(static_cast<std::size_t>(threads) * kStackBytes);
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    running_block() = this;
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      ucontext_t& context = threads_[i].context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_.get() + i * kStackBytes;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = &scheduler_;
      makecontext(&context, &Block::enter, 0);
    }
    while (finished_ < threads_.size())
      if (!run_those_ready()) land_a_tile();
    check_nothing_left();
  }

  static Block& current() { return *running_block(); }
  int thread_index() const { return static_cast<int>(running_); }

  // Of `threads` neighbouring threads: waits until all have come; the last to come calls `then`.
  template <class Then>
  void meet(int threads, const char* what, const Then& then) {
    Meeting& meeting = meeting_of(threads);
    const int met = meeting.met;
    if (++meeting.here == threads) {
      then();
      meeting.here = 0;
      ++meeting.met;
    }
    wait([&meeting, met] { return meeting.met != met; }, {what, -1});
  }

  void sync_all() {
    meet(static_cast<int>(threads_.size()), "the other threads of the block", [] {});
  }

  template <class T>
  T shuffled(T value, int from) {
    static_assert(sizeof(T) == 4);
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    // Two rows, by turns: whoever is last to read one does so before anybody writes it again.
    auto& row = lanes_[warp][meeting_of(32).met % 2];
    std::memcpy(&row[lane], &value, 4);
    meet(32, "the other lanes of a shuffle", [] {});
    std::memcpy(&value, &row[from], 4);
    return value;
  }

  void take_registers(int count) {
    require(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    threads_[running_].registers = count;
  }

  // --- barriers ---------------------------------------------------------------------------------------------------------
  void named_barrier(int number, int threads, bool waits) {
    require(number > 0 && number < 16 && threads % 32 == 0, "a named barrier has a number from 1 to 15 and whole warps");
    Named& barrier = named_[number];
    require(barrier.arrived == 0 || barrier.threads == threads, "a named barrier's threads are counted differently");
    barrier.threads = threads;
    const int passed = barrier.passed;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.passed;
    }
    if (waits) wait([&barrier, passed] { return barrier.passed != passed; }, {"named barrier ", number});
  }

  void init_barrier(std::uint32_t address, int count) {
    require(address % 8 == 0 && barriers_.count(address) == 0, "a barrier is initialised once, at a multiple of 8 bytes");
    at(address, 8);
    barriers_[address] = {0, count, count, 0};
  }

  void arrive(std::uint32_t address, int expected_bytes) {
    Barrier& barrier = barrier_at(address);
    barrier.bytes += expected_bytes;
    require(--barrier.missing >= 0, "more arrivals than a barrier counts");
    end_phase(barrier);
  }

  void wait_barrier(std::uint32_t address, std::uint32_t parity) {
    const Barrier& barrier = barrier_at(address);
    wait([&barrier, parity] { return barrier.phase != parity; },
         {parity == 0 ? "even phases of the barrier at " : "odd phases of the barrier at ",
          static_cast<std::int64_t>(address - shared_begin_)});
  }

  // --- tiles ------------------------------------------------------------------------------------------------------------
  void load(std::uint32_t to, const TensorMap& map, std::uint32_t barrier, const std::int64_t (&from)[4]) {
    const HeadsBox& heads = map.heads;
    require(reinterpret_cast<std::uintptr_t>(heads.data) % 16 == 0, "a tensor map's data begins at a multiple of 16 bytes");
    for (const std::uint64_t stride : heads.byte_strides)
      require(stride % 16 == 0 && stride < 1ull << 40, "a tensor map's strides are multiples of 16 bytes below 2^40");
    for (int i = 0; i < 4; ++i)
      require(heads.box[i] >= 1 && heads.box[i] <= 256 && heads.sizes[i] >= 1, "a tensor map's box has 1 to 256 elements");
    require(heads.box[0] * 2 == kTileRowBytes && heads.box[2] == 1 && heads.box[3] == 1, "only boxes of whole rows here");
    require(to % 128 == 0, "a tile begins at a multiple of 128 bytes");
    barrier_at(barrier);
    std::memset(at(to, kTileRowBytes * heads.box[1]), 0xff, kTileRowBytes * heads.box[1]);
    flying_.push_back({to, &map, barrier, {from[0], from[1], from[2], from[3]}});
  }

  // --- products ---------------------------------------------------------------------------------------------------------
  // One thread's share of one: its accumulators, and a either in shared memory or in its registers.
  struct Product {
    float* d;
    int columns;
    bool bfloat16, accumulates;
    const std::uint32_t* a_registers;
    std::uint64_t a, b;
    bool transposes_b;
  };

  void fence() { threads_[running_].fenced = true; }

  void issue(const Product& product) {
    Thread& thread = threads_[running_];
    require(thread.fenced, "products need a fence after registers were written");
    std::vector<float>& values = thread.flying[product.d];
    if (values.empty()) values.assign(product.d, product.d + product.columns / 2);
    std::fill_n(product.d, product.columns / 2, NAN);
    thread.open.push_back(product);
  }

  void commit() {
    Thread& thread = threads_[running_];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
  }

  void wait_products(std::size_t groups) {
    threads_[running_].fenced = false;
    const int first = thread_index() / 128 * 128;
    meet(128, "the other threads of a warp group at the wait for products", [this, first, groups] {
      Thread* const threads = &threads_[first];
      while (threads->groups.size() > groups) {
        for (std::size_t i = 0; i < threads->groups.front().size(); ++i) multiply(threads, i);
        for (int t = 0; t < 128; ++t) threads[t].groups.pop_front();
      }
      for (int t = 0; t < 128; ++t) land_products(threads[t]);
    });
  }

  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error("software Hopper: " + what); }
  static void require(bool holds, const char* what) {
    if (!holds) fail(what);
  }

 private:
  static constexpr std::size_t kStackBytes = 1 << 16;

  struct Reason {
    const char* what;
    std::int64_t number;  // none below 0
  };
  struct Meeting {
    int here = 0, met = 0;
  };
  struct Named {
    int arrived = 0, threads = 0, passed = 0;
  };
  struct Barrier {
    std::uint32_t phase;  // the parity of the phase that has not ended
    int count, missing, bytes;
  };
  struct Tile {
    std::uint32_t to;
    const TensorMap* map;
    std::uint32_t barrier;
    std::int64_t from[4];
  };
  struct Matrices {
    float a[64][16], b[16][256], d[64][256];
  };
  struct Thread {
    ucontext_t context;
    bool finished = false, fenced = false;
    int registers = 0;
    std::function<bool()> ready;
    Reason waits_for;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::map<float*, std::vector<float>> flying;  // what accumulators will be
  };

  Meeting& meeting_of(int threads) { return meetings_[{threads, thread_index() / threads}]; }

  static Block*& running_block() {
    static Block* block = nullptr;
    return block;
  }

  // --- fibres -----------------------------------------------------------------------------------------------------------
  static void enter() {
    Block& block = current();
    try {
      (*block.body_)();
    } catch (const std::exception& error) {
      if (block.error_.empty()) block.error_ = error.what();
    }
    block.threads_[block.running_].finished = true;
    ++block.finished_;
  }

  template <class Ready>
  void wait(const Ready& ready, const Reason& what) {
    if (ready()) return;
    Thread& thread = threads_[running_];
    thread.ready = ready;
    thread.waits_for = what;
    swapcontext(&thread.context, &scheduler_);
  }

  // Once round all threads, from somewhere on; whether any went on.
  bool run_those_ready() {
    bool any = false;
    const std::size_t count = threads_.size(), first = random(count);
    const bool backwards = random(2) == 1;
    for (std::size_t i = 0; i < count; ++i) {
      running_ = (first + (backwards ? count - i : i)) % count;
      Thread& thread = threads_[running_];
      if (thread.finished || (thread.ready && !thread.ready())) continue;
      thread.ready = nullptr;
      any = true;
      swapcontext(&scheduler_, &thread.context);
      if (!error_.empty()) throw std::runtime_error(error_ + ", in thread " + std::to_string(running_));
    }
    return any;
  }

  std::size_t random(std::size_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % below;
  }

  void land_a_tile() {
    if (flying_.empty()) {
      std::map<std::string, int> waiting;
      for (const Thread& thread : threads_)
        if (const auto& [what, number] = thread.waits_for; !thread.finished)
          ++waiting[what + (number < 0 ? std::string() : std::to_string(number))];
      std::string all;
      for (const auto& [what, count] : waiting) all += "; " + std::to_string(count) + " threads for " + what;
      fail("deadlock" + all);
    }
    const std::size_t which = random(flying_.size());
    const Tile tile = flying_[which];
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(which));
    const HeadsBox& heads = tile.map->heads;
    const int rows = static_cast<int>(heads.box[1]);
    for (int row = 0; row < rows; ++row)
      for (int channel = 0; channel < kTileChannels; ++channel) {
        const std::int64_t index[4] = {tile.from[0] + channel, tile.from[1] + row, tile.from[2], tile.from[3]};
        bool inside = true;
        std::int64_t offset = 2 * index[0];
        for (int i = 0; i < 4; ++i) inside &= index[i] >= 0 && index[i] < static_cast<std::int64_t>(heads.sizes[i]);
        for (int i = 1; i < 4; ++i) offset += index[i] * static_cast<std::int64_t>(heads.byte_strides[i - 1]);
        std::uint16_t value = 0;
        if (inside) std::memcpy(&value, static_cast<const char*>(heads.data) + offset, 2);
        std::memcpy(at(swizzled(tile.to + static_cast<std::uint32_t>(row * kTileRowBytes + channel * 2), 3), 2), &value, 2);
      }
    Barrier& barrier = barrier_at(tile.barrier);
    barrier.bytes -= rows * kTileRowBytes;
    end_phase(barrier);
  }

  void check_nothing_left() {
    require(flying_.empty(), "a tile is still on its way");
    for (const auto& [number, barrier] : named_) require(barrier.arrived == 0, "a named barrier is left half full");
    int registers = 0;
    for (const Thread& thread : threads_) {
      require(thread.groups.empty() && thread.open.empty(), "a product was never waited for");
      registers += thread.registers;
    }
    require(registers <= 65536, "the threads have more registers than there are");
  }

  // --- shared memory ----------------------------------------------------------------------------------------------------
  char* at(std::uint32_t address, std::uint32_t bytes) {
    if (address < shared_begin_ || address + bytes > shared_begin_ + shared_.size()) fail("beyond shared memory");
    return reinterpret_cast<char*>(shared_.data()) + (address - shared_begin_);
  }

  // The bits of an address that say which 128 bytes change those that say which 16 of them.
  static std::uint32_t swizzled(std::uint32_t address, int bits) {
    return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
  }

  Barrier& barrier_at(std::uint32_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("no barrier at " + std::to_string(address));
    return found->second;
  }

  static void end_phase(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.count;
    barrier.phase ^= 1;
  }

  // --- tensor cores -----------------------------------------------------------------------------------------------------
  // Element (row, k) of the matrix that a descriptor names, row of the 64 or N, k of the 16: PTX ISA, "Strides" and "Matrix
  // Descriptor Format". `along_rows`: the matrix lies with its rows, not k, along memory. All four swizzles, of 1, 8, 4 and 2 units
  // of 16 bytes.
  float element(std::uint64_t descriptor, int row, int k, bool along_rows, bool bfloat16) {
    const auto field = [descriptor](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const std::uint32_t start = field(0), leading = field(16), stride = field(32);
    constexpr int units_of[4] = {1, 8, 4, 2}, bits_of[4] = {0, 3, 2, 1};
    const int mode = static_cast<int>(descriptor >> 62), units = units_of[mode];
    // The descriptor would have to say so in three more bits, which stay 0.
    require((descriptor >> 49 & 7) == 0 && swizzled(start, bits_of[mode]) == start, "a matrix begins within the swizzle's period");
    const auto u = [](int value) { return static_cast<std::uint32_t>(value); };
    std::uint32_t offset;
    if (along_rows) {
      const int unit = row / 8;
      offset = units == 1 ? u(unit) * stride + u(k % 8) * 16 + u(k / 8) * leading
                          : u(unit % units) * 16 + u(unit / units) * leading + u(k % 8 * units) * 16 + u(k / 8) * stride;
      offset += u(row % 8) * 2;
    } else {
      offset = u(row % 8 * units) * 16 + u(row / 8) * stride + u(k / 8) * (units == 1 ? leading : 16u) + u(k % 8) * 2;
    }
    std::uint16_t value;
    std::memcpy(&value, at(swizzled(start + offset, bits_of[mode]), 2), 2);
    return widen(value, bfloat16);
  }

  // Product `i` of the oldest group of 128 threads.
  void multiply(Thread* threads, std::size_t i) {
    const Product first = threads->groups.front()[i];
    auto& [a, b, d] = *matrices_;
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < first.columns; ++column)
        b[k][column] = element(first.b, column, k, first.transposes_b, first.bfloat16);
    if (first.a_registers == nullptr)
      for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k) a[row][k] = element(first.a, row, k, false, first.bfloat16);
    for (int t = 0; t < 128; ++t) {
      const Product& product = threads[t].groups.front().at(i);
      require(product.a == first.a && product.b == first.b && product.accumulates == first.accumulates,
              "the threads of a warp group issue different products");
      const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
      if (product.a_registers != nullptr)
        for (int r = 0; r < 4; ++r)
          for (int half = 0; half < 2; ++half)
            a[row + r % 2 * 8][column + r / 2 * 8 + half] =
                widen(static_cast<std::uint16_t>(product.a_registers[r] >> 16 * half), first.bfloat16);
      const std::vector<float>& values = threads[t].flying[product.d];
      for (int n = 0; n < first.columns / 2; ++n)
        d[row + n / 2 % 2 * 8][n / 4 * 8 + column + n % 2] = first.accumulates ? values[static_cast<std::size_t>(n)] : 0.0f;
    }
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < first.columns; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int t = 0; t < 128; ++t) {
      const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
      std::vector<float>& values = threads[t].flying[threads[t].groups.front()[i].d];
      for (int n = 0; n < first.columns / 2; ++n)
        values[static_cast<std::size_t>(n)] = d[row + n / 2 % 2 * 8][n / 4 * 8 + column + n % 2];
    }
  }

  // Gives accumulators their values once no product on its way has them.
  static void land_products(Thread& thread) {
    std::set<float*> busy;
    for (const auto& group : thread.groups)
      for (const Product& product : group) busy.insert(product.d);
    for (auto i = thread.flying.begin(); i != thread.flying.end();) {
      if (busy.count(i->first) != 0) {
        ++i;
        continue;
      }
      std::copy(i->second.begin(), i->second.end(), i->first);
      i = thread.flying.erase(i);
    }
  }

  std::vector<unsigned char> shared_;
  std::uint32_t shared_begin_;
  std::uint64_t random_;
  std::vector<Thread> threads_;
  std::unique_ptr<char[]> stacks_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  std::unique_ptr<Matrices> matrices_ = std::make_unique<Matrices>();  // too large for a fibre's stack
  std::size_t running_ = 0, finished_ = 0;
  std::string error_;
  std::map<std::pair<int, int>, Meeting> meetings_;
  std::map<int, std::array<std::array<std::uint32_t, 32>, 2>> lanes_;
  std::map<int, Named> named_;
  std::map<std::uint32_t, Barrier> barriers_;
  std::vector<Tile> flying_;
};

}  // namespace mmk::hopper
