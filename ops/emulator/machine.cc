#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

namespace emulator {

const char *const MEMORY_NAMES[MEMORIES] = {"UB", "L1", "L0A", "L0B", "L0C"};
const char *const PIPE_NAMES[PIPES + 1] = {"scalar", "vector", "cube", "MTE1", "MTE2", "MTE3", "FIX", "all"};

static const size_t STACK = 256 * 1024;
static const uint32_t LOGGED = 1 << 12;  // instructions whose lines are remembered, a pipe

struct Shadow {  // of a granule of an array: who wrote it and who read it last, as core * PIPES + pipe, and their instruction
  uint32_t written = 0, read = 0;
  uint16_t writer = 0, reader = 0;
};

struct Machine {
  Launch launch;
  std::vector<std::unique_ptr<Core>> cores;
  std::vector<ucontext_t> contexts;
  std::vector<std::unique_ptr<uint8_t[]>> stacks;
  std::vector<std::vector<Shadow>> shadows;
  ucontext_t scheduler;
  int current = 0;
  Body body = nullptr;
  void *argument = nullptr;
  std::string message;
  uint64_t steps = 0;
  std::chrono::steady_clock::time_point start;
  Clock meeting[2];
};

static Machine *machine = nullptr;
static int chip_cores = 2;
static double seconds = 300;
static std::string last_message;
static int64_t drop_kind = -1, drop_at = 0, syncs[SYNCS];
static std::mutex one_launch;

std::string Where::text() const {
  const char *slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

std::string text(const char *format, ...) {
  char buffer[1024];
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(buffer, sizeof buffer, format, rest);
  va_end(rest);
  return buffer;
}

static std::string name(const Core &c) {
  if (c.kind == Kind::AIC) return text("cube core of block %d", c.block);
  return machine->launch.cube ? text("vector core %d of block %d", c.sub, c.block) : text("vector core %d", c.block);
}

void fail(Where where, const std::string &message) {
  if (machine->message.empty()) machine->message = where.text() + ": " + message + " (" + name(core()) + ")";
  throw Failure();
}

Core &core() { return *machine->cores[machine->current]; }
int blocks() { return machine->launch.blocks; }
bool mixed() { return machine->launch.cube && machine->launch.vector; }
uint64_t tiling_key() { return machine->launch.key; }
int cores() { return chip_cores; }

static int entry(const Core &c, int pipe) { return c.id * PIPES + pipe; }

static void join(Clock &a, const Clock &b) {
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}

uint32_t issue(pipe_t pipe, Where where) {
  Core &c = core();
  if (pipe != PIPE_S) {  // what the scalar unit waited for is done before what it issues next, but for its own writes
    const uint32_t mine = c.clock[pipe][entry(c, PIPE_S)];
    join(c.clock[pipe], c.clock[PIPE_S]);
    c.clock[pipe][entry(c, PIPE_S)] = mine;
  }
  const uint32_t n = ++c.issued[pipe];
  if (pipe != PIPE_V && pipe != PIPE_M) c.clock[pipe][entry(c, pipe)] = n - 1;  // these do one after another
  c.log[pipe][n % LOGGED] = where;
  c.last = where;
  if (++machine->steps % 4096 == 0) {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - machine->start;
    if (passed.count() > seconds) fail(where, text("still running after %.0f s: a loop that does not end?", seconds));
  }
  return n;
}

static std::string line_of(const Core &c, int pipe, uint32_t n) {
  return c.issued[pipe] - n < LOGGED ? c.log[pipe][n % LOGGED].text() : std::string("an earlier line");
}

static void unordered(const char *name, pipe_t pipe, bool write, const char *what, const Core &other, int before, bool wrote, uint32_t n,
                      Where where) {
  const bool same = &other == &core();
  const std::string fix = !same            ? "no flag between the cores orders them"
                          : before == pipe ? text("no PipeBarrier<PIPE_%s> lies between", pipe == PIPE_V ? "V" : "M")
                                           : text("no queue or flag from %s to %s lies between", PIPE_NAMES[before], PIPE_NAMES[pipe]);
  const std::string who = same ? text("the %s pipe", PIPE_NAMES[before]) : emulator::name(other);
  fail(where, text("%s %s bytes of %s that %s may still be %s (%s): %s", name, write ? "writes" : "reads", what, who.c_str(),
                   wrote ? "writing" : "reading", line_of(other, before, n).c_str(), fix.c_str()));
}

void local_access(const char *name, pipe_t pipe, Memory memory, uint32_t at, uint32_t bytes, bool write, Where where) {
  if (bytes == 0) return;
  Core &c = core();
  const Clock &known = c.clock[pipe];
  const uint32_t n = c.issued[pipe];
  std::vector<Access> &shadow = c.shadow[static_cast<int>(memory)];
  const uint32_t *mine = &known[entry(c, 0)];
  for (uint32_t i = at / BLOCK; i <= (at + bytes - 1) / BLOCK; i++) {
    Access &a = shadow[i];
    if (a.written > mine[a.writer] && !(a.writer == pipe && a.written == n))
      unordered(name, pipe, write, MEMORY_NAMES[static_cast<int>(memory)], c, a.writer, true, a.written, where);
    if (write) {
      for (int p = 0; p < PIPES; p++)
        if (p != pipe && a.read[p] > mine[p])
          unordered(name, pipe, true, MEMORY_NAMES[static_cast<int>(memory)], c, p, false, a.read[p], where);
      a.written = n, a.writer = static_cast<uint8_t>(pipe);
    } else {
      a.read[pipe] = n;
    }
  }
}

void global_access(const char *name, pipe_t pipe, const void *address, size_t bytes, bool write, Where where) {
  if (bytes == 0) return;
  Core &c = core();
  const uint8_t *first = static_cast<const uint8_t *>(address);
  for (size_t i = 0; i < machine->launch.arrays.size(); i++) {
    const Array &array = machine->launch.arrays[i];
    if (first < array.data || first >= array.data + std::max<size_t>(array.bytes, 1)) continue;
    if (first + bytes > array.data + array.bytes)
      fail(where, text("%s %s %zu bytes from byte %zu of array %zu of the kernel, which has %zu", name, write ? "writes" : "reads", bytes,
                       static_cast<size_t>(first - array.data), i, array.bytes));
    const size_t from = (first - array.data) / array.granule, to = (first - array.data + bytes - 1) / array.granule;
    const uint32_t n = c.issued[pipe];
    for (size_t g = from; g <= to; g++) {
      Shadow &s = machine->shadows[i][g];
      const int me = entry(c, pipe);
      if (s.written > c.clock[pipe][s.writer] && s.writer != me)
        unordered(name, pipe, write, "global memory", *machine->cores[s.writer / PIPES], s.writer % PIPES, true, s.written, where);
      if (write && s.read > c.clock[pipe][s.reader] && s.reader != me)
        unordered(name, pipe, true, "global memory", *machine->cores[s.reader / PIPES], s.reader % PIPES, false, s.read, where);
      if (write)
        s.written = n, s.writer = static_cast<uint16_t>(me);
      else
        s.read = n, s.reader = static_cast<uint16_t>(me);
    }
    return;
  }
  fail(where, text("%s %s memory that is in none of the arrays of the kernel", name, write ? "writes" : "reads"));
}

Clock done(pipe_t pipe) {
  Core &c = core();
  Clock clock = c.clock[pipe];
  if (pipe != PIPE_S) {
    const uint32_t mine = clock[entry(c, PIPE_S)];
    join(clock, c.clock[PIPE_S]);
    clock[entry(c, PIPE_S)] = mine;
  }
  clock[entry(c, pipe)] = c.issued[pipe];
  return clock;
}

void after(pipe_t pipe, const Clock &clock) {
  if (!clock.empty()) join(core().clock[pipe], clock);
}

bool dropped(Sync kind) { return syncs[kind]++ == drop_at && kind == drop_kind; }

void set_flag(pipe_t from, pipe_t to, int event, Where where) {
  Core &c = core();
  c.last = where;
  if (event < 0 || event >= EVENTS) fail(where, text("SetFlag of event %d; there are %d", event, EVENTS));
  if (c.pending[from][to][event]++)
    fail(where, text("SetFlag of %s to %s, event %d, which %s set too and nothing waited for", PIPE_NAMES[from], PIPE_NAMES[to], event,
                     c.set_at[from][to][event].text().c_str()));
  c.set_at[from][to][event] = where;
  c.flag[from][to][event] = done(from);
}

void wait_flag(pipe_t from, pipe_t to, int event, Where where) {
  Core &c = core();
  c.last = where;
  if (event < 0 || event >= EVENTS) fail(where, text("WaitFlag of event %d; there are %d", event, EVENTS));
  if (!c.pending[from][to][event])
    fail(where,
         text("WaitFlag of %s to %s, event %d, which nothing set: the core would wait for ever", PIPE_NAMES[from], PIPE_NAMES[to], event));
  c.pending[from][to][event] = 0;
  if (!dropped(FLAGS)) after(to, c.flag[from][to][event]);
}

void barrier(pipe_t pipe, Where where) {
  Core &c = core();
  c.last = where;
  if (dropped(BARRIERS)) return;
  if (pipe != PIPE_ALL) {
    c.clock[pipe][entry(c, pipe)] = c.issued[pipe];
    return;
  }
  Clock all = done(PIPE_S);
  for (int p = 0; p < PIPES; p++) join(all, done(static_cast<pipe_t>(p)));
  for (int p = 0; p < PIPES; p++) c.clock[p] = all;
}

// Lets the other cores run until `ready`.
template <typename Ready>
static void wait_until(Ready ready, const std::string &what, Where where) {
  Core &c = core();
  c.last = where;
  while (!ready()) {
    c.waits = what;
    swapcontext(&machine->contexts[machine->current], &machine->scheduler);
  }
  c.waits.clear();
  machine->steps++;
}

void cross_set(int mode, pipe_t pipe, int flag, Where where) {
  Core &c = core();
  c.last = where;
  if (flag < 0 || flag >= CROSS_FLAGS) fail(where, text("CrossCoreSetFlag of flag %d; there are %d", flag, CROSS_FLAGS));
  if (mode != 2) fail(where, text("CrossCoreSetFlag in mode %d; the emulator knows mode 2, between the cores of a block", mode));
  if (!mixed()) fail(where, "CrossCoreSetFlag in mode 2 in a kernel without cores of both kinds");
  const Clock clock = done(pipe);
  for (auto &other : machine->cores) {
    if (other->block != c.block || other->kind == c.kind) continue;
    Core::Cross &cross = other->cross[c.kind == Kind::AIV ? c.sub : 0][flag];
    if (++cross.count > CROSS_MOST)
      fail(where, text("CrossCoreSetFlag of flag %d, set %d times more than waited for", flag, CROSS_MOST + 1));
    if (cross.clock.empty())
      cross.clock = clock;
    else
      join(cross.clock, clock);
  }
}

void cross_wait(pipe_t pipe, int flag, Where where) {
  if (flag < 0 || flag >= CROSS_FLAGS) fail(where, text("CrossCoreWaitFlag of flag %d; there are %d", flag, CROSS_FLAGS));
  Core &c = core();
  const int senders = c.kind == Kind::AIC ? 2 : 1;
  auto ready = [&] { return c.cross[0][flag].count > 0 && (senders == 1 || c.cross[1][flag].count > 0); };
  wait_until(ready, text("CrossCoreWaitFlag of flag %d", flag), where);
  const bool drop = dropped(CROSSINGS);
  for (int i = 0; i < senders; i++) {
    c.cross[i][flag].count--;
    if (!drop) after(pipe, c.cross[i][flag].clock);
  }
}

void sync_all(bool vector_only, Where where) {
  Core &c = core();
  if (vector_only && c.kind == Kind::AIC) fail(where, "SyncAll of the vector cores, called by a cube core");
  if (c.alone)
    fail(where, "SyncAll in a kernel of KERNEL_TYPE_AIV_ONLY or KERNEL_TYPE_AIC_ONLY; KERNEL_TYPE_MIX_AIV_1_0 is for those that wait");
  const uint64_t mine = ++c.barriers;
  Clock &meeting = machine->meeting[mine % 2];
  auto all = [&](auto test) {
    for (auto &other : machine->cores)
      if ((!vector_only || other->kind == Kind::AIV) && !test(*other)) return false;
    return true;
  };
  for (int p = 0; p < PIPES; p++) join(meeting, done(static_cast<pipe_t>(p)));
  wait_until([&] { return all([&](Core &o) { return o.barriers >= mine; }); }, "SyncAll", where);
  if (dropped(CROSSINGS)) return;
  for (int p = 0; p < PIPES; p++) join(c.clock[p], meeting);
}

static void start() {
  try {
    machine->body(machine->argument);
    Core &c = core();
    for (int from = 0; from < PIPES; from++)
      for (int to = 0; to < PIPES; to++)
        for (int event = 0; event < EVENTS; event++)
          if (c.pending[from][to][event])
            fail(c.set_at[from][to][event],
                 text("SetFlag of %s to %s, event %d, that nothing waited for", PIPE_NAMES[from], PIPE_NAMES[to], event));
  } catch (Failure &) {
  }
  core().finished = true;
  swapcontext(&machine->contexts[machine->current], &machine->scheduler);
}

static void make_core(int i, int block, Kind kind, int sub, size_t clocks) {
  machine->cores[i] = std::make_unique<Core>();
  Core &c = *machine->cores[i];
  c.id = i, c.block = block, c.kind = kind, c.sub = sub;
  for (int p = 0; p < PIPES; p++) c.clock[p].assign(clocks, 0), c.log[p].resize(LOGGED);
  for (int m = 0; m < MEMORIES; m++) {
    if ((static_cast<Memory>(m) == Memory::UB) != (kind == Kind::AIV)) continue;
    c.memory[m].resize(CAPACITY[m]);
    c.shadow[m].resize(CAPACITY[m] / BLOCK);
  }
  machine->stacks[i].reset(new uint8_t[STACK]);
  getcontext(&machine->contexts[i]);
  machine->contexts[i].uc_stack = {machine->stacks[i].get(), 0, STACK};
  machine->contexts[i].uc_link = &machine->scheduler;
  makecontext(&machine->contexts[i], start, 0);
}

static void leftovers() {
  for (auto &c : machine->cores)
    for (auto &from : c->cross)
      for (int flag = 0; flag < CROSS_FLAGS; flag++)
        if (from[flag].count && machine->message.empty())
          machine->message = c->last.text() + text(": flag %d between the cores is set and was not waited for (", flag) + name(*c) + ")";
}

static void schedule() {
  for (bool moved = true; moved;) {
    moved = false;
    bool waiting = false;
    for (size_t i = 0; i < machine->cores.size(); i++) {
      Core &c = *machine->cores[i];
      if (c.finished) continue;
      const uint64_t before = machine->steps;
      const std::string waited = c.waits;
      machine->current = static_cast<int>(i);
      swapcontext(&machine->scheduler, &machine->contexts[i]);
      if (!machine->message.empty()) return;
      moved |= c.finished || c.waits != waited || machine->steps != before || waited.empty();
      waiting |= !c.finished;
    }
    if (!waiting) return leftovers();
  }
  for (auto &c : machine->cores) {
    if (c->finished) continue;
    machine->message += (machine->message.empty() ? "deadlock: " : "; ") + c->last.text() + ": " + name(*c) + " waits in " + c->waits;
  }
}

std::string run(const Launch &launch, Body body, void *argument) {
  std::lock_guard<std::mutex> lock(one_launch);
  Machine m;
  machine = &m;
  std::fill_n(syncs, static_cast<int>(SYNCS), 0);
  m.launch = launch, m.body = body, m.argument = argument, m.start = std::chrono::steady_clock::now();
  const int each = (launch.cube ? 1 : 0) + (launch.vector ? (launch.cube ? 2 : 1) : 0), n = launch.blocks * each;
  m.cores.resize(n), m.contexts.resize(n), m.stacks.resize(n);
  for (auto &meeting : m.meeting) meeting.assign(n * PIPES, 0);
  for (const Array &array : launch.arrays) m.shadows.emplace_back((array.bytes + array.granule - 1) / array.granule);
  for (int b = 0, i = 0; b < launch.blocks; b++) {
    if (launch.cube) make_core(i++, b, Kind::AIC, 0, n * PIPES);
    for (int s = 0; launch.vector && s < (launch.cube ? 2 : 1); s++) make_core(i++, b, Kind::AIV, s, n * PIPES);
  }
  schedule();
  machine = nullptr;
  return m.message;
}

}  // namespace emulator

extern "C" void emulator_set_cores(int cores) { emulator::chip_cores = cores; }
extern "C" void emulator_set_seconds(double limit) { emulator::seconds = limit; }
extern "C" void emulator_drop(int kind, int64_t n) { emulator::drop_kind = kind, emulator::drop_at = n; }
extern "C" int64_t emulator_syncs(int kind) { return emulator::syncs[kind]; }
extern "C" const char *emulator_message() { return emulator::last_message.c_str(); }
extern "C" int emulator_report(const char *message) {
  emulator::last_message = message;
  if (*message) std::fprintf(stderr, "emulator: %s\n", message);
  return *message ? 3 : 0;
}
