// Runs the blocks of a kernel one after another. Every thread of a block is a fiber: it runs until
// it ends, meets a barrier, or meets an operation of its warp. The order in which the fibers take
// turns is chosen, and nothing else differs from run to run.
//
// A launch calls execute_launch, which calls execute_block for every block, which calls
// let_warps_run until the block has ended; that resumes fibers.
//
// This file is never instrumented. In the builds for a sanitizer it tells the sanitizer about the
// fibers.
#if defined(__APPLE__)  // ucontext.h and mmap of macOS ask for these
#define _XOPEN_SOURCE 700
#define _DARWIN_C_SOURCE
#endif

#include "runtime.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__linux__)
#include <link.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#if defined(CUDA_EMULATOR_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif
#if defined(CUDA_EMULATOR_THREAD)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

namespace cuda_emulator {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned long long launch_number = 0;
char* dynamic_shared = nullptr;
Named dynamic_declared;
volatile bool updating = false;

// What Python passes, and gets back.

struct Range {  // an array
  char* host;  // Python's memory
  unsigned long long bytes;
  unsigned long long offset;  // from the start of the memory that the array is a part of
  const char* name;
  unsigned element;  // bytes of what the kernel's pointer points to
  int read_only;
  char** argument;    // the pointer that the kernel is given
  char *begin, *end;  // where the kernel finds the array; here and below: set by place_arrays
  int memory;         // the number of the memory that it shares with arrays that overlap
};

struct Request {
  void (*call)(void**);
  void** args;
  unsigned grid[3], block[3];
  unsigned shared, max_shared;
  int order;
  unsigned long long seed;
  Range* ranges;
  int num_ranges;
  Constant* constants;
  int checked;  // in the build that counts: a sum of Checks
  int counted;  // in the build that counts: whether Python wants to know the traffic
  int rehearsed;  // forget what the kernel prints and writes: only its fault is wanted
  volatile int stop;  // Python may set it at any time; the launch then ends at the next look
};
enum Checks { RACES = 1, UNINITIALIZED = 2, BARRIERS = 4 };

struct Fault {
  char message[512];
  unsigned block[3], thread[3];
  int in_thread;     // 0: of the launch as a whole
  const char* file;  // null: Python finds it from image and offset, if there is an image
  int line;
  const char* image;
  unsigned long long offset;
  unsigned long long other_offset;  // of a second instruction in the same image, 0 if there is none
  int is_vague;  // the build that counts could tell more
  int column;    // of the end of an index that is outside its array, 0 for other faults
};

namespace {

const size_t PAGE = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t CONSTANT_PAGE = 4096;  // for which the pages of constants are laid out
constexpr size_t LOCAL_BYTES = 512 << 10;  // of local memory, as on a GPU
constexpr size_t STACK_BYTES = LOCAL_BYTES + (64 << 10);
constexpr size_t STACK_GUARD = 64 << 10;  // below a stack and above it
constexpr size_t ARENA_BYTES = 2 << 20;
constexpr size_t RED_ZONE = 256;
constexpr size_t GUARD_BYTES = 64ull << 30;  // half of it: what an unsigned can count in doubles
constexpr size_t SHARED_GUARD = 1ull << 30;
#if defined(CUDA_EMULATOR_COUNTED)
constexpr unsigned PATIENCE = 1 << 18;
#else
constexpr unsigned PATIENCE = 1 << 22;  // how often threads may give way for nothing
#endif
constexpr unsigned POLLS = 16;          // how often an atomic changes nothing before its thread gives way
constexpr unsigned MAX_STATIC_SHARED = 48 << 10;  // anything more must be dynamic
constexpr unsigned long long NEVER_WRITTEN = ~0ull;  // as floats NaN, as integers -1
enum Order { FORWARD, REVERSE, SEEDED };

// A context is the state of a fiber that does not run.

#if defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
struct Context { void* stack_pointer; };
// swapcontext() would make a system call for the signal mask. In the System V ABI, a callee may
// change all registers except these six.
__attribute__((naked, noinline, used)) void switch_context(Context*, Context*) {
  __asm__ volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov (%rsi), %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // a function starts with the stack 8 off a multiple of 16
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context { ucontext_t saved; };
void switch_context(Context* from, Context* to) { swapcontext(&from->saved, &to->saved); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

struct Stack {
  char* memory;  // above its guard
  void* owner;  // for ThreadSanitizer
};

enum class State : char { fresh, ready, at_barrier, in_warp_operation, finished };

struct Fiber {
  State state;
  uint3 index;
  unsigned number;
  Context context;
  Stack stack;
  Site site;           // of the barrier or operation it waits in
  Barrier barrier;
  WarpOperation operation;
  int predicate;
  unsigned mask;
  int source;
  unsigned long long value, result;
  void* fake_stack;    // AddressSanitizer's
  void* meeting;
  bool gave_way;       // it waits for others by looking again and again, so it came back for their sake
  const void* polled;  // the address of the last atomic that changed nothing
  unsigned polls;      // how often in a row
  const void* spins_at;  // the instruction at which it last gave way
};

struct Random {
  unsigned long long state;
  unsigned long long next() {  // splitmix64
    unsigned long long z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  template <class T> void shuffle(T* items, size_t count) {
    for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[next() % i]);
  }
};

const Request* request;
Fault fault;
bool failed;
std::vector<Fiber> fibers;
std::deque<Stack> free_stacks;
Fiber* current;
Context hub;
Random generator;

char* arena;
char* next_free;  // address in static shared memory
unsigned static_shared;

// The addresses on which threads synchronize, for ThreadSanitizer: a page that it forgets with
// every block.
constexpr unsigned MEETINGS = 4096 / 8;
char* meetings;
unsigned next_meeting;
void* barrier_meeting;
char whole_launch, whole_block;

std::string printed;
const void* printing_for;  // the call of printf that is under way
unsigned long long lines_not_printed;
constexpr size_t MAX_PRINTED = 1 << 20;  // as on a GPU
#if defined(CUDA_EMULATOR_THREAD)
void* hub_fiber;
#endif
#if defined(CUDA_EMULATOR_ADDRESS)
void* hub_fake_stack;
const void* hub_stack;
size_t hub_stack_bytes;
#endif

// Faults

void describe(const Fiber* fiber, Site site, const char* format, va_list arguments) {
  if (failed) return;
  failed = true;
  vsnprintf(fault.message, sizeof fault.message, format, arguments);
  fault.block[0] = blockIdx.x, fault.block[1] = blockIdx.y, fault.block[2] = blockIdx.z;
  fault.in_thread = fiber != nullptr;
  if (fiber) fault.thread[0] = fiber->index.x, fault.thread[1] = fiber->index.y, fault.thread[2] = fiber->index.z;
  fault.file = site.file;
  fault.line = site.line;
}

__attribute__((format(printf, 3, 4))) void report(const Fiber* fiber, Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(fiber, site, format, arguments);
  va_end(arguments);
}

void locate(const void* pc) {
  Dl_info found;
  if (!dladdr(pc, &found)) return;
  fault.image = found.dli_fname;
  fault.offset = static_cast<const char*>(pc) - static_cast<const char*>(found.dli_fbase);
}

void to_hub();

// From a fiber: the launch ends here.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(current, site, format, arguments);
  va_end(arguments);
  for (;;) to_hub();
}

const char* name_of(WarpOperation operation) {
  static const char* const names[] = {"__syncwarp", "__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync",
                                      "__ballot_sync", "__any_sync", "__all_sync", "__match_any_sync"};
  return names[static_cast<int>(operation)];
}

// "thread (3,0,0) waits in __ballot_sync at file:line"
struct Text { char text[320] = ""; };
Text thread_name(const Fiber& fiber) {
  Text made;
  snprintf(made.text, sizeof made.text, "thread (%u,%u,%u)", fiber.index.x, fiber.index.y, fiber.index.z);
  return made;
}
Text waiting(const Fiber& fiber) {
  Text made;
  const char* what = fiber.state == State::at_barrier ? "__syncthreads" : name_of(fiber.operation);
  snprintf(made.text, sizeof made.text, "%s waits in %s at %s:%d", thread_name(fiber).text, what, fiber.site.file, fiber.site.line);
  return made;
}

// No thread may read a constant that nobody has set.
void protect_constants(int protection) {
  for (const Constant* at = request->constants; at; at = at->next) {
    if (!at->is_set && PAGE == CONSTANT_PAGE) mprotect(at->begin, (at->bytes + PAGE - 1) / PAGE * PAGE, protection);
  }
}

// The constant that a thread may not read at an address.
const Constant* unset_constant(const char* address) {
  for (const Constant* at = request->constants; at; at = at->next) {
    if (!at->is_set && address >= at->begin && address < at->begin + at->bytes) return at;
  }
  return nullptr;
}

#include "arrays.hpp"

Text describe_unset(const Constant& constant, const char* address) {
  Text made;
  snprintf(made.text, sizeof made.text, "%.140s read, but %.40s was never set: launch(..., constants={\"%.40s\": array})",
           entry_text(constant.named, address - constant.begin, 1).text, constant.named.name, constant.named.name);
  return made;
}

// From a fiber that is about to make an access: the launch ends here.
[[noreturn, maybe_unused]] __attribute__((format(printf, 2, 3))) void fail_at(const void* return_address, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(current, {nullptr, 0}, format, arguments);
  va_end(arguments);
  locate(static_cast<const char*>(return_address) - 1);
  for (;;) to_hub();
}

bool same_site(Site a, Site b) { return a.line == b.line && a.place == b.place && (a.file == b.file || !strcmp(a.file, b.file)); }

char* map(void* where, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED : 0);
  void* made = mmap(where, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (made == MAP_FAILED) abort();
  return static_cast<char*>(made);
}

// What the sanitizers are told. In the other builds these functions do nothing.

#if defined(CUDA_EMULATOR_THREAD)
void release(void* meeting) { __tsan_release(meeting); }
void acquire(void* meeting) { __tsan_acquire(meeting); }
void forget(char* memory, size_t bytes) {
  munmap(memory, bytes);
  map(memory, bytes);
}
// A stack serves one thread after another. They all have the same owner, so no race between them is
// seen: therefore many other stacks are used before this one is used again. Making a stack for each
// thread would take far longer.
constexpr size_t STACKS_BETWEEN = 2048;
#else
void release(void*) {}
void acquire(void*) {}
void forget(char*, size_t) {}
constexpr size_t STACKS_BETWEEN = 0;
#endif

void about_to_switch(Fiber& fiber, bool to_fiber) {
#if defined(CUDA_EMULATOR_THREAD)
  __tsan_switch_to_fiber(to_fiber ? fiber.stack.owner : hub_fiber, 1);  // 1: taking turns orders nothing
#elif defined(CUDA_EMULATOR_ADDRESS)
  if (to_fiber) __sanitizer_start_switch_fiber(&hub_fake_stack, fiber.stack.memory, STACK_BYTES);
  else __sanitizer_start_switch_fiber(fiber.state == State::finished ? nullptr : &fiber.fake_stack, hub_stack, hub_stack_bytes);
#else
  (void)fiber, (void)to_fiber;
#endif
}

void has_switched(Fiber* to_fiber, bool is_new = false) {
#if defined(CUDA_EMULATOR_ADDRESS)
  if (is_new) __sanitizer_finish_switch_fiber(nullptr, &hub_stack, &hub_stack_bytes);
  else __sanitizer_finish_switch_fiber(to_fiber ? to_fiber->fake_stack : hub_fake_stack, nullptr, nullptr);
#else
  (void)to_fiber, (void)is_new;
#endif
}

// Stacks

Stack take_stack() {
  if (free_stacks.size() > STACKS_BETWEEN) {
    const Stack stack = STACKS_BETWEEN ? free_stacks.front() : free_stacks.back();
    if (STACKS_BETWEEN) free_stacks.pop_front();
    else free_stacks.pop_back();  // the one last used is in the cache
    return stack;
  }
  // A step beyond either end is a fault at once.
  char* whole = map(nullptr, STACK_GUARD + STACK_BYTES + STACK_GUARD);
  mprotect(whole, STACK_GUARD, PROT_NONE);
  mprotect(whole + STACK_GUARD + STACK_BYTES, STACK_GUARD, PROT_NONE);
  Stack made{whole + STACK_GUARD, nullptr};
#if defined(CUDA_EMULATOR_THREAD)
  made.owner = __tsan_create_fiber(0);
#endif
  return made;
}

void give_back_stack(Fiber& fiber) {
#if defined(CUDA_EMULATOR_ADDRESS)
  __asan_unpoison_memory_region(fiber.stack.memory, STACK_BYTES);
#endif
  free_stacks.push_back(fiber.stack);
  fiber.stack = {};
}

// For a thread that has been stopped before its end.
void drop_stack(Fiber& fiber) {
#if defined(CUDA_EMULATOR_THREAD)
  __tsan_destroy_fiber(fiber.stack.owner);
  munmap(fiber.stack.memory - STACK_GUARD, STACK_GUARD + STACK_BYTES + STACK_GUARD);
  fiber.stack = {};
#else
  give_back_stack(fiber);
#endif
}

// Fibers

void to_hub() {
  Fiber* me = current;
  about_to_switch(*me, false);
  switch_context(&me->context, &hub);
  has_switched(me);
}

// Whether a thread has done more than to look again, in this round; and how often threads have given
// way since the last round in which one has.
bool made_progress;
unsigned times_given_way, number_of_turn;

void observe_end_of_turn();

void run_fiber() {
  has_switched(current, true);
  acquire(&whole_block);
  request->call(request->args);
  observe_end_of_turn();
  release(&whole_launch);
  current->state = State::finished;
  to_hub();
}

void resume(Fiber& fiber) {
  if (fiber.state == State::fresh) {
    fiber.stack = take_stack();
    // The tops of stacks differ in their last bits, so that they do not compete for the same cache
    // lines.
    prepare(fiber.context, fiber.stack.memory, STACK_BYTES - fiber.number % 64 * 192, run_fiber);
    fiber.polled = nullptr;
    fiber.polls = 0;
  }
  fiber.state = State::ready;
  fiber.gave_way = false;
  ++number_of_turn;
  current = &fiber;
  threadIdx = fiber.index;
  about_to_switch(fiber, true);
  switch_context(&hub, &fiber.context);
  has_switched(nullptr);
  current = nullptr;
  if (!fiber.gave_way) made_progress = true;
  if (fiber.state == State::finished) give_back_stack(fiber);
}

// The thread waits for others without saying so: they have their turns first.
void give_way() {
  current->gave_way = true;
  ++times_given_way;
  to_hub();
}

void wait(State state, void* meeting) {
  observe_end_of_turn();
  current->state = state;
  current->meeting = meeting;
  if (meeting) release(meeting);
  to_hub();
  if (meeting) acquire(meeting);
}

#if defined(CUDA_EMULATOR_COUNTED)
#include "traffic.hpp"
#else
void pass_fence(Scope) {}
void observe_launch() {}
void observe_block() {}
void observe_shared(const char*, unsigned, Named) {}
void observe_convergence(unsigned) {}
void observe_end_of_turn() {}
void observe_barrier() {}
void observe_operation(WarpOperation, unsigned, unsigned) {}
#endif

#include "looks.hpp"
#include "undefined.hpp"

// Operations of a warp

struct Warp {
  unsigned first, size;
  Fiber& lane(unsigned i) const { return fibers[first + i]; }
  unsigned all() const { return size == 32 ? 0xffffffffu : (1u << size) - 1; }
};

Warp warp_of(unsigned number) {
  const unsigned first = number / 32 * 32, left = static_cast<unsigned>(fibers.size()) - first;
  return {first, left < 32 ? left : 32};
}

void* new_meeting() { return meetings + 8 * (next_meeting++ % MEETINGS); }

// The threads of one __syncwarp meet at one address. Two that are under way at once, with different
// masks, have different addresses. The other operations order nothing that the lanes do to memory.
void* meeting_of(const Fiber& fiber) {
  if (fiber.operation != WarpOperation::sync) return nullptr;
  const Warp warp = warp_of(fiber.number);
  for (unsigned i = 0; i < warp.size; ++i) {
    const Fiber& other = warp.lane(i);
    const bool is_here = other.state == State::in_warp_operation && other.operation == WarpOperation::sync;
    if (is_here && other.mask == fiber.mask) return other.meeting;
  }
  return new_meeting();
}

unsigned long long result_for(const Warp& warp, unsigned mask, unsigned votes, const Fiber& fiber) {
  switch (fiber.operation) {
    case WarpOperation::sync: return 0;
    case WarpOperation::ballot: return votes;
    case WarpOperation::any: return votes != 0;
    case WarpOperation::all: return votes == mask;
    case WarpOperation::match_any: {
      unsigned equal = 0;
      for (unsigned i = 0; i < warp.size; ++i) equal |= (mask >> i & 1u & (warp.lane(i).value == fiber.value)) << i;
      return equal;
    }
    default: return warp.lane(static_cast<unsigned>(fiber.source)).value;
  }
}

// Completes every operation of the warp for which all lanes have arrived, and says whether there
// was one. It is called when no lane can run on.
bool complete_operations(const Warp& warp) {
  unsigned in_operation = 0, finished = 0;
  for (unsigned i = 0; i < warp.size; ++i) {
    if (warp.lane(i).state == State::in_warp_operation) in_operation |= 1u << i;
    if (warp.lane(i).state == State::finished) finished |= 1u << i;
  }
  bool progress = false;
  for (unsigned left = in_operation; left;) {
    const unsigned lane = __builtin_ctz(left);
    const Fiber& first = warp.lane(lane);
    const unsigned mask = first.mask & warp.all();
    left &= ~(1u << lane);
    if (mask & finished) {
      report(&first, first.site, "%s names %s in its mask 0x%08x, which has exited", name_of(first.operation),
             thread_name(warp.lane(__builtin_ctz(mask & finished))).text, first.mask);
      return false;
    }
    bool complete = !(mask & ~in_operation);
    const Fiber* elsewhere = nullptr;
    unsigned votes = 0;
    for (unsigned i = 0; complete && i < warp.size; ++i) {
      if (!(mask >> i & 1)) continue;
      const Fiber& other = warp.lane(i);
      // A lane in another operation may still come here when that operation is done.
      complete = other.mask == first.mask && other.operation == first.operation;
      if (!same_site(other.site, first.site)) elsewhere = &other;
      votes |= (other.value != 0) << i;
    }
    if (!complete) continue;
    if (elsewhere && first.operation != WarpOperation::sync) {
      report(&first, first.site, "the lanes of a %s stand at different lines: %s", name_of(first.operation), waiting(*elsewhere).text);
      return false;
    }
    for (unsigned i = 0; i < warp.size; ++i) {
      if (mask >> i & 1) warp.lane(i).result = result_for(warp, mask, votes, warp.lane(i));
    }
    for (unsigned i = 0; i < warp.size; ++i) {
      if (mask >> i & 1) warp.lane(i).state = State::ready;
    }
    observe_operation(first.operation, first.number / 32, mask);
    if (mask == warp.all()) observe_convergence(first.number / 32);
    left &= ~mask;
    progress = true;
  }
  return progress;
}

// Gives a turn to every lane of a warp that can run.
void take_turns(const Warp& warp) {
  unsigned char order[32];
  for (unsigned i = 0; i < warp.size; ++i) order[i] = static_cast<unsigned char>(request->order == REVERSE ? warp.size - 1 - i : i);
  if (request->order == SEEDED) generator.shuffle(order, warp.size);
  if (request->stop) report(nullptr, {nullptr, 0}, "was stopped between the turns of its threads");
  for (unsigned i = 0; i < warp.size && !failed; ++i) {
    Fiber& fiber = warp.lane(order[i]);
    if (fiber.state == State::fresh || fiber.state == State::ready) resume(fiber);
  }
}

// Gives turns to the threads of a block until each waits, has given way, or has ended.
void take_one_round() {
  const unsigned count = (static_cast<unsigned>(fibers.size()) + 31) / 32;
  if (request->order != SEEDED) {
    for (unsigned i = 0; i < count && !failed; ++i) {
      const Warp warp = warp_of((request->order == REVERSE ? count - 1 - i : i) * 32);
      do take_turns(warp);
      while (!failed && complete_operations(warp));
    }
    return;
  }
  unsigned active[32];
  for (unsigned i = 0; i < count; ++i) active[i] = i;
  for (unsigned left = count; left && !failed;) {
    unsigned& chosen = active[generator.next() % left];
    const Warp warp = warp_of(chosen * 32);
    take_turns(warp);
    if (!failed && !complete_operations(warp)) chosen = active[--left];
  }
}

// Runs fibers until every thread of the block waits at a barrier, waits for ever, or has ended.
void let_warps_run() {
  times_given_way = 0;
  unsigned long long in_memory = 0;
  while (!failed) {
    made_progress = false;
    take_one_round();
    const auto looking = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::ready; });
    if (looking == fibers.end() || failed) return;
    if (made_progress) {
      times_given_way = 0;
      in_memory = 0;
    } else if (times_given_way > PATIENCE) {  // twice, and memory is as it was: it will be so for ever
      const unsigned long long before = in_memory;
      in_memory = checksum_of_memory();
      if (in_memory == before) report_endless(*looking);
      times_given_way = 0;
    }
  }
}

// Lets the block pass its barrier if all threads that have not ended are at it. Returns false if
// the block has ended, or never will.
bool pass_barrier() {
  const Fiber *at_barrier = nullptr, *in_operation = nullptr, *elsewhere = nullptr;
  int yes = 0, all = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::in_warp_operation) in_operation = &fiber;
    if (fiber.state != State::at_barrier) continue;
    if (!at_barrier) at_barrier = &fiber;
    if (!same_site(at_barrier->site, fiber.site) || at_barrier->barrier != fiber.barrier) elsewhere = &fiber;
    yes += fiber.predicate != 0;
    ++all;
  }
  if (in_operation) {
    const Fiber* other = at_barrier;
    for (const Fiber& fiber : fibers) {
      if (!other && fiber.state == State::in_warp_operation &&
          (fiber.mask != in_operation->mask || fiber.operation != in_operation->operation)) {
        other = &fiber;
      }
    }
    report(in_operation, in_operation->site, "deadlock: %s for the lanes 0x%08x%s%s", waiting(*in_operation).text, in_operation->mask,
           other ? ", and " : "", other ? waiting(*other).text : "");
    return false;
  }
  if (!at_barrier) return false;
  if (elsewhere) {
    report(at_barrier, at_barrier->site, "divergent barrier: %s, and %s%s", waiting(*at_barrier).text, waiting(*elsewhere).text,
           at_barrier->site.line == elsewhere->site.line ? ", another barrier of that line" : "");
    return false;
  }
  if (request->checked & BARRIERS) {
    for (const Fiber& fiber : fibers) {
      if (fiber.state != State::finished) continue;
      report(at_barrier, at_barrier->site, "divergent barrier: %s, and %s has ended without it; hardware lets it go, but every thread of a "
             "block should meet the same barriers", waiting(*at_barrier).text, thread_name(fiber).text);
      return false;
    }
  }
  for (unsigned warp = 0; warp * 32 < fibers.size(); ++warp) observe_convergence(warp);
  observe_barrier();
  barrier_meeting = new_meeting();
  int result = 0;
  if (at_barrier->barrier == Barrier::any) result = yes != 0;
  if (at_barrier->barrier == Barrier::all) result = yes == all;
  if (at_barrier->barrier == Barrier::count) result = yes;
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::at_barrier) continue;
    fiber.state = State::ready;
    fiber.result = static_cast<unsigned long long>(result);
  }
  return true;
}

void fill(char* from, char* to) {  // both are multiples of 8; a sanitizer would see memset
  for (volatile unsigned long long* p = reinterpret_cast<unsigned long long*>(from); p < reinterpret_cast<unsigned long long*>(to); ++p) {
    *p = NEVER_WRITTEN;
  }
}

char* aligned_up(char* p, size_t alignment) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + alignment - 1) / alignment * alignment);
}

// The shared memory of a launch: a red zone, the dynamic memory, a red zone, then the static
// declarations, each with a red zone after it.
void lay_out_shared() {
  if (!arena) {
    void* around = mmap(nullptr, SHARED_GUARD + ARENA_BYTES + SHARED_GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    arena = map(around == MAP_FAILED ? nullptr : static_cast<char*>(around) + SHARED_GUARD, ARENA_BYTES);
    meetings = map(nullptr, PAGE);
  }
  dynamic_declared = {"dynamic shared memory", 1, {}};
#if defined(CUDA_EMULATOR_ADDRESS)
  __asan_unpoison_memory_region(arena, ARENA_BYTES);
#endif
  dynamic_shared = arena + RED_ZONE;
  next_free = aligned_up(dynamic_shared + request->shared + RED_ZONE, 128);
  fill(arena, next_free);
#if defined(CUDA_EMULATOR_ADDRESS)
  __asan_poison_memory_region(arena, ARENA_BYTES);
  __asan_unpoison_memory_region(dynamic_shared, request->shared);
#endif
  static_shared = 0;
  ++launch_number;
}

void execute_block(unsigned long long number) {
  blockIdx.x = static_cast<unsigned>(number % gridDim.x);
  blockIdx.y = static_cast<unsigned>(number / gridDim.x % gridDim.y);
  blockIdx.z = static_cast<unsigned>(number / gridDim.x / gridDim.y);
  if (request->shared || static_shared) forget(arena, static_cast<size_t>(next_free - arena) / PAGE * PAGE + PAGE);
  if (next_meeting > 1) forget(meetings, PAGE);
  next_meeting = 0;
  barrier_meeting = new_meeting();
  release(&whole_block);
  fill(arena, next_free);
  observe_block();
  for (Fiber& fiber : fibers) fiber.state = State::fresh;
  do let_warps_run();
  while (!failed && pass_barrier());
  for (unsigned warp = 0; warp * 32 < fibers.size(); ++warp) observe_convergence(warp);
}

// A crash of the kernel ends the launch, not the process.

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGURG, SIGTRAP};  // the last two: for looks, and for steps
constexpr int NUM_SIGNALS = sizeof SIGNALS / sizeof *SIGNALS;
struct sigaction old_actions[NUM_SIGNALS];

const char* verb_of_signal(void* context) {
#if defined(__x86_64__) && defined(__linux__)
  return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "written" : "read";
#else
  return (void)context, "accessed";
#endif
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (!launching.now || !pthread_equal(pthread_self(), launching.thread) || !current) {  // not in the kernel: act as if this handler were not there
    for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &old_actions[i], nullptr);
    if (number == SIGABRT || number == SIGTRAP) raise(number);
    return;
  }
  const void* pc = program_counter(context);
  if (printing_for) {
    report(current, {nullptr, 0}, "printf was given an address for a %%s at which there is no text");
    locate(printing_for);
    printing_for = nullptr;
    switch_context(&current->context, &hub);
  }
  const char* address = static_cast<const char*>(info->si_addr);
  const char* stack = current->stack.memory;
#if defined(__linux__)
  const bool is_odd = number == SIGBUS || info->si_code == SI_KERNEL;  // no page is missing
#else
  const bool is_odd = number == SIGBUS && address && reinterpret_cast<uintptr_t>(address) % 4;
#endif
  const bool is_vague = !failed;
  if (number == SIGFPE) {
    report(current, {nullptr, 0}, "integer division by zero, or the least integer by -1");
  } else if (number == SIGILL || number == SIGABRT) {
    report(current, {nullptr, 0}, "the kernel ran into code that cannot be reached");
  } else if (const Constant* constant = unset_constant(address)) {
    report(current, {nullptr, 0}, "%s", describe_unset(*constant, address).text);
  } else if (is_odd) {
    report(current, {nullptr, 0}, "a vector at an address that is no multiple of its size, or a pointer that is no address");
    fault.is_vague = is_vague;
  } else if (address >= stack - STACK_GUARD && address < stack) {
    report(current, {nullptr, 0}, "local memory overflows: a thread has %zu KiB, for local arrays and the calls of functions", LOCAL_BYTES >> 10);
  } else if (address >= stack + STACK_BYTES && address < stack + STACK_BYTES + STACK_GUARD) {
    report(current, {nullptr, 0}, "a local array is %s far past its end", verb_of_signal(context));
  } else if (address == pc) {
    report(current, {nullptr, 0}, "runs on at %p, where no code is: its return address is overwritten, by a write past a local array", pc);
  } else {
    report(current, {nullptr, 0}, "%s", describe_address(address, 1, verb_of_signal(context)).text);
    fault.is_vague = is_vague && has_rest(address);
  }
  if (pc) locate(pc);
  switch_context(&current->context, &hub);
}

struct SignalGuard {
  stack_t old_stack{};
  SignalGuard() {
    static char* const alternative = static_cast<char*>(malloc(64 << 10));
    stack_t mine{};
    mine.ss_sp = alternative;
    mine.ss_size = 64 << 10;
    sigaltstack(&mine, &old_stack);
    const std::lock_guard<std::mutex> lock(launching.mutex);
    launching.thread = pthread_self();
    launching.now = true;
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < NUM_SIGNALS; ++i) {
      action.sa_sigaction = SIGNALS[i] == SIGURG ? on_look : SIGNALS[i] == SIGTRAP ? on_step : on_signal;
      // A look happens on the thread's own stack, so that the thread can go on later.
      action.sa_flags = SA_SIGINFO | SA_NODEFER | (SIGNALS[i] == SIGURG ? SA_RESTART : SA_ONSTACK);
      sigaction(SIGNALS[i], &action, &old_actions[i]);
    }
  }
  ~SignalGuard() {
    const std::lock_guard<std::mutex> lock(launching.mutex);
    launching.now = false;
    for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &old_actions[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

void execute_launch() {
#if !defined(CUDA_EMULATOR_ADDRESS) && !defined(CUDA_EMULATOR_THREAD)
  SignalGuard guard;
#endif
  const unsigned long long blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
  std::vector<unsigned long long> order;
  if (request->order == SEEDED) {
    generator.state = request->seed;
    for (unsigned long long i = 0; i < blocks; ++i) order.push_back(i);
    generator.shuffle(order.data(), order.size());
  }
  for (unsigned long long i = 0; i < blocks && !failed; ++i) {
    execute_block(request->order == SEEDED ? order[i] : request->order == REVERSE ? blocks - 1 - i : i);
  }
}

}  // namespace

// The functions that kernels call

char* allocate_shared(Slot& slot, unsigned bytes, unsigned alignment, Named named, Site site) {
  static_shared += bytes;
  if (static_shared > MAX_STATIC_SHARED) {
    fail(site, "%u bytes of static shared memory with %s: the compiler allows %u, more must be dynamic", static_shared, named.name, MAX_STATIC_SHARED);
  }
  if (static_shared + request->shared > request->max_shared) {
    fail(site, "%u bytes of shared memory, %u static with %s and %u dynamic: a block here has %u", static_shared + request->shared,
         static_shared, named.name, request->shared, request->max_shared);
  }
  slot.address = aligned_up(next_free, alignment < 16 ? 16 : alignment);
  next_free = aligned_up(slot.address + bytes + RED_ZONE, 128);
  if (next_free > arena + ARENA_BYTES) fail(site, "so many declarations of shared memory that the emulator has no room for them");
  slot.launch = launch_number;
  fill(slot.address - reinterpret_cast<uintptr_t>(slot.address) % 8, next_free);
#if defined(CUDA_EMULATOR_ADDRESS)
  __asan_unpoison_memory_region(slot.address, bytes);
#endif
  observe_shared(slot.address, bytes, named);
  return slot.address;
}

unsigned warp_lane() { return current->number % 32; }

int barrier(Barrier kind, int predicate, Site site) {
  current->barrier = kind;
  current->predicate = predicate;
  current->site = site;
  wait(State::at_barrier, barrier_meeting);
  return static_cast<int>(current->result);
}

unsigned long long warp_operation(WarpOperation kind, unsigned mask, unsigned long long value, int source, Site site) {
  Fiber& me = *current;
  const unsigned lane = me.number % 32;
  if (!(mask >> lane & 1)) fail(site, "%s: the calling lane %u is not in its own mask 0x%08x", name_of(kind), lane, mask);
  if (source >= 0 && !(mask >> source & 1)) fail(site, "%s reads lane %d, which is not in the mask 0x%08x", name_of(kind), source, mask);
  if (source >= 0 && !(warp_of(me.number).all() >> source & 1)) {
    fail(site, "%s reads lane %d, which this warp of %u threads does not have", name_of(kind), source, warp_of(me.number).size);
  }
  me.operation = kind;
  me.mask = mask;
  me.source = source;
  me.value = value;
  me.site = site;
  wait(State::in_warp_operation, meeting_of(me));
  return current->result;
}

void trap(const char* message, Site site) { fail(site, "%s", message); }

void fence(Scope scope) { pass_fence(scope); }

void found_unchanged(const void* address) {
  Fiber& me = *current;
  if (me.polled != address) me.polled = address, me.polls = 0;
  if (++me.polls % POLLS) return;
  me.spins_at = static_cast<const char*>(__builtin_return_address(0)) - 1;
  give_way();
}

// Python prints it when the launch has ended, so that it comes in order with what Python prints.
int print(const char* format, ...) {
  if (request->rehearsed) return 0;
  if (request->stop) fail_at(__builtin_return_address(0), "was stopped");
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  printing_for = static_cast<const char*>(__builtin_return_address(0)) - 1;
  const int length = vsnprintf(text, sizeof text, format, arguments);
  printing_for = nullptr;
  va_end(arguments);
  if (length < 0) return length;
  if (printed.size() + length > MAX_PRINTED) return ++lines_not_printed, length;
  if (length < int(sizeof text)) {
    printed += text;
  } else {
    const size_t before = printed.size();
    printed.resize(before + length + 1);
    va_start(arguments, format);
    vsnprintf(&printed[before], length + 1, format, arguments);
    va_end(arguments);
    printed.resize(before + length);
  }
  return length;
}

}  // namespace cuda_emulator

// The functions that the compiler's checks call.
#define CUDA_EMULATOR_CHECK extern "C" __attribute__((visibility("default"))) void
CUDA_EMULATOR_CHECK __ubsan_handle_out_of_bounds(const cuda_emulator::CheckedTypes* checked, unsigned long long index) {
  if (cuda_emulator::current) cuda_emulator::fail_at_index(*checked, cuda_emulator::as_signed(*checked->second, index));
}
CUDA_EMULATOR_CHECK __ubsan_handle_float_cast_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long bits) {
  if (!cuda_emulator::current) return;
  cuda_emulator::expect_conversion(*checked, bits);
  cuda_emulator::step_on();
}
CUDA_EMULATOR_CHECK __ubsan_handle_shift_out_of_bounds(const cuda_emulator::CheckedTypes* checked, unsigned long long number,
                                                       unsigned long long amount) {
  if (!cuda_emulator::current) return;
  cuda_emulator::expect_shift(*checked, number, amount);
  cuda_emulator::step_on();
}
CUDA_EMULATOR_CHECK __ubsan_handle_missing_return(const cuda_emulator::CheckSite* site) {
  cuda_emulator::fail({site->file, static_cast<int>(site->line)}, "a function with a result ends without return");
}
CUDA_EMULATOR_CHECK __ubsan_handle_add_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long a, unsigned long long b) {
  cuda_emulator::overflows(*checked, a, "+", b);
}
CUDA_EMULATOR_CHECK __ubsan_handle_sub_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long a, unsigned long long b) {
  cuda_emulator::overflows(*checked, a, "-", b);
}
CUDA_EMULATOR_CHECK __ubsan_handle_mul_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long a, unsigned long long b) {
  cuda_emulator::overflows(*checked, a, "*", b);
}
CUDA_EMULATOR_CHECK __ubsan_handle_negate_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long a) {
  cuda_emulator::overflows(*checked, 0, "-", a);
}
CUDA_EMULATOR_CHECK __ubsan_handle_divrem_overflow(const cuda_emulator::CheckedTypes* checked, unsigned long long a, unsigned long long b) {
  cuda_emulator::overflows(*checked, a, "/", b);
}

extern "C" __attribute__((visibility("default"))) const char* cuda_emulator_printed(unsigned long long* not_printed) {
  *not_printed = cuda_emulator::lines_not_printed;
  return cuda_emulator::printed.c_str();
}

// Called by another thread. Returns 1 if it should look again soon.
extern "C" __attribute__((visibility("default"))) int cuda_emulator_look() {
  using namespace cuda_emulator;
  const std::lock_guard<std::mutex> lock(launching.mutex);
  if (launching.now) pthread_kill(launching.thread, SIGURG);
  return anybody_recognized;
}

extern "C" __attribute__((visibility("default"))) const cuda_emulator::Fault* cuda_emulator_launch(const cuda_emulator::Request* asked) {
  using namespace cuda_emulator;
  request = asked;
  failed = false;
  fault = {};
  gridDim = {asked->grid[0], asked->grid[1], asked->grid[2]};
  blockDim = {asked->block[0], asked->block[1], asked->block[2]};
  fibers.resize(blockDim.x * blockDim.y * blockDim.z);
  for (unsigned i = 0; i < fibers.size(); ++i) {
    fibers[i].number = i;
    fibers[i].stack = {};
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  lay_out_shared();
  printed.clear();
  lines_not_printed = 0;
  anybody_recognized = false;
  updating = false;  // a fault may have come in the midst
  pending.what = Pending::NOTHING;
  place_arrays();
  observe_launch();
#if defined(CUDA_EMULATOR_THREAD)
  hub_fiber = __tsan_get_current_fiber();
#endif
  protect_constants(PROT_NONE);
  if (!failed) execute_launch();
  protect_constants(PROT_READ | PROT_WRITE);
  for (Fiber& fiber : fibers) {
    if (fiber.stack.memory) drop_stack(fiber);
  }
  acquire(&whole_launch);
  give_arrays_back();
  return failed ? &fault : nullptr;
}
