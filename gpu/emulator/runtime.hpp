// What a compiled kernel and the emulator's runtime say to each other. No standard header is
// included here: a kernel compiles in an instant.
#pragma once

#pragma GCC visibility push(default)
namespace cuda_emulator {

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

// Where in the source a call stands. As a default argument it is the place of the caller.
struct Site { const char* file; int line; };

// One declaration of static shared memory. Its place is given to it by the first thread of a launch
// that comes past.
struct Slot { unsigned long long launch; char* place; };

enum class WarpOperation : int { sync, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, any, all, match_any };
enum class Barrier : int { plain, any, all, count };
enum class Access : int { read, write, atomic };

// Set before a thread runs on; to a kernel they are constants.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

extern unsigned long long launch_number;
extern char* dynamic_shared;

char* place_shared(Slot& slot, unsigned bytes, unsigned alignment, const char* names, Site site);
unsigned warp_lane();
int barrier(Barrier kind, int predicate, Site site);
// `source` is the lane that a shuffle reads; the result is its value, or the lanes' vote.
unsigned long long warp_operation(WarpOperation kind, unsigned mask, unsigned long long value, int source, Site site);
// In the build that counts. `whole`: the address is known to be a multiple of the size.
void about_to_access(const void* address, unsigned bytes, Access access, const void* pc, bool whole);
[[noreturn]] void trap(const char* message, Site site);

// A parameter of a kernel, for the check of its arguments.
struct Parameter {
  char kind;  // f, i, u: a number or a vector of numbers; b: bool; V: anything else
  unsigned char size, component, alignment, is_pointer;  // of a vector, the component's size too
};

}  // namespace cuda_emulator
#pragma GCC visibility pop
