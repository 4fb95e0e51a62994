// Runs a grid on one thread: every thread of a block is a fiber, which runs until it waits at a barrier or a shuffle.
//
// The order is as bad as the language allows: a few blocks are under way at once; at each turn one warp of one of them
// goes on, its lanes in random order, so that warps run far ahead of others. Shared memory starts as NaN.
#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_pipeline.h"
#include "cuda_runtime.h"
#include "fibers.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned WARP = 32, MAX_BLOCKS_UNDER_WAY = 3;

enum class State { ready, at_barrier, at_cluster_barrier, at_shuffle, returned };

struct Copy {
  void* to;
  const void* from;
  size_t num_bytes;
};

struct Thread {
  Fiber fiber;
  State state = State::ready;
  struct {
    const void* mine;
    void* theirs;
    size_t num_bytes;
    int distance;
  } shuffle{};
  std::vector<Copy> copies;  // not yet committed
  std::vector<std::vector<Copy>> committed;
};

struct Block {
  unsigned index;
  std::vector<Thread> threads;
  std::vector<char> shared;  // while another block is under way
};

unsigned from_environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text ? unsigned(std::atoi(text)) : otherwise;
}

std::mt19937 random_bits(from_environment("FASTDMD_EMULATED_SEED", 0));
const std::function<void()>* body;  // of the threads of the launch under way
Thread* running;
std::vector<Block> under_way;  // whole clusters
const Block* current;
unsigned cluster_size;
std::string failure;

unsigned random_below(unsigned n) { return unsigned(uint64_t(random_bits()) * n >> 32); }

void wait(State state) {
  running->state = state;
  running->fiber.pause();
}

void run_thread() {
  (*body)();
  running->state = State::returned;
}

// All ready lanes of a warp go on, each until it waits; once all 32 are at a shuffle, they get their values.
void step(Block& block, unsigned warp) {
  const unsigned first = warp * WARP, num_lanes = std::min(WARP, unsigned(block.threads.size()) - first);
  unsigned order[WARP], num_waiting = 0;
  for (unsigned lane = 0; lane < num_lanes; ++lane) {
    const unsigned other = random_below(lane + 1);
    order[lane] = order[other];
    order[other] = lane;
  }
  for (unsigned i = 0; i < num_lanes; ++i) {
    Thread& thread = block.threads[first + order[i]];
    if (thread.state == State::ready) {
      running = &thread;
      threadIdx = {first + order[i], 0, 0};
      thread.fiber.go_on();
      if (!failure.empty()) return;
    }
    num_waiting += thread.state == State::at_shuffle;
  }
  if (num_waiting < WARP) return;
  Thread* lanes = &block.threads[first];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const auto &mine = lanes[lane].shuffle, &other = lanes[lane ^ unsigned(mine.distance)].shuffle;
    if (mine.distance != lanes[0].shuffle.distance || mine.num_bytes != lanes[0].shuffle.num_bytes)
      failure = "the lanes of a warp are at different shuffles";
    else
      std::memcpy(mine.theirs, other.mine, mine.num_bytes);
  }
  for (unsigned lane = 0; lane < WARP; ++lane) lanes[lane].state = State::ready;
}

unsigned count(const Block& block, State state) {
  return unsigned(std::count_if(block.threads.begin(), block.threads.end(),
                                [&](const Thread& thread) { return thread.state == state; }));
}

// Some turns of a block whose shared memory is in place. True once all its threads have returned.
bool take_turns(Block& block) {
  const unsigned num_threads = unsigned(block.threads.size());
  blockIdx = {block.index, 0, 0};
  do {
    std::vector<unsigned> ready;
    for (unsigned i = 0; i < num_threads; ++i)
      if (block.threads[i].state == State::ready && (ready.empty() || ready.back() != i / WARP))
        ready.push_back(i / WARP);
    if (ready.empty()) {
      const unsigned at_barrier = count(block, State::at_barrier), returned = count(block, State::returned);
      if (returned == num_threads) return true;
      if (count(block, State::at_cluster_barrier) == num_threads) return false;
      if (at_barrier < num_threads) {
        failure = "of the " + std::to_string(num_threads) + " threads of a block " + std::to_string(at_barrier) +
                  " wait at a barrier, " + std::to_string(count(block, State::at_shuffle)) +
                  " wait at a shuffle and " + std::to_string(returned) + " have returned";
        return true;
      }
      for (Thread& thread : block.threads) thread.state = State::ready;
      continue;
    }
    const unsigned warp = ready[random_below(unsigned(ready.size()))];
    do step(block, warp);
    while (failure.empty() && random_below(4) && block.threads[warp * WARP].state == State::ready);
  } while (failure.empty() && random_below(16));
  return false;
}

// After some turns of `block`: once all of its cluster is at the barrier it goes on; once all has returned it goes.
void go_on_together(const Block& block) {
  const unsigned cluster = block.index / cluster_size;
  const auto mine = [&](const Block& other) { return other.index / cluster_size == cluster; };
  const auto all_are = [&](State state) {
    return size_t(std::count_if(under_way.begin(), under_way.end(), [&](const Block& other) {
      return mine(other) && count(other, state) == other.threads.size();
    }));
  };
  const size_t waiting = all_are(State::at_cluster_barrier), returned = all_are(State::returned);
  if (waiting == cluster_size) {
    for (Block& other : under_way)
      if (mine(other))
        for (Thread& thread : other.threads) thread.state = State::ready;
  } else if (waiting > 0 && waiting + returned == cluster_size) {
    failure = "some blocks of a cluster wait for others, which have returned";
  } else if (returned == cluster_size) {
    std::erase_if(under_way, mine);
  }
}

void run_grid(unsigned num_blocks, unsigned num_threads, size_t dynamic_bytes) {
  const SharedMemory shared(dynamic_bytes);
  std::vector<unsigned> order(num_blocks / cluster_size);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  under_way.clear();
  while (!order.empty() || !under_way.empty()) {
    while (!order.empty() && (under_way.empty() || under_way.size() + cluster_size <= MAX_BLOCKS_UNDER_WAY)) {
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        under_way.push_back({order.back() * cluster_size + rank, std::vector<Thread>(num_threads),
                             std::vector<char>(shared.size(), '\xff')});
        for (Thread& thread : under_way.back().threads) thread.fiber.start(run_thread);
      }
      order.pop_back();
    }
    Block& block = under_way[random_below(unsigned(under_way.size()))];
    current = &block;
    shared.restore(block.shared);
    const bool finished = take_turns(block);
    shared.save(block.shared);
    if (!failure.empty()) return;
    if (finished) block.shared.assign(shared.size(), '\xff');  // gone, whoever still reads it
    go_on_together(block);
    if (!failure.empty()) return;
  }
}

// Notes in the file FASTDMD_EMULATED_RECORD which kernels are launched, by their place in this library, as `nm` does.
void record(const void* kernel) {
  static const char* const path = std::getenv("FASTDMD_EMULATED_RECORD");
  static std::set<const void*> known;
  if (!path || !known.insert(kernel).second) return;
  Dl_info library;
  dladdr(&threadIdx, &library);
  const auto place = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  std::ofstream(path, std::ios::app) << std::hex << place << '\n';
}

}  // namespace

void barrier() { wait(State::at_barrier); }

void cluster_barrier() { wait(cluster_size > 1 ? State::at_cluster_barrier : State::at_barrier); }

void* of_block(void* mine, unsigned rank) {
  const unsigned index = current->index / cluster_size * cluster_size + rank;
  if (rank >= cluster_size) fail("a thread reads the shared memory of a block that its cluster does not have");
  if (index == current->index) return mine;
  const auto at = [&](const Block& block) { return block.index == index; };
  Block& other = *std::find_if(under_way.begin(), under_way.end(), at);
  return other.shared.data() + SharedMemory::instance->offset_of(mine);
}

void copy_later(void* to, const void* from, size_t num_bytes) { running->copies.push_back({to, from, num_bytes}); }

void commit_copies() { running->committed.push_back(std::exchange(running->copies, {})); }

void wait_for_copies(size_t but_the_last) {
  auto& committed = running->committed;
  for (; committed.size() > but_the_last; committed.erase(committed.begin()))
    for (const Copy& copy : committed.front()) std::memcpy(copy.to, copy.from, copy.num_bytes);
}

void shuffle(const void* mine, void* theirs, size_t num_bytes, int distance, unsigned mask) {
  if (mask != 0xffffffffu) fail("a shuffle is for some lanes of a warp alone, which is not emulated");
  running->shuffle = {mine, theirs, num_bytes, distance};
  wait(State::at_shuffle);
}

void let_others_run() {
  if (random_below(2)) wait(State::ready);
}

void fail(const char* message) {
  failure = message;
  running->fiber.pause();
  std::abort();  // nobody resumes it
}

int compute_capability() { return int(from_environment("FASTDMD_EMULATED_CAPABILITY", 90)); }
int num_multiprocessors() { return int(from_environment("FASTDMD_EMULATED_MULTIPROCESSORS", 132)); }

// `name` holds the type of the arguments, which names the op.
void launch(const void* kernel, const char* name, const std::function<void()>& thread, dim3 grid, dim3 block,
            size_t shared_bytes, unsigned cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > 1024 || shared_bytes > MAX_SHARED_BYTES ||
      grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
    failure = "expected a line of [1, 2^31) blocks, one of [1, 1024] threads and [0, 227 KiB] of shared memory, got " +
              std::to_string(grid.x) + ", " + std::to_string(block.x) + " and " + std::to_string(shared_bytes);
  if (cluster == 0 || cluster > 8 || grid.x % cluster != 0)
    failure = "expected clusters of [1, 8] blocks that divide " + std::to_string(grid.x) + ", got " +
              std::to_string(cluster);
  if (failure.empty()) {
    record(kernel);
    body = &thread;
    gridDim = grid;
    cluster_size = cluster;
    blockDim = block;
    run_grid(grid.x, block.x, shared_bytes);
  }
  // It stays, as an error of a device does: what the kernel left behind is not to be trusted.
  if (!failure.empty()) throw std::runtime_error("CUDA on a CPU: " + failure + ", in " + name);
}

}  // namespace cuda_on_cpu

// ---- what torch has only with CUDA; every call above succeeds or throws

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) { return 0; }
void torch_c10_cuda_free_error_msg(char*) {}
}
