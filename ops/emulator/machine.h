// The emulated machine: cores, their memories, the happens-before order of accesses, and failures.
//
// Each core is a coroutine. One core runs at a time, until it waits for another, so runs are deterministic and a deadlock is detected. An
// instruction takes effect when it is called. On the chip, pipes execute instructions later and in parallel, so the emulator keeps a vector
// clock for each pipe. An access fails if no flag, queue or barrier orders it after an earlier access to the same bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

enum pipe_t : int { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace emulator {

enum : int { PIPES = 7, EVENTS = 8, CROSS_FLAGS = 11, CROSS_MOST = 15, BLOCK = 32 };
enum class Kind : uint8_t { AIC, AIV };
enum class Memory : uint8_t { UB, L1, L0A, L0B, L0C };
enum : int { MEMORIES = 5 };

// Bytes of each memory of Ascend 910B's cores.
constexpr uint32_t CAPACITY[MEMORIES] = {192 * 1024, 512 * 1024, 64 * 1024, 64 * 1024, 128 * 1024};
extern const char *const MEMORY_NAMES[MEMORIES];
extern const char *const PIPE_NAMES[PIPES + 1];

// A line of a kernel.
struct Where {
  const char *file;
  int line;
  std::string text() const;
  static constexpr Where here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define EMULATOR_HERE ::emulator::Where where = ::emulator::Where::here()  // the last parameter of an API function: its caller's line

struct Failure {};
// Ends the run with "file:line: message", and the core that made it.
[[noreturn]] void fail(Where where, const std::string &message);
std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));

using Clock = std::vector<uint32_t>;  // of each core's each pipe, how many of its instructions are known to be done

// Accesses of 32 bytes of a core's memory.
struct Access {
  uint32_t written = 0, read[PIPES] = {};  // the number of the last instruction, of a pipe
  uint8_t writer = 0;
};

struct Core {
  int id = 0, block = 0, sub = 0;
  Kind kind = Kind::AIV;
  Clock clock[PIPES], flag[PIPES][PIPES][EVENTS];
  uint32_t issued[PIPES] = {};
  uint8_t pending[PIPES][PIPES][EVENTS] = {};
  Where set_at[PIPES][PIPES][EVENTS] = {};
  std::vector<Where> log[PIPES];  // of the last instructions
  std::vector<uint8_t> memory[MEMORIES];
  std::vector<Access> shadow[MEMORIES];
  uint32_t used[MEMORIES] = {};  // bytes that TPipe has given away
  uint32_t queue_buffers[PIPES][PIPES] = {};
  struct Cross {
    int count = 0;
    Clock clock;
  } cross[2][CROSS_FLAGS];               // set for this core, by the first and second of the other kind
  bool finished = false, alone = false;  // alone: of a kernel whose cores may not wait for each other
  uint64_t barriers = 0;                 // SyncAll calls
  std::string waits;                     // for what, while it does
  Where last = {"", 0};
};

Core &core();
int blocks();
bool mixed();
uint64_t tiling_key();

// One instruction of a pipe; accesses follow, then nothing. Returns its number.
uint32_t issue(pipe_t pipe, Where where);
void local_access(const char *name, pipe_t pipe, Memory memory, uint32_t at, uint32_t bytes, bool write, Where where);
// `address` has to be in an array that the kernel was given.
void global_access(const char *name, pipe_t pipe, const void *address, size_t bytes, bool write, Where where);

void set_flag(pipe_t from, pipe_t to, int event, Where where);
void wait_flag(pipe_t from, pipe_t to, int event, Where where);
void barrier(pipe_t pipe, Where where);
Clock done(pipe_t pipe);                      // what is done once the pipe's last instruction is
void after(pipe_t pipe, const Clock &clock);  // the pipe's next instructions come after it
// Whether a synchronisation is to be without effect: what a kernel would be without it. Each kind is counted on its own.
enum Sync : int { BARRIERS, FLAGS, QUEUES, CROSSINGS, SYNCS };
bool dropped(Sync kind);
void cross_set(int mode, pipe_t pipe, int flag, Where where);
void cross_wait(pipe_t pipe, int flag, Where where);
void sync_all(bool vector_only, Where where);

// What the host asks for, and the arrays of one launch.
struct Array {
  uint8_t *data;
  size_t bytes, granule;  // accesses are told apart by granules
};
struct Launch {
  int blocks = 1;
  bool cube = false, vector = true;
  uint64_t key = 0;
  std::vector<Array> arrays;
};
using Body = void (*)(void *);
// Runs body(argument) on each core; the failure's message, empty if there is none.
std::string run(const Launch &launch, Body body, void *argument);

int cores();  // of the emulated chip: cube cores, and twice as many vector cores
}  // namespace emulator

extern "C" {
void emulator_set_cores(int cores);
void emulator_set_seconds(double limit);
void emulator_drop(int kind, int64_t n);  // in runs from now on, the n-th of a kind; kind -1: none
int64_t emulator_syncs(int kind);         // of the last run
const char *emulator_message();
int emulator_report(const char *message);  // keeps and prints it; returns what a kernel then returns
}
