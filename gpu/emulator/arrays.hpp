// Part of runtime.cpp: the arrays of a launch stand in pages of the emulator's own. An array ends
// where its last page does, up to the 16 bytes to which a GPU aligns it, and between two arrays lies
// more of nothing than an index of 32 bits can cross. So a stray access meets a page that is not
// there, and Python's own memory stays whole: results are copied to it when the launch ended well.

// Messages name entries, not bytes: "As[16][0]", of an array of 16 x 17. An access of several
// entries is "x[4..7]".
Text entry_text(const Named& named, long long offset, unsigned bytes) {
  Text made;
  const long long element = named.element ? named.element : 1;
  const auto entry_at = [element](long long at) { return at / element - (at % element < 0); };
  const long long first = entry_at(offset), last = entry_at(offset + bytes - 1), rest = offset - first * element;
  long long index = first;
  int used = snprintf(made.text, sizeof made.text, "%s", named.name);
  unsigned dims = 0;
  while (dims < 4 && named.extents[dims]) ++dims;
  for (unsigned d = 0; d + 1 < dims && used < int(sizeof made.text); ++d) {
    long long inner = 1;
    for (unsigned e = d + 1; e < dims; ++e) inner *= named.extents[e];
    const long long at = index / inner - (index % inner < 0);
    index -= at * inner;
    used += snprintf(made.text + used, sizeof made.text - used, "[%lld]", at);
  }
  if (used >= int(sizeof made.text)) return made;
  used += snprintf(made.text + used, sizeof made.text - used, last > first && dims < 2 ? "[%lld..%lld]" : "[%lld]", index, last);
  if (rest && used < int(sizeof made.text)) snprintf(made.text + used, sizeof made.text - used, " from byte %lld of it on", rest);
  return made;
}

// "x has 1000 entries", "As is 16 x 17"
Text extent_text(const Named& named, unsigned long long bytes) {
  Text made;
  const unsigned long long entries = bytes / (named.element ? named.element : 1);
  if (!named.extents[0] || !named.extents[1]) {
    snprintf(made.text, sizeof made.text, "%s has %llu entr%s", named.name, entries, entries == 1 ? "y" : "ies");
    return made;
  }
  int used = snprintf(made.text, sizeof made.text, "%s is ", named.name);
  for (unsigned d = 0; d < 4 && named.extents[d] && used < int(sizeof made.text); ++d) {
    used += snprintf(made.text + used, sizeof made.text - used, d ? " x %u" : "%u", named.extents[d]);
  }
  return made;
}

const char* verb(Access access) { return access == Access::read ? "read" : access == Access::write ? "written" : "updated"; }

// The array that is nearest to an address outside every array.
const Range* nearest_to(const char* address) {
  const Range* nearest = nullptr;
  unsigned long long least = GUARD_BYTES / 2 + 1;
  for (int i = 0; i < request->num_ranges; ++i) {
    const Range& range = request->ranges[i];
    const unsigned long long distance = address >= range.end ? address - range.end : address < range.begin ? range.begin - address : 0;
    if (distance < least) least = distance, nearest = &range;
  }
  return nearest;
}

// "x[1000] read, x has 1000 entries"
Text describe_address(const char* address, unsigned bytes, const char* done) {
  Text made;
  const Range* nearest = nearest_to(address);
  if (address < reinterpret_cast<char*>(PAGE)) {
    snprintf(made.text, sizeof made.text, "memory is %s through a null pointer", done);
  } else if (!nearest) {
    snprintf(made.text, sizeof made.text, "memory is %s at %p, far from every array", done, static_cast<const void*>(address));
  } else {
    const Named named{nearest->name, nearest->element, {}};
    const unsigned long long has = nearest->end - nearest->begin;
    snprintf(made.text, sizeof made.text, "%.140s %s, %.140s", entry_text(named, address - nearest->begin, bytes).text, done,
             extent_text(named, has).text);
    // An unsigned index that a subtraction took below 0.
    const long long below = (address - nearest->begin) / std::max(1u, nearest->element) - (1ll << 32);
    if (below < 0 && below > -(1ll << 31) && address > nearest->end) {
      const size_t used = strlen(made.text);
      snprintf(made.text + used, sizeof made.text - used, " (the index is %lld, as an unsigned number)", below);
    }
  }
  return made;
}

struct Memory {  // arrays of a launch that overlap
  char *host, *begin;
  size_t bytes;
  bool read_only;
  int range;  // one of its arrays
};
std::vector<Memory> memories;
char* reserved;
size_t reserved_bytes;

constexpr unsigned ALIGNMENT = 16;  // of the widest access that the hardware here insists on

// What stands beside an array in its pages: NaN as floats, and another one for each array.
char rest_of(const Memory& memory, const char* at) {
  const unsigned word = 0xffffa500u + static_cast<unsigned>(&memory - memories.data()) % 256;
  return static_cast<char>(word >> 8 * (reinterpret_cast<uintptr_t>(at) % 4));
}
void fill_rest(const Memory& memory, char* from, char* to) {
  for (char* at = from; at < to; ++at) *at = rest_of(memory, at);
}

size_t in_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

void find_memories() {
  memories.clear();
  std::vector<int> by_address;
  for (int i = 0; i < request->num_ranges; ++i) by_address.push_back(i);
  std::sort(by_address.begin(), by_address.end(), [](int a, int b) { return request->ranges[a].host < request->ranges[b].host; });
  for (int i : by_address) {
    const Range& range = request->ranges[i];
    if (!memories.empty() && range.host < memories.back().host + memories.back().bytes) {
      Memory& last = memories.back();
      last.bytes = std::max<size_t>(last.bytes, range.host + range.bytes - last.host);
      last.read_only = last.read_only && range.read_only;
    } else {
      memories.push_back({range.host, range.host, range.bytes, range.read_only != 0, i});
    }
  }
}

#if defined(CUDA_EMULATOR_ADDRESS) || defined(CUDA_EMULATOR_THREAD)
constexpr bool IN_PAGES = false;  // a sanitizer watches Python's own memory
#else
constexpr bool IN_PAGES = true;
#endif

void place_arrays() {
  find_memories();
  if (IN_PAGES && !memories.empty()) {
    for (size_t guard = GUARD_BYTES;; guard /= 4) {  // less of nothing where the process may have no more addresses
      reserved_bytes = guard;
      for (const Memory& memory : memories) reserved_bytes += in_pages(memory.bytes + ALIGNMENT) + guard;
      void* made = mmap(nullptr, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (made == MAP_FAILED && guard > PAGE) continue;
      if (made == MAP_FAILED) {
        reserved = nullptr;
        return report(nullptr, {nullptr, 0}, "invalid launch: there is no memory for its arrays");
      }
      reserved = static_cast<char*>(made);
      char* next = reserved + guard;
      for (Memory& memory : memories) {
        const size_t pages = in_pages(memory.bytes + ALIGNMENT);
        mprotect(next, pages, PROT_READ | PROT_WRITE);
        const Range& first = request->ranges[memory.range];
        memory.begin = next + (pages - memory.bytes) / ALIGNMENT * ALIGNMENT + first.offset % ALIGNMENT;
        if (memory.begin + memory.bytes > next + pages) memory.begin -= ALIGNMENT;
        fill_rest(memory, next, memory.begin);
        memcpy(memory.begin, memory.host, memory.bytes);
        fill_rest(memory, memory.begin + memory.bytes, next + pages);
        next += pages + guard;
      }
      break;
    }
  }
  for (int i = 0; i < request->num_ranges; ++i) {
    Range& range = request->ranges[i];
    for (size_t m = 0; m < memories.size(); ++m) {
      if (range.host < memories[m].host || range.host + range.bytes > memories[m].host + memories[m].bytes) continue;
      range.memory = static_cast<int>(m);
      range.begin = memories[m].begin + (range.host - memories[m].host);
      range.end = range.begin + range.bytes;
      break;
    }
    *range.argument = range.begin;
  }
}

// Whether accesses nearer to the array may have gone before, into the rest of its pages.
bool has_rest(const char* address) {
  const Range* nearest = nearest_to(address);
  return nearest && (address < nearest->begin || reinterpret_cast<uintptr_t>(nearest->end) % PAGE);
}

// What a kernel has written beside an array, in the rest of its pages, shows when the launch ends.
void check_rest_of_pages() {
  for (const Memory& memory : memories) {
    const size_t pages = in_pages(memory.bytes + ALIGNMENT);
    const char* end = reinterpret_cast<char*>(in_pages(reinterpret_cast<uintptr_t>(memory.begin + memory.bytes)));
    for (const char* at = end - pages; at < end; ++at) {
      if (at == memory.begin) at += memory.bytes;
      if (at >= end || *at == rest_of(memory, at)) continue;
      report(nullptr, {nullptr, 0}, "%s", describe_address(at, 1, "written").text);
      fault.is_vague = 1;
      return;
    }
  }
}

void give_arrays_back() {
  if (!IN_PAGES || !reserved) return;
  if (!failed) check_rest_of_pages();
  for (const Memory& memory : memories) {
    if (failed || request->rehearsed || !memcmp(memory.host, memory.begin, memory.bytes)) continue;
    if (memory.read_only) {
      report(nullptr, {nullptr, 0}, "%s was written, but the array that was passed is read-only", request->ranges[memory.range].name);
    } else {
      memcpy(memory.host, memory.begin, memory.bytes);
    }
  }
  munmap(reserved, reserved_bytes);
  reserved = nullptr;
}
