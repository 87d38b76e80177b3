// The interface between a compiled kernel and the emulator's runtime. It includes no standard
// header, so that a kernel compiles in an instant.
#pragma once

#pragma GCC visibility push(default)
namespace cuda_emulator {

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

// The source line of a call. As a default argument it is that of the caller. Two barriers of one
// line differ in `place`.
struct Site { const char* file; int line; int place = 0; };

// One array of static shared memory. The first thread of a launch that reaches its declaration
// allocates its address.
struct Slot { unsigned long long launch; char* address; };

// What messages say about an array: the bytes of an entry, and how many entries each dim has; a 0
// ends the dims.
struct Named { const char* name; unsigned element; unsigned extents[4]; };

enum class WarpOperation : int { sync, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, any, all, match_any };
enum class Barrier : int { plain, any, all, count };
enum class Access : int { read, write, atomic };
enum class Scope : int { block, device };

// The runtime sets them before it resumes a thread; for a kernel they are constants.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

extern unsigned long long launch_number;
extern char* dynamic_shared;
// In the build that counts: the last declaration of dynamic shared memory that a thread came across.
extern Named dynamic_declared;
// While it is set, a thread is in the midst of an atomic, and nothing takes its turn away.
extern volatile bool updating;

char* allocate_shared(Slot& slot, unsigned bytes, unsigned alignment, Named named, Site site);
unsigned warp_lane();
int barrier(Barrier kind, int predicate, Site site);
// `source` is the lane that a shuffle reads. The result is the value of that lane, or the vote.
unsigned long long warp_operation(WarpOperation kind, unsigned mask, unsigned long long value, int source, Site site);
// For an atomic that has changed nothing: a thread that waits for another is here again and again.
void found_unchanged(const void* address);
int print(const char* format, ...);
// For the build that counts. `whole`: the address is known to be a multiple of the size.
void about_to_access(const void* address, unsigned bytes, Access access, const void* pc, bool whole, bool is_volatile = false);
void fence(Scope scope);
[[noreturn]] void trap(const char* message, Site site);

// A parameter of a kernel, for the check of its arguments.
struct Parameter {
  char kind;  // f, i, u: a number or a vector of numbers; b: bool; V: anything else
  unsigned char size, component, alignment, is_pointer;  // for a vector, also the size of a component
};

// One variable in constant memory that has no value in the text. Python gives it one, or no thread may
// read it.
struct Constant {
  char* begin;  // of pages of its own
  unsigned long long bytes;
  Named named;
  Parameter entry;
  int is_set;
  Constant* next;  // in its library
};

}  // namespace cuda_emulator
#pragma GCC visibility pop
