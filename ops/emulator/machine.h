// The emulated machine: cores, their memories, the happens-before order of accesses, and failures.
//
// Each core is a coroutine. One core runs at a time, until it waits for another, so runs are deterministic and a deadlock is detected. An
// instruction takes effect when it is called. On the chip, pipes execute instructions later and in parallel, so the emulator keeps a vector
// clock for each pipe. An access fails if no flag, queue or barrier orders it after an earlier access to the same bytes.
//
// A timed run also keeps the time of each pipe, by the rates of clock.h. What orders pipes carries the time at which it was reached.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <type_traits>
#include <vector>

#include "clock.h"

enum pipe_t : int { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace emulator {

enum : int { PIPES = 7, EVENTS = 8, CROSS_FLAGS = 11, CROSS_MOST = 15, BLOCK = 32 };
enum class Kind : uint8_t { AIC, AIV };
enum class Memory : uint8_t { UB, L1, L0A, L0B, L0C };
enum : int { MEMORIES = 5 };

// Bytes of each memory of Ascend 910B's cores.
// The platform reserves 256 bytes of UB.
constexpr uint32_t CAPACITY[MEMORIES] = {192 * 1024 - 256, 512 * 1024, 64 * 1024, 64 * 1024, 128 * 1024};
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

// Of each core's each pipe, how many of its instructions are known to be done; and, in a timed run, when, and after which event.
struct Clock {
  std::vector<uint32_t> done;
  double time = 0;
  int event = -1;
};

// Accesses of 32 bytes of a core's memory.
struct Access {
  uint32_t written = 0, read[PIPES] = {};  // the number of the last instruction, of a pipe
  uint8_t writer = 0;
};

// A pipe of a timed run.
struct Pipe {
  double ready = 0, begin = 0, free = 0, complete = 0;  // a flag lets it go on; its last instruction began; ended; all it did is done
  double busy = 0;
  int cause = -1, last = -1;               // events: what `ready` waited for, and its own last
  double begun[rates::WAITING] = {};       // when its last instructions began
  uint64_t missed = 0, hit = 0, bytes = 0;  // of global memory: of the copy that is being made, that L2 lacks and has; of all copies
  uint64_t fetched = 0;                     // of the copy that is being made, in whole lines from HBM
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
  std::deque<Clock> cross[2][CROSS_FLAGS];  // set for this core, by the first and second of the other kind, and not waited for
  bool finished = false, alone = false;  // alone: of a kernel whose cores may not wait for each other
  bool adds = false;                     // SetAtomicAdd: what is written to global memory is added to what is there
  uint64_t barriers = 0;                 // SyncAll calls
  std::string waits;                     // for what, while it does
  Where last = {"", 0};
  Pipe pipe[PIPES];
  double now = 0;        // of the scalar unit
  int since = -1;        // the event that it waited for last
  uint64_t line[256] = {};  // of global memory that the scalar unit's cache holds
};

Core &core();
int blocks();
bool mixed();
uint64_t tiling_key();

// What an instruction takes of its pipe: cycles before the first part if the pipe was idle, cycles, and more of them for what waits for it.
struct Work {
  double head = 0, cycles = 0, tail = 0;
  const char *name = "";
};
inline Work of_repeats(const char *name, const rates::Vector &rate, double repeats, bool odd = false) {
  return {rate.head, rate.repeat * repeats + (odd ? rates::ODD_COUNT : 0), rate.tail, name};
}
inline double repeats_of(uint64_t bytes) { return static_cast<double>((bytes + 255) / 256); }

// One instruction of a pipe; accesses follow, then nothing. Returns its number.
uint32_t issue(pipe_t pipe, Where where, const Work &work = {});
// The end of a copy from or to global memory, whose accesses are known now.
void copied(pipe_t pipe);
void spend(double cycles);  // of the scalar unit
void multiplied(uint64_t products);

// A run for its time alone: numbers other than integers are neither read nor written, and nothing is checked.
extern bool dry;
template <typename T>
inline bool skipped() {
  return dry && !std::is_same_v<T, int32_t> && !std::is_same_v<T, uint32_t>;
}
void local_access(const char *name, pipe_t pipe, Memory memory, uint32_t at, uint32_t bytes, bool write, Where where);
// `address` has to be in an array that the kernel was given.
void global_access(const char *name, pipe_t pipe, const void *address, size_t bytes, bool write, Where where);

void set_flag(pipe_t from, pipe_t to, int event, Where where);
void wait_flag(pipe_t from, pipe_t to, int event, Where where);
void barrier(pipe_t pipe, Where where);
void in_order(pipe_t pipe);  // the pipe's next instruction comes after its last
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
  bool together = true;  // all blocks are started at once: SetScheduleMode(1)
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
// Runs from now on: 0 without times, 1 with them, 2 for times alone.
void emulator_set_clock(int mode);
// Of the last run with times: what it took, as JSON; and its pipes as a trace for Chrome (chrome://tracing, ui.perfetto.dev), in a file.
const char *emulator_clock();
int emulator_trace(const char *path);
const char *emulator_message();
int emulator_report(const char *message);  // keeps and prints it; returns what a kernel then returns
}
