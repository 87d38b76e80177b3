// Part of runtime.cpp, in the build that counts: what fences order. A thread that has passed a fence
// and then writes an atomic, or a volatile in global memory, publishes all that it knew at the fence
// to have been done before. Whoever reads that place, in the same way, and then passes a fence or a
// barrier, knows it too.

// For a thread, or for all threads of a block: the time before which what they did is known.
typedef std::unordered_map<unsigned long long, unsigned> Known;
constexpr unsigned ALL_THREADS = 2047;
unsigned long long key_of(unsigned block, unsigned thread) { return static_cast<unsigned long long>(block) << 11 | thread; }

void add(Known& to, const Known& more) {
  for (const auto& [key, time] : more) to[key] = std::max(to[key], time);
}

struct Fences {  // of a thread, or of all threads of the block, as their last barrier left it
  Known known;           // in force
  Known found;           // read from a published place; in force from the next fence on
  Known fenced[2];       // by scope: to be published with the next atomic
};
std::vector<Fences> of_threads;
Fences of_block;
std::unordered_map<const char*, Known> published[2];  // by scope and place

void forget_fences_of_block() {
  of_threads.assign(fibers.size(), {});
  of_block = {};
  for (auto& of_scope : published) {
    for (auto at = of_scope.begin(); at != of_scope.end();) {
      at = at->first >= arena && at->first < arena + ARENA_BYTES ? of_scope.erase(at) : std::next(at);
    }
  }
}

void forget_fences() {
  for (auto& of_scope : published) of_scope.clear();
}

void join_fences_of_block() {
  for (Fences& of_thread : of_threads) {
    add(of_block.known, of_thread.known);
    add(of_block.known, of_thread.found);
    for (int scope = 0; scope < 2; ++scope) add(of_block.fenced[scope], of_thread.fenced[scope]);
    of_thread = {};
  }
}

bool is_ordered_by_fences(const LastAccess& last) {
  for (const Known* known : {&of_threads[current->number].known, &of_block.known}) {
    for (unsigned thread : {unsigned(last.thread), ALL_THREADS}) {
      const auto found = known->find(key_of(last.block, thread));
      if (found != known->end() && last.time < found->second) return true;
    }
  }
  return false;
}

void pass_fence(Scope scope) {
  Fences& mine = of_threads[current->number];
  add(mine.known, mine.found);
  mine.found.clear();
  ++now;
  for (int s = 0; s <= static_cast<int>(scope); ++s) {  // a fence for the device is one for the block, too
    mine.fenced[s] = mine.known;
    add(mine.fenced[s], of_block.known);
    mine.fenced[s][key_of(block_number, current->number)] = now;
    mine.fenced[s][key_of(block_number, ALL_THREADS)] = last_barrier;
  }
}

void publish(const char* place) {
  for (int scope = 0; scope < 2; ++scope) {
    for (const Fences* fences : {&of_threads[current->number], &of_block}) {
      if (!fences->fenced[scope].empty()) add(published[scope][place], fences->fenced[scope]);
    }
  }
}

void observe_published(const char* place) {
  for (int scope = 0; scope < 2; ++scope) {
    const auto found = published[scope].find(place);
    if (found == published[scope].end()) continue;
    for (const auto& [key, time] : found->second) {
      if (scope == static_cast<int>(Scope::block) && key >> 11 != block_number) continue;
      unsigned& mine = of_threads[current->number].found[key];
      mine = std::max(mine, time);
    }
  }
}
