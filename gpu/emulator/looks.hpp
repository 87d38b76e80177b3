// Part of runtime.cpp: looks at a launch that takes long. Python asks for one a few times a second,
// by a signal to the thread that runs the kernel. A look ends the launch if Python wants that. And it
// finds out whether the thread whose turn it is goes round and round: then it takes the turn away,
// since the thread may wait for another one.

bool is_stepping();

struct Launching {
  std::mutex mutex;
  pthread_t thread;
  bool now = false;
} launching;

const void* program_counter(void* context) {
#if defined(__x86_64__) && defined(__linux__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__) && defined(__linux__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#elif defined(__x86_64__) && defined(__APPLE__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext->__ss.__rip);
#elif defined(__aarch64__) && defined(__APPLE__)
  return reinterpret_cast<void*>(__darwin_arm_thread_state64_get_pc(static_cast<ucontext_t*>(context)->uc_mcontext->__ss));
#else
  return (void)context, nullptr;
#endif
}

// Only in the kernel's own code can a turn be taken away: elsewhere a lock may be held.
bool in_kernel(const void* pc) {
  Dl_info here, kernel;
  return pc && dladdr(pc, &here) && dladdr(reinterpret_cast<void*>(request->call), &kernel) && here.dli_fbase == kernel.dli_fbase;
}

unsigned long long mixed(unsigned long long sum, const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  for (; bytes >= 8; at += 8, bytes -= 8) {
    unsigned long long word;
    memcpy(&word, at, 8);
    sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
    sum ^= sum >> 29;
  }
  for (; bytes; ++at, --bytes) sum = (sum ^ static_cast<unsigned char>(*at)) * 0x9e3779b97f4a7c15ull;
  return sum;
}

#if defined(__x86_64__) && defined(__linux__)
int add_variables(dl_phdr_info* info, size_t, void* sum) {
  const auto call = reinterpret_cast<uintptr_t>(request->call);
  bool is_kernel = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    is_kernel = is_kernel || (info->dlpi_phdr[i].p_type == PT_LOAD && call - begin < info->dlpi_phdr[i].p_memsz);
  }
  for (int i = 0; is_kernel && i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD || !(part.p_flags & PF_W)) continue;
    auto& all = *static_cast<unsigned long long*>(sum);
    all = mixed(all, reinterpret_cast<const void*>(info->dlpi_addr + part.p_vaddr), part.p_memsz);
  }
  return 0;
}

// Functions that call none use these bytes, too. In the build that counts all call some that leave
// there what they will.
#if defined(CUDA_EMULATOR_COUNTED)
constexpr int RED_ZONE_OF_STACK = 0;
#else
constexpr int RED_ZONE_OF_STACK = 128;
#endif

// The registers of a thread, and what it has on its stack. If both come again, so will all that
// follows, unless memory changes.
unsigned long long state_of(const Fiber& fiber, void* context) {
  const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  unsigned long long sum = mixed(1, machine.gregs, (REG_RIP + 1) * sizeof *machine.gregs);
  sum = mixed(sum, machine.fpregs->_xmm, sizeof machine.fpregs->_xmm);
  const char* top = reinterpret_cast<const char*>(machine.gregs[REG_RSP]) - RED_ZONE_OF_STACK;
  return mixed(sum, top, static_cast<size_t>(fiber.stack.memory + STACK_BYTES - top)) | 1;
}
#else
unsigned long long state_of(const Fiber&, void*) { return 0; }
#endif

// Of all that a kernel can change.
unsigned long long checksum_of_memory() {
  unsigned long long sum = mixed(1, arena, static_cast<size_t>(next_free - arena));
  for (const Memory& memory : memories) sum = mixed(sum, memory.begin, memory.bytes);
#if defined(__x86_64__) && defined(__linux__)
  protect_constants(PROT_READ | PROT_WRITE);
  dl_iterate_phdr(add_variables, &sum);
  protect_constants(PROT_NONE);
#endif
  return sum | 1;
}

constexpr unsigned STATES = 16;    // a loop of more instructions than that is met again at some of them
constexpr unsigned MET_AGAIN = 8;  // looks in a row that find a state that was there before; half when one thread was found out
struct Seen {
  unsigned turn, count, again;
  unsigned long long states[STATES];
} seen;
bool anybody_recognized;

// Whether the thread has been in this very state before, look after look.
bool goes_round(Fiber& fiber, void* context) {
  const unsigned long long state = state_of(fiber, context);
  if (!state) return false;
  if (seen.turn != number_of_turn) seen = {number_of_turn, 0, 0, {}};
  if (std::find(seen.states, seen.states + std::min(seen.count, STATES), state) == seen.states + std::min(seen.count, STATES)) {
    seen.states[seen.count++ % STATES] = state;
    seen.again = 0;
    return false;
  }
  return ++seen.again >= (anybody_recognized ? MET_AGAIN / 2 : MET_AGAIN);
}

void on_look(int, siginfo_t*, void* context) {
  if (!launching.now || !pthread_equal(pthread_self(), launching.thread) || !current || updating || is_stepping()) return;
  const void* pc = program_counter(context);
  if (!in_kernel(pc)) return;  // the next look may find it there
  Fiber& me = *current;
  if (request->stop) {
    report(&me, {nullptr, 0}, "was stopped");
    locate(pc);
    for (;;) to_hub();
  }
  if (!goes_round(me, context)) return;
  anybody_recognized = true;
  me.spins_at = pc;
  times_given_way += PATIENCE;
  give_way();
}

void report_endless(const Fiber& fiber) {
  const unsigned long long blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
  report(&fiber, {nullptr, 0}, "never ends: the thread goes round and round, and no thread of its block can go on%s",
         blocks > 1 ? " (here blocks run one after another, so none can wait for a later one)" : "");
  locate(fiber.spins_at);
}
