// Part of runtime.cpp: what C++ leaves open. The compiler puts a check before every index of an array
// of known size, every conversion of a float to an integer and every shift. The checks call the
// functions below. An index outside its array is a fault. Conversions and shifts get the result that
// PTX defines: the thread goes on step by step up to the instruction that would compute it, and is
// given that result in place of the instruction's.

struct TypeDescriptor {  // the compiler's
  unsigned short kind, info;  // integers: 0, twice the logarithm of the bits and whether it is signed; floats: 1, the bits
  char name[1];               // in quotes
  unsigned bits() const { return kind == 0 ? 1u << (info >> 1) : info; }
  bool is_signed() const { return info & 1; }
};
struct CheckSite {  // the compiler's
  const char* file;
  unsigned line, column;
};
struct CheckedTypes {
  CheckSite site;
  const TypeDescriptor *first, *second;
};

// Python finds the array's name at the column, the end of an index.
[[noreturn]] void fail_at_index(const CheckedTypes& checked, long long index) {
  fault.column = static_cast<int>(checked.site.column);
  fail({checked.site.file, static_cast<int>(checked.site.line)}, "index %lld in an array of type %s", index, checked.first->name);
}

long long as_signed(const TypeDescriptor& type, unsigned long long value) {
  const unsigned unused = 64 - std::min(type.bits(), 64u);
  return type.is_signed() ? static_cast<long long>(value << unused) >> unused : static_cast<long long>(value << unused >> unused);
}

// `cvt.rzi` of PTX: the nearest number that the type has. 8 bits are the low ones of 16.
unsigned long long converted(double value, bool is_double, const TypeDescriptor& to) {
  const unsigned bits = std::max(to.bits(), 16u);
  const unsigned long long top = 1ull << (bits - 1);
  if (value != value) return is_double || bits == 64 ? top : 0;
  const double end = to.is_signed() ? __builtin_ldexp(1, bits - 1) : __builtin_ldexp(1, bits);
  if (value >= end) return to.is_signed() ? top - 1 : top - 1 + top;
  if (to.is_signed()) return value < -end ? 0 - top : static_cast<unsigned long long>(static_cast<long long>(value));
  return value <= 0 ? 0 : static_cast<unsigned long long>(value);
}

struct Pending {
  enum What { NOTHING, CONVERSION, SHIFT } what;
  unsigned bits;                          // of the number that is shifted, or of the float
  unsigned long long operand, amount, result;  // the result of a shift is left to the direction of its instruction
  Site site;
  const char* type;
  bool is_signed;
  bool in_halves;  // from 2**63 on, 64 unsigned bits are made of the upper half, less 2**63, which is then put in its place
  unsigned long long upper_half;
  unsigned steps;
  bool operator==(const Pending& other) const {
    return what == other.what && bits == other.bits && operand == other.operand && amount == other.amount && type == other.type;
  }
} pending, last_given;

bool is_stepping() { return pending.what != Pending::NOTHING; }

[[noreturn]] void fail_undefined() {
  const Pending was = pending;
  pending.what = Pending::NOTHING;
  if (was.what == Pending::SHIFT) fail(was.site, "a shift of %s by %lld: C++ leaves the result open", was.type, static_cast<long long>(was.amount));
  fail(was.site, "a conversion to %s of a number that it cannot hold: C++ leaves the result open", was.type);
}

#if defined(__x86_64__) && defined(__linux__)

greg_t& register_of(mcontext_t& machine, unsigned number) {
  static const int at[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return machine.gregs[at[number]];
}

struct Decoded {
  bool is_float, is_double, is_wide;  // by its prefixes: F3, F2, REX.W
  unsigned code, reg, length;
  bool in_memory;
  unsigned number;   // of the register that is its other operand
  char* address;     // of that operand, in memory
};

// The instructions of interest have a mandatory prefix, REX, one or two bytes of code, and ModRM.
Decoded decode(const unsigned char* pc, mcontext_t& machine) {
  Decoded made{};
  const unsigned char* at = pc;
  if (*at == 0xf3 || *at == 0xf2) made.is_float = *at == 0xf3, made.is_double = *at == 0xf2, ++at;
  const unsigned rex = *at >> 4 == 4 ? *at++ : 0;
  made.is_wide = rex & 8;
  made.code = *at++;
  if (made.code == 0x0f) made.code = 0x0f00 | *at++;
  const unsigned mod = *at >> 6, rm = *at & 7;
  made.reg = (*at++ >> 3 & 7) | (rex & 4) << 1;
  made.in_memory = mod != 3;
  made.number = rm | (rex & 1) << 3;
  if (made.in_memory) {
    unsigned long long address = 0;
    bool from_next = false, has_base = true;
    unsigned base = made.number;
    if (rm == 4) {
      const unsigned sib = *at++, index = (sib >> 3 & 7) | (rex & 2) << 2;
      base = (sib & 7) | (rex & 1) << 3;
      has_base = mod || (sib & 7) != 5;
      if (index != 4) address += static_cast<unsigned long long>(register_of(machine, index)) << (sib >> 6);
    } else if (mod == 0 && rm == 5) {
      from_next = true, has_base = false;
    }
    if (has_base) address += static_cast<unsigned long long>(register_of(machine, base));
    int offset = 0;
    if (mod == 1) offset = static_cast<signed char>(*at++);
    if (mod == 2 || !has_base) memcpy(&offset, at, 4), at += 4;
    address += offset;
    if (from_next) address += reinterpret_cast<uintptr_t>(at);
    made.address = reinterpret_cast<char*>(address);
  }
  made.length = static_cast<unsigned>(at - pc);
  return made;
}

// Gives the result in place of the next instruction, if that is the one that would compute it.
bool give_result(mcontext_t& machine) {
  const Decoded next = decode(reinterpret_cast<const unsigned char*>(machine.gregs[REG_RIP]), machine);
  if (pending.what == Pending::CONVERSION) {
    if (next.code != 0x0f2c || !(pending.bits == 64 ? next.is_double : next.is_float)) return false;  // cvttsd2si, cvttss2si
    unsigned long long operand = 0;
    memcpy(&operand, next.in_memory ? next.address : reinterpret_cast<const char*>(&machine.fpregs->_xmm[next.number]), pending.bits / 8);
    if (operand != (pending.in_halves ? pending.upper_half : pending.operand)) return false;
    const unsigned long long result = pending.in_halves ? pending.result ^ 1ull << 63 : pending.result;
    register_of(machine, next.reg) = static_cast<greg_t>(next.is_wide ? result : result & 0xffffffffu);
  } else if (next.code == 0xd3 && (next.reg % 8 >= 4 && next.reg % 8 != 6)) {  // shl, shr, sar by cl
    const unsigned bytes = next.is_wide ? 8 : 4;
    if (bytes * 8 != pending.bits || ((machine.gregs[REG_RCX] ^ pending.amount) & 0xff)) return false;
    char* target = next.in_memory ? next.address : reinterpret_cast<char*>(&register_of(machine, next.number));
    unsigned long long operand = 0;
    memcpy(&operand, target, bytes);
    if (operand != pending.operand) return false;
    const bool fills = next.reg % 8 == 7 && operand >> (pending.bits - 1);  // sar keeps the sign
    const unsigned long long result = fills ? bytes == 8 ? ~0ull : 0xffffffffu : 0;
    if (next.in_memory) memcpy(target, &result, bytes);
    else register_of(machine, next.number) = static_cast<greg_t>(result);
  } else if (next.code == 0x0fa3) {  // bt, for a shift of which one bit is wanted; only sar makes it 1
    if ((register_of(machine, next.reg) ^ pending.amount) & 0xffffffffu) return false;
    machine.gregs[REG_EFL] = (machine.gregs[REG_EFL] & ~1ll) | (pending.is_signed && pending.operand >> (pending.bits - 1));
  } else {
    return false;
  }
  machine.gregs[REG_RIP] += next.length;
  return true;
}

constexpr unsigned MAX_STEPS = 300;

void on_signal(int number, siginfo_t* info, void* context);

void on_step(int number, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), launching.thread)) return on_signal(number, info, context);  // not a step of ours
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  constexpr greg_t STEP = 0x100;
  if (pending.what == Pending::NOTHING || !current) {
    machine.gregs[REG_EFL] &= ~STEP;
    return;
  }
  if (!in_kernel(program_counter(context))) return;
  if (give_result(machine)) {
    last_given = pending;
  } else if (++pending.steps < MAX_STEPS) {
    return;
  } else if (!(pending == last_given)) {  // unless the compiler takes the result that it had before
    fail_undefined();
  }
  pending.what = Pending::NOTHING;
  machine.gregs[REG_EFL] &= ~STEP;
}

inline __attribute__((always_inline)) void step_on() {
  __asm__ volatile("lea -128(%%rsp), %%rsp; pushfq; orq $0x100, (%%rsp); popfq; lea 128(%%rsp), %%rsp" ::: "cc", "memory");
}
#elif defined(__aarch64__)
// Its conversions are those of PTX.
void step_on() {
  if (pending.what == Pending::SHIFT) fail_undefined();
  pending.what = Pending::NOTHING;
}
#else
void step_on() { fail_undefined(); }
#endif

void expect_conversion(const CheckedTypes& checked, unsigned long long bits) {
  const TypeDescriptor &from = *checked.first, &to = *checked.second;
  double value;
  if (from.bits() == 64) {
    memcpy(&value, &bits, 8);
  } else {
    float narrow;
    memcpy(&narrow, &bits, 4);
    value = narrow;
    bits &= 0xffffffffu;
  }
  unsigned long long upper_half = 0;
  const double beyond = value - 0x1p63;
  const float narrow_beyond = static_cast<float>(beyond);
  if (from.bits() == 64) memcpy(&upper_half, &beyond, 8);
  else memcpy(&upper_half, &narrow_beyond, 4);
  const bool in_halves = !to.is_signed() && to.bits() == 64 && value >= 0x1p63;
  const Site site{checked.site.file, static_cast<int>(checked.site.line)};
  pending = {Pending::CONVERSION, from.bits(), bits, 0, converted(value, from.bits() == 64, to), site, to.name, to.is_signed(), in_halves, upper_half, 0};
}

void expect_shift(const CheckedTypes& checked, unsigned long long operand, unsigned long long amount) {
  const TypeDescriptor& type = *checked.first;
  const unsigned bits = std::max(type.bits(), 32u);
  if (bits == 32) operand &= 0xffffffffu;
  const Site site{checked.site.file, static_cast<int>(checked.site.line)};
  pending = {Pending::SHIFT, bits, operand, static_cast<unsigned long long>(as_signed(*checked.second, amount)), 0, site, type.name, type.is_signed(), false, 0, 0};
}

void overflows(const CheckedTypes& checked, unsigned long long a, const char* operation, unsigned long long b) {
  if (!current || !request->checked) return;
  const TypeDescriptor& type = *checked.first;
  fail({checked.site.file, static_cast<int>(checked.site.line)}, "%lld %s %lld overflows %s", as_signed(type, a), operation, as_signed(type, b),
       type.name);
}
