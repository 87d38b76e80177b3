// Part of runtime.cpp, in the build that counts. The compiler puts a call before every access of a
// kernel, as for ThreadSanitizer, but it calls the functions below. They check the access, and
// count it for the instruction that makes it.
//
// Accesses that the lanes of a warp make together have the same instruction and the same number: it
// is the k-th time that a lane executes the instruction since the whole warp last met, at a barrier
// or in an operation of all its lanes.

struct Tally {  // read by Python
  unsigned long long offset;  // of the instruction in its library
  int access, is_shared;
  unsigned long long accesses, bytes;  // by threads
  unsigned long long warp_accesses;
  unsigned long long sectors, least_sectors;
  unsigned long long wavefronts, least_wavefronts;
  unsigned long long collisions, contended;
  unsigned long long uninitialized;
};

struct Totals {  // read by Python
  unsigned long long barriers, warp_syncs, shuffles, votes;
};

struct Instruction {  // with one kind of access that it makes
  const void* pc;
  Access access;
  bool is_shared;
  unsigned bytes, piece;
  Tally tally;
};

struct Together {
  unsigned lanes;
  unsigned long long at[32];
};

struct Visits {  // executions of one instruction by one warp
  unsigned count[32];
  std::vector<Together> together;
};

struct SharedArray {
  const char *begin, *end;
  Named named;
};

// How an access stands to those of other threads. `strong`: volatile, in global memory, where the
// hardware reads and writes it at once and as a whole. In shared memory volatile orders nothing that
// a barrier should order: code that trusts in it is wrong since warps no longer run in step.
enum class Kind : unsigned char { plain, strong, atomic };

struct LastAccess {
  unsigned time;  // 0: none
  unsigned block;
  unsigned offset;  // in the kernel's library
  unsigned short thread;
  Kind kind;
};

struct Watched {  // the last accesses to one byte of memory
  LastAccess write, read, read_by_another;
};

struct Where {  // the target of an access, for a message
  Named named;
  long long offset;
  unsigned bytes;
  bool is_shared;
};

// A plain read of what another thread has updated atomically. If an atomic of the same thread on the
// same place comes next, it was a guess that the atomic confirms.
struct Doubt {
  const char* address;
  Where where;
  LastAccess last;
  const void* pc;
};

constexpr unsigned SECTOR = 32, BANKS = 32, BANK_BYTES = 4;
constexpr size_t MAX_TOGETHER = 4 << 20;

std::vector<Instruction> instructions;
std::vector<int> instruction_table;  // a hash table with numbers of instructions; -1 is empty
std::vector<Visits> visits[32];
std::vector<int> visited[32];
std::vector<SharedArray> shared_arrays;
// One entry for every byte of the arena; entries from before the current block do not count. Most
// of them are never touched, so they cost no memory.
auto* const written_at = static_cast<unsigned*>(calloc(ARENA_BYTES, sizeof(unsigned)));
auto* const shared_watched = static_cast<Watched*>(calloc(ARENA_BYTES, sizeof(Watched)));
std::vector<Watched*> global_watched;  // for every byte of each memory
std::vector<Doubt> doubts;             // of the thread whose turn it is
size_t num_together;
std::unordered_set<unsigned long long> atomics_of_interval;
Totals totals;
std::pair<const char*, const char*> images[2];  // of the kernel and of this file
unsigned now = 1, block_start, last_barrier, last_sync[32][32][32];  // by warp, lane and lane
unsigned block_number;

#include "fences.hpp"

// Events of a launch

int find_image(dl_phdr_info* info, size_t, void*) {
  const char* const inside[] = {reinterpret_cast<const char*>(request->call), reinterpret_cast<const char*>(&request)};
  const char *first = nullptr, *last = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
    if (!first || begin < first) first = begin;
    if (!last || begin + part.p_memsz > last) last = begin + part.p_memsz;
  }
  for (int i = 0; i < 2; ++i) {
    if (inside[i] >= first && inside[i] < last) images[i] = {first, last};
  }
  return 0;
}

void observe_launch() {
  instructions.clear();
  instruction_table.assign(256, -1);
  for (auto& of_warp : visits) of_warp.clear();
  for (auto& of_warp : visited) of_warp.clear();
  shared_arrays.clear();
  if (request->shared) shared_arrays.push_back({dynamic_shared, dynamic_shared + request->shared, {}});
  totals = {};
  num_together = 0;
  for (Watched* watched : global_watched) free(watched);
  global_watched.clear();
  for (const Memory& memory : memories) {
    global_watched.push_back(request->checked ? static_cast<Watched*>(calloc(memory.bytes + 1, sizeof(Watched))) : nullptr);
  }
  forget_fences();
  dl_iterate_phdr(find_image, nullptr);
}

void observe_block() {
  block_number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  atomics_of_interval.clear();
  block_start = last_barrier = ++now;
  forget_fences_of_block();
}

void observe_shared(const char* begin, unsigned bytes, Named named) { shared_arrays.push_back({begin, begin + bytes, named}); }

void tally_together(Instruction& instruction, const Together& group);

void observe_convergence(unsigned warp) {
  for (int number : visited[warp]) {
    Visits& of_instruction = visits[warp][number];
    for (const Together& group : of_instruction.together) tally_together(instructions[number], group);
    num_together -= of_instruction.together.size();
    of_instruction.together.clear();
    memset(of_instruction.count, 0, sizeof of_instruction.count);
  }
  visited[warp].clear();
}

void observe_barrier() {
  ++totals.barriers;
  atomics_of_interval.clear();
  last_barrier = ++now;
  join_fences_of_block();
}

void observe_operation(WarpOperation operation, unsigned warp, unsigned mask) {
  if (operation == WarpOperation::sync) {
    ++totals.warp_syncs;
    ++now;  // it is the only one that orders what the lanes do to memory
    for (unsigned a = 0; a < 32; ++a) {
      for (unsigned b = 0; b < 32; ++b) {
        if (mask >> a & mask >> b & 1) last_sync[warp][a][b] = now;
      }
    }
  } else if (operation == WarpOperation::shuffle || operation == WarpOperation::shuffle_xor || operation == WarpOperation::shuffle_up ||
             operation == WarpOperation::shuffle_down) {
    ++totals.shuffles;
  } else {
    ++totals.votes;
  }
}

// Counts of one access of a warp

void tally_together(Instruction& instruction, const Together& group) {
  unsigned long long at[32];
  unsigned count = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (group.lanes >> lane & 1) at[count++] = group.at[lane];
  }
  Tally& tally = instruction.tally;
  ++tally.warp_accesses;
  if (instruction.is_shared && instruction.access != Access::atomic) {
    // Each of the 32 banks gives one word of 4 bytes at a time. A warp's access of 8 bytes is split
    // into halves, one of 16 bytes into quarters.
    const unsigned lanes_at_once = instruction.bytes <= 4 ? 32 : 128 / instruction.bytes;
    for (unsigned first = 0; first < 32; first += lanes_at_once) {
      unsigned long long words[32];
      unsigned num_words = 0, in_bank[BANKS] = {}, most = 0;
      for (unsigned lane = first; lane < first + lanes_at_once; ++lane) {
        if (!(group.lanes >> lane & 1)) continue;
        for (unsigned byte = 0; byte < instruction.bytes; byte += BANK_BYTES) words[num_words++] = (group.at[lane] + byte) / BANK_BYTES;
      }
      std::sort(words, words + num_words);
      num_words = static_cast<unsigned>(std::unique(words, words + num_words) - words);
      for (unsigned i = 0; i < num_words; ++i) most = std::max(most, ++in_bank[words[i] % BANKS]);
      tally.wavefronts += most;
      tally.least_wavefronts += num_words != 0;
    }
    return;
  }
  std::sort(at, at + count);
  if (instruction.access == Access::atomic) {
    const unsigned distinct = static_cast<unsigned>(std::unique(at, at + count) - at);
    tally.collisions += count - distinct;
    count = distinct;
  }
  if (instruction.is_shared) return;
  unsigned long long next_sector = 0, covered = 0, distinct_bytes = 0;  // addresses are ascending, and none is 0
  for (unsigned i = 0; i < count; ++i) {
    const unsigned long long end = at[i] + instruction.bytes, from = std::max(at[i] / SECTOR, next_sector);
    const unsigned long long to = (end - 1) / SECTOR + 1;
    if (to > from) tally.sectors += to - from, next_sector = to;
    if (end > covered) distinct_bytes += end - std::max(at[i], covered), covered = end;
  }
  tally.least_sectors += (distinct_bytes + SECTOR - 1) / SECTOR;
}

int instruction_number(const void* pc, Access access, bool is_shared, unsigned bytes, unsigned piece) {
  const auto hash = [](const void* pc, unsigned more) { return (reinterpret_cast<uintptr_t>(pc) * 31 + more) * 0x9e3779b97f4a7c15ull >> 32; };
  const unsigned more = static_cast<unsigned>(access) << 20 | unsigned(is_shared) << 19 | bytes << 12 | piece;
  size_t slot = hash(pc, more) & (instruction_table.size() - 1);
  for (; instruction_table[slot] >= 0; slot = (slot + 1) & (instruction_table.size() - 1)) {
    const Instruction& instruction = instructions[instruction_table[slot]];
    if (instruction.pc == pc && instruction.access == access && instruction.is_shared == is_shared && instruction.bytes == bytes &&
        instruction.piece == piece) {
      return instruction_table[slot];
    }
  }
  const int number = static_cast<int>(instructions.size());
  instruction_table[slot] = number;
  instructions.push_back({pc, access, is_shared, bytes, piece, {}});
  instructions.back().tally.access = static_cast<int>(access);
  instructions.back().tally.is_shared = is_shared;
  if (instructions.size() * 2 > instruction_table.size()) {
    instruction_table.assign(instruction_table.size() * 2, -1);
    for (size_t i = 0; i < instructions.size(); ++i) {
      const Instruction& instruction = instructions[i];
      const unsigned its = static_cast<unsigned>(instruction.access) << 20 | unsigned(instruction.is_shared) << 19 |
                           instruction.bytes << 12 | instruction.piece;
      size_t free = hash(instruction.pc, its) & (instruction_table.size() - 1);
      while (instruction_table[free] >= 0) free = (free + 1) & (instruction_table.size() - 1);
      instruction_table[free] = static_cast<int>(i);
    }
  }
  return number;
}

void note(const void* pc, Access access, bool is_shared, unsigned bytes, unsigned piece, unsigned long long at) {
  const unsigned warp = current->number / 32, lane = current->number % 32;
  const int number = instruction_number(pc, access, is_shared, bytes, piece);
  Tally& tally = instructions[number].tally;
  ++tally.accesses;
  tally.bytes += bytes;
  if (access == Access::atomic) tally.contended += !atomics_of_interval.insert(at << 1 | is_shared).second;
  if (visits[warp].size() <= size_t(number)) visits[warp].resize(number + 1);
  Visits& mine = visits[warp][number];
  if (mine.together.empty()) visited[warp].push_back(number);
  const unsigned k = mine.count[lane]++;
  if (mine.together.size() <= k) {
    mine.together.push_back({});
    if (++num_together > MAX_TOGETHER) fail_at(pc, "makes so many accesses without a barrier that their traffic cannot be counted");
  }
  mine.together[k].lanes |= 1u << lane;
  mine.together[k].at[lane] = at;
}

// Checks of an access

bool is_ordered(const LastAccess& last, bool is_shared) {
  if (!last.time || (is_shared && last.time < block_start)) return true;
  if (last.block == block_number) {
    if (last.thread == current->number || last.time < last_barrier) return true;
    if (last.thread / 32u == current->number / 32 && last.time < last_sync[current->number / 32][last.thread % 32][current->number % 32]) return true;
  }
  return is_ordered_by_fences(last);
}

[[noreturn]] void fail_in_race(const LastAccess& last, const char* what, const Where& where, Access access, Kind kind, const void* pc) {
  fault.other_offset = last.offset;  // Python adds its line to the message
  const unsigned block[] = {last.block % gridDim.x, last.block / gridDim.x % gridDim.y, last.block / gridDim.x / gridDim.y};
  const Text entry = entry_text(where.named, where.offset, where.bytes), thread = thread_name(fibers[last.thread]);
  Text beside;
  if (kind != last.kind && (kind == Kind::atomic || last.kind == Kind::atomic)) {
    const bool is_read = access == Access::read || !strcmp(what, "read");
    snprintf(beside.text, sizeof beside.text, " beside %s (%s it %s, or put a barrier between)",
             last.kind == Kind::atomic ? "an atomic" : is_read ? "a plain read" : "a plain write", is_read ? "read" : "write",
             is_read ? "by atomicAdd(p, 0) or as volatile" : "by atomicExch");
    if (last.kind == Kind::atomic) what = "updated";
  }
  fail_at(pc, "%s %s%s, and no barrier orders that after %s of block (%u,%u,%u) %s it", entry.text, verb(access), beside.text, thread.text,
          block[0], block[1], block[2], what);
}

void watch(Watched* watched, const char* address, Where where, Access access, Kind kind, const void* pc) {
  const auto offset = static_cast<unsigned>(static_cast<const char*>(pc) - 1 - images[0].first);
  const LastAccess mine{now, block_number, offset, static_cast<unsigned short>(current->number), kind};
  const auto conflicts = [&](const LastAccess& last) {
    return (kind == Kind::plain || last.kind == Kind::plain) && !is_ordered(last, where.is_shared);
  };
  if (kind == Kind::atomic && !doubts.empty()) {
    doubts.erase(std::remove_if(doubts.begin(), doubts.end(), [&](const Doubt& doubt) { return doubt.address == address; }), doubts.end());
  }
  for (unsigned i = 0; i < where.bytes; ++i) {
    Watched& byte = watched[i];
    if (conflicts(byte.write)) {
      if (access != Access::read || byte.write.kind != Kind::atomic) fail_in_race(byte.write, "wrote", where, access, kind, pc);
      if (doubts.empty() || doubts.back().address != address) doubts.push_back({address, where, byte.write, pc});
    }
    if (access == Access::read) {
      if (byte.read.time && (byte.read.thread != mine.thread || byte.read.block != mine.block)) byte.read_by_another = byte.read;
      byte.read = mine;
    } else {
      const bool guessed = kind == Kind::atomic && byte.read.thread == mine.thread && byte.read.block == mine.block;
      if (!guessed && conflicts(byte.read)) fail_in_race(byte.read, "read", where, access, kind, pc);
      if (conflicts(byte.read_by_another)) fail_in_race(byte.read_by_another, "read", where, access, kind, pc);
      if (guessed) byte.read = {};
      byte.write = mine;
    }
  }
}

// The turn of a thread ends, at a barrier, in an operation of its warp, or with the thread.
void observe_end_of_turn() {
  if (doubts.empty()) return;
  const Doubt first = doubts.front();
  doubts.clear();
  fail_in_race(first.last, "wrote", first.where, Access::read, Kind::plain, first.pc);
}

void access_shared(const char* address, unsigned bytes, Access access, Kind kind, const void* pc) {
  const SharedArray* array = nullptr;
  const SharedArray* nearest = nullptr;
  if (request->shared) shared_arrays[0].named = dynamic_declared;
  for (const SharedArray& candidate : shared_arrays) {
    if (address >= candidate.begin && address + bytes <= candidate.end) array = &candidate;
    if (!nearest || candidate.begin <= address) nearest = &candidate;
  }
  if (!nearest) fail_at(pc, "shared memory is %s, but the launch gives it none and the kernel has not declared any", verb(access));
  const Where where{nearest->named, address - nearest->begin, bytes, true};
  if (!array) {
    fail_at(pc, "%s %s, %s", entry_text(where.named, where.offset, bytes).text, verb(access),
            extent_text(where.named, static_cast<unsigned long long>(nearest->end - nearest->begin)).text);
  }
  unsigned* written = &written_at[address - arena];
  bool all_written = true;
  for (unsigned i = 0; i < bytes; ++i) {
    all_written = all_written && written[i] >= block_start;
    if (access != Access::read) written[i] = now;
  }
  if (access != Access::write && !all_written) {
    if (request->checked & UNINITIALIZED) {
      fail_at(pc, "%s %s, shared memory that no thread of the block has written so far", entry_text(where.named, where.offset, bytes).text,
              verb(access));
    }
    if (request->counted) ++instructions[instruction_number(pc, access, true, bytes, 0)].tally.uninitialized;
  }
  if (request->checked & RACES) watch(&shared_watched[address - arena], address, where, access, kind, pc);
}

}  // namespace

// `whole`: the compiler knows that the address is a multiple of the size, so a GPU moves it in one
// piece.
void about_to_access(const void* where, unsigned bytes, Access access, const void* pc, bool whole, bool is_volatile) {
  if (!current) return;  // not in a kernel
  if (request->stop) fail_at(pc, "was stopped");
  const char* address = static_cast<const char*>(where);
  const char* stack = current->stack.memory;  // local memory, or a register; its guards speak for themselves
  if (address >= stack - STACK_GUARD && address < stack + STACK_BYTES + STACK_GUARD) return;
  Kind kind = access == Access::atomic ? Kind::atomic : Kind::plain;
  if (const Constant* constant = unset_constant(address)) fail_at(pc, "%s", describe_unset(*constant, address).text);
  for (const auto& image : images) {
    if (address >= image.first && address < image.second) return;  // variables and constants
  }
  unsigned long long at = 0;  // every array begins at a multiple of a sector, as on a GPU
  const bool is_shared = address >= arena && address < arena + ARENA_BYTES;
  if (is_shared) {
    access_shared(address, bytes, access, kind, pc);
    at = static_cast<unsigned long long>(address - arena);
  } else {
    if (is_volatile) kind = Kind::strong;
    for (int i = 0; i < request->num_ranges && !at; ++i) {
      const Range& range = request->ranges[i];
      if (address < range.begin || address + bytes > range.end) continue;
      at = (i + 1ull) << 48 | (range.offset + static_cast<unsigned long long>(address - range.begin));
      if (!(request->checked & RACES)) continue;
      Watched* watched = global_watched[range.memory] + (address - memories[range.memory].begin);
      watch(watched, address, {{range.name, range.element, {}}, address - range.begin, bytes, false}, access, kind, pc);
    }
    if (!at) fail_at(pc, "%s", describe_address(address, bytes, verb(access)).text);
  }
  if (kind != Kind::plain && request->checked & RACES) {
    if (access != Access::read) publish(address);
    if (access != Access::write) observe_published(address);
  }
  if (whole && at % bytes) fail_at(pc, "%u bytes are %s at an address that is no multiple of %u", bytes, verb(access), bytes);
  if (!request->counted) return;
  if (whole) {
    note(pc, access, is_shared, bytes, 0, at);
  } else {
    const unsigned piece = at % 4 || bytes % 4 ? 1 : 4;
    for (unsigned done = 0; done < bytes; done += piece) note(pc, access, is_shared, piece, done / piece, at + done);
  }
}

// The functions that the compiler calls.

#define CUDA_EMULATOR_HOOK __attribute__((visibility("default"))) void
#define CUDA_EMULATOR_HOOKS(bytes)                                                                                                       \
  CUDA_EMULATOR_HOOK __tsan_read##bytes(void* p) { about_to_access(p, bytes, Access::read, __builtin_return_address(0), true); }         \
  CUDA_EMULATOR_HOOK __tsan_write##bytes(void* p) { about_to_access(p, bytes, Access::write, __builtin_return_address(0), true); }       \
  CUDA_EMULATOR_HOOK __tsan_volatile_read##bytes(void* p) { about_to_access(p, bytes, Access::read, __builtin_return_address(0), true, true); } \
  CUDA_EMULATOR_HOOK __tsan_volatile_write##bytes(void* p) { about_to_access(p, bytes, Access::write, __builtin_return_address(0), true, true); } \
  CUDA_EMULATOR_HOOK __tsan_unaligned_read##bytes(void* p) { about_to_access(p, bytes, Access::read, __builtin_return_address(0), false); } \
  CUDA_EMULATOR_HOOK __tsan_unaligned_write##bytes(void* p) { about_to_access(p, bytes, Access::write, __builtin_return_address(0), false); }
extern "C" {
CUDA_EMULATOR_HOOKS(1)
CUDA_EMULATOR_HOOKS(2)
CUDA_EMULATOR_HOOKS(4)
CUDA_EMULATOR_HOOKS(8)
CUDA_EMULATOR_HOOKS(16)
CUDA_EMULATOR_HOOK __tsan_read_range(void* p, size_t bytes) {
  about_to_access(p, unsigned(bytes), Access::read, __builtin_return_address(0), false);
}
CUDA_EMULATOR_HOOK __tsan_write_range(void* p, size_t bytes) {
  about_to_access(p, unsigned(bytes), Access::write, __builtin_return_address(0), false);
}
CUDA_EMULATOR_HOOK __tsan_init() {}
CUDA_EMULATOR_HOOK __tsan_func_entry(void*) {}
CUDA_EMULATOR_HOOK __tsan_func_exit() {}

// The counts of the last launch.
__attribute__((visibility("default"))) const Tally* cuda_emulator_tallies(int* count, const Totals** of_launch) {
  static std::vector<Tally> tallies;
  tallies.clear();
  for (Instruction& instruction : instructions) {
    instruction.tally.offset = static_cast<unsigned long long>(static_cast<const char*>(instruction.pc) - images[0].first);
    tallies.push_back(instruction.tally);
  }
  *count = static_cast<int>(tallies.size());
  *of_launch = &totals;
  return tallies.data();
}
}

namespace {
