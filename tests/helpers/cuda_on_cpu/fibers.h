// A function that can be paused and resumed, with a stack of its own; and what AddressSanitizer has to know of it.
#pragma once

#include <sys/mman.h>

#include <new>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#ifdef __SANITIZE_ADDRESS__
inline void forbid(void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
inline void leave(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
inline void arrive(void* fake_stack, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
}
#else
inline void forbid(void*, size_t) {}
inline void allow(void*, size_t) {}
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

// Saves the registers that a call keeps and the stack pointer in *from, and returns to where `to` was saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

class Fiber {
 public:
  Fiber() = default;
  Fiber(Fiber&& other) noexcept { *this = std::move(other); }
  Fiber& operator=(Fiber&& other) noexcept {
    std::swap(stack_, other.stack_);
    std::swap(pointer_, other.pointer_);
    std::swap(function_, other.function_);
    std::swap(fake_stack_, other.fake_stack_);
    return *this;
  }
  ~Fiber() {
    if (stack_ == nullptr) return;
    allow(stack_, STACK_BYTES);
    free_stacks_.push_back(stack_);
  }

  void start(void (*function)()) {
    function_ = function;
    if (free_stacks_.empty()) {
      stack_ = static_cast<char*>(
          mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (stack_ == MAP_FAILED) throw std::bad_alloc();
    } else {
      stack_ = free_stacks_.back();
      free_stacks_.pop_back();
    }
    void** top = reinterpret_cast<void**>(stack_ + STACK_BYTES) - 8;
    *--top = nullptr;  // in place of a return address: the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&enter);
    pointer_ = top - 6;  // the registers, whatever they are
  }

  // Until it pauses or ends.
  void go_on() {
    current_ = this;
    leave(&caller_fake_stack_, stack_, STACK_BYTES);
    cuda_on_cpu_switch(&caller_, pointer_);
    arrive(caller_fake_stack_, nullptr, nullptr);
  }

  // Called by the function: back to where it was resumed.
  void pause() {
    leave(&fake_stack_, caller_stack_, caller_stack_bytes_);
    cuda_on_cpu_switch(&pointer_, caller_);
    arrive(fake_stack_, &caller_stack_, &caller_stack_bytes_);
  }

 private:
  static constexpr size_t STACK_BYTES = 256 << 10;  // address space: only what is used takes memory

  static void enter() {
    arrive(nullptr, &caller_stack_, &caller_stack_bytes_);
    current_->function_();
    leave(nullptr, caller_stack_, caller_stack_bytes_);  // the end of the fiber
    cuda_on_cpu_switch(&current_->pointer_, caller_);
  }

  char* stack_ = nullptr;
  void* pointer_ = nullptr;
  void (*function_)() = nullptr;
  void* fake_stack_ = nullptr;

  inline static Fiber* current_;
  inline static void *caller_, *caller_fake_stack_;
  inline static const void* caller_stack_;
  inline static size_t caller_stack_bytes_;
  inline static std::vector<char*> free_stacks_;
};

}  // namespace cuda_on_cpu
