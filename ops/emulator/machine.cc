#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace emulator {

const char *const MEMORY_NAMES[MEMORIES] = {"UB", "L1", "L0A", "L0B", "L0C"};
const char *const PIPE_NAMES[PIPES + 1] = {"scalar", "vector", "cube", "MTE1", "MTE2", "MTE3", "FIX", "all"};

static const size_t STACK = 256 * 1024;
static const double QUANTUM = 1000;            // cycles that a core may be ahead of the others
static const size_t MOST_EVENTS = 12u << 20;   // that a timed run remembers
static const uint32_t LOGGED = 1 << 12;  // instructions whose lines are remembered, a pipe

struct Shadow {  // of a granule of an array: who wrote it and who read it last, as core * PIPES + pipe, and their instruction
  uint32_t written = 0, read = 0;
  uint16_t writer = 0, reader = 0;
};

struct Event {  // an instruction of a timed run
  double begin, end;
  int cause;  // the event that it waited for, or came after
  uint16_t core;
  uint8_t pipe;
  char waited;  // 'p' for its own pipe, 'f' for a flag, 's' for the scalar unit that issues it
  Where where;
  const char *name;
};

// What a resource of all cores gives, in windows of time: a copy takes what others have left.
struct Shared {
  static constexpr double WINDOW = 512;
  double rate;
  uint64_t bytes = 0;
  std::vector<double> used;
  double until(double from, double size) {
    bytes += static_cast<uint64_t>(size);
    const double room = rate * WINDOW;
    for (size_t w = static_cast<size_t>(from / WINDOW);; w++) {
      if (w >= used.size()) used.resize(2 * w + 1024);
      if (used[w] + size <= room) {
        used[w] += size;
        return std::max(from + size / rate, w * WINDOW + used[w] / rate);
      }
      size -= room - used[w], used[w] = room;
    }
  }
};

struct Machine {
  Launch launch;
  bool timed = false;
  double horizon = 0;  // cores of a timed run that are further on wait for the others
  std::vector<Event> events;
  std::vector<std::vector<uint32_t>> lines;  // of each array: when L2 took each line, in KiB that it took before, and 1
  uint64_t taken = 0;                        // bytes that L2 took
  Shared hbm = {rates::HBM, 0, {}}, l2 = {rates::L2, 0, {}};
  uint64_t products = 0;  // multiply-adds of the cube
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
static int clock_mode = 0;
static std::string last_message, last_clock;
static std::vector<Event> last_events;
static std::vector<std::string> last_names;
bool dry = false;
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
  for (size_t i = 0; i < b.done.size(); i++) a.done[i] = std::max(a.done[i], b.done[i]);
  if (b.time > a.time) a.time = b.time, a.event = b.event;
}

void spend(double cycles) {
  if (machine->timed) core().now += cycles, core().pipe[PIPE_S].busy += cycles;
}

// The scalar unit waits until a time, for an event.
static void wait(Core &c, double time, int event) {
  if (time > c.now) c.now = time, c.since = event;
}

static void begin(Core &c, pipe_t pipe, uint32_t n, Where where, const Work &work) {
  if (pipe == PIPE_S) return spend(work.cycles);
  Pipe &p = c.pipe[pipe];
  spend(rates::ISSUE);
  double &slot = p.begun[n % rates::WAITING];
  wait(c, slot, p.last);
  double from = c.now;
  char waited = 's';
  int cause = c.since;
  if (p.ready > from) from = p.ready, cause = p.cause, waited = 'f';
  if (p.free >= from) from = p.free, cause = p.last, waited = 'p';
  const double cycles = work.cycles + (from > p.free ? work.head : 0);
  p.begin = slot = from, p.free = from + cycles, p.complete = std::max(p.complete, p.free + work.tail), p.busy += cycles;
  if (machine->events.size() < MOST_EVENTS) {
    p.last = static_cast<int>(machine->events.size());
    machine->events.push_back(
        {from, p.free + work.tail, cause, static_cast<uint16_t>(c.id), static_cast<uint8_t>(pipe), waited, where, work.name});
  } else {
    p.last = -1;
  }
}

// An access to global memory, of the last instruction of a pipe: how much of it L2 has.
static void fetch(Core &c, pipe_t pipe, size_t array, size_t from, size_t bytes) {
  if (pipe == PIPE_S) {
    const uint64_t line = static_cast<uint64_t>(array + 1) << 40 | from / 64;  // whatever the address on this machine
    uint64_t &held = c.line[(from / 64 + array * 61) % 256];
    spend(held == line ? rates::LOCAL : rates::ASSUMED_GLOBAL);
    held = line;
    return;
  }
  Pipe &p = c.pipe[pipe];
  std::vector<uint32_t> &lines = machine->lines[array];
  for (size_t at = from; at < from + bytes;) {
    const size_t line = at / rates::ASSUMED_LINE, end = std::min(from + bytes, (line + 1) * rates::ASSUMED_LINE);
    const uint32_t now = static_cast<uint32_t>(machine->taken >> 10) + 1;
    const bool held = lines[line] && now - lines[line] < (rates::L2_BYTES >> 10);
    (held ? p.hit : p.missed) += end - at;
    if (!held) machine->taken += rates::ASSUMED_LINE, p.fetched += rates::ASSUMED_LINE;
    lines[line] = now;
    at = end;
  }
}

void copied(pipe_t pipe) {
  if (!machine->timed) return;
  Pipe &p = core().pipe[pipe];
  double end = p.free, latency = p.missed ? rates::READ_LATENCY : rates::ASSUMED_L2_LATENCY;
  if (pipe != PIPE_MTE2) latency = rates::WRITE_LATENCY;
  if (p.missed) end = std::max(end, machine->hbm.until(p.begin, p.fetched));
  end = std::max(end, machine->l2.until(p.begin, p.missed + p.hit));
  p.busy += end - p.free, p.bytes += p.missed + p.hit;
  p.free = end, p.complete = std::max(p.complete, end + latency);
  if (p.last >= 0) machine->events[p.last].end = end + latency;
  p.missed = p.hit = p.fetched = 0;
}

void multiplied(uint64_t products) { machine->products += products; }

static void pause() {
  if (machine->timed && core().now > machine->horizon) swapcontext(&machine->contexts[machine->current], &machine->scheduler);
}

uint32_t issue(pipe_t pipe, Where where, const Work &work) {
  Core &c = core();
  pause();
  const uint32_t n = ++c.issued[pipe];
  if (!dry) {
    std::vector<uint32_t> &known = c.clock[pipe].done;
    if (pipe != PIPE_S) {  // what the scalar unit waited for is done before what it issues next, but for its own writes
      const uint32_t mine = known[entry(c, PIPE_S)];
      join(c.clock[pipe], c.clock[PIPE_S]);
      known[entry(c, PIPE_S)] = mine;
    }
    if (pipe != PIPE_V && pipe != PIPE_M) known[entry(c, pipe)] = n - 1;  // these do one after another
    c.log[pipe][n % LOGGED] = where;
  }
  c.last = where;
  if (machine->timed) begin(c, pipe, n, where, work);
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
  if (bytes == 0 || dry) return;
  Core &c = core();
  const std::vector<uint32_t> &known = c.clock[pipe].done;
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
    if (machine->timed) fetch(c, pipe, i, first - array.data, bytes);
    if (dry) return;
    const std::vector<uint32_t> &known = c.clock[pipe].done;
    const size_t from = (first - array.data) / array.granule, to = (first - array.data + bytes - 1) / array.granule;
    const uint32_t n = c.issued[pipe];
    for (size_t g = from; g <= to; g++) {
      Shadow &s = machine->shadows[i][g];
      const int me = entry(c, pipe);
      if (s.written > known[s.writer] && s.writer != me)
        unordered(name, pipe, write, "global memory", *machine->cores[s.writer / PIPES], s.writer % PIPES, true, s.written, where);
      if (write && s.read > known[s.reader] && s.reader != me)
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
  Clock clock;
  if (!dry) {
    clock = c.clock[pipe];
    if (pipe != PIPE_S) {
      const uint32_t mine = clock.done[entry(c, PIPE_S)];
      join(clock, c.clock[PIPE_S]);
      clock.done[entry(c, PIPE_S)] = mine;
    }
    clock.done[entry(c, pipe)] = c.issued[pipe];
  }
  const Pipe &p = c.pipe[pipe];
  clock.time = pipe == PIPE_S ? c.now : std::max(p.complete, c.now), clock.event = pipe == PIPE_S ? c.since : p.last;
  if (pipe != PIPE_S && p.ready > clock.time) clock.time = p.ready, clock.event = p.cause;
  return clock;
}

void after(pipe_t pipe, const Clock &clock) {
  Core &c = core();
  if (!clock.done.empty()) join(c.clock[pipe], clock);
  if (!machine->timed) return;
  const double time = clock.time + rates::ASSUMED_FLAG;
  Pipe &p = c.pipe[pipe];
  if (pipe == PIPE_S)
    wait(c, time, clock.event);
  else if (clock.time > 0 && time > p.ready)
    p.ready = time, p.cause = clock.event;
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
  spend(rates::ASSUMED_SET);
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
  spend(rates::ASSUMED_SET);
  if (!dropped(FLAGS)) after(to, c.flag[from][to][event]);
}

void in_order(pipe_t pipe) {
  Core &c = core();
  if (!dry) c.clock[pipe].done[entry(c, pipe)] = c.issued[pipe];
}

// All pipes go on from here.
static void meet(Core &c, const Clock &clock) {
  for (int p = 0; p < PIPES; p++) {
    if (!dry) join(c.clock[p], clock);
    if (clock.time > c.pipe[p].ready) c.pipe[p].ready = clock.time, c.pipe[p].cause = clock.event;
  }
  if (machine->timed) wait(c, clock.time, clock.event);
}

void barrier(pipe_t pipe, Where where) {
  Core &c = core();
  c.last = where;
  if (dropped(BARRIERS)) return;
  spend(rates::ASSUMED_SET);
  if (pipe != PIPE_ALL) {
    if (!dry) c.clock[pipe].done[entry(c, pipe)] = c.issued[pipe];
    Pipe &p = c.pipe[pipe];
    if (p.complete > p.ready) p.ready = p.complete, p.cause = p.last;
    return;
  }
  Clock all = done(PIPE_S);
  for (int p = 0; p < PIPES; p++) join(all, done(static_cast<pipe_t>(p)));
  meet(c, all);
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
  spend(rates::ASSUMED_SET);
  Clock clock = done(pipe);
  clock.time += rates::CROSS;
  for (auto &other : machine->cores) {
    if (other->block != c.block || other->kind == c.kind) continue;
    std::deque<Clock> &cross = other->cross[c.kind == Kind::AIV ? c.sub : 0][flag];
    cross.push_back(clock);
    if (cross.size() > CROSS_MOST)
      fail(where, text("CrossCoreSetFlag of flag %d, set %d times more than waited for", flag, CROSS_MOST + 1));
  }
}

void cross_wait(pipe_t pipe, int flag, Where where) {
  if (flag < 0 || flag >= CROSS_FLAGS) fail(where, text("CrossCoreWaitFlag of flag %d; there are %d", flag, CROSS_FLAGS));
  Core &c = core();
  const int senders = c.kind == Kind::AIC ? 2 : 1;
  auto ready = [&] { return !c.cross[0][flag].empty() && (senders == 1 || !c.cross[1][flag].empty()); };
  wait_until(ready, text("CrossCoreWaitFlag of flag %d", flag), where);
  const bool drop = dropped(CROSSINGS);
  spend(rates::ASSUMED_SET);
  for (int i = 0; i < senders; i++) {
    if (!drop) after(pipe, c.cross[i][flag].front());
    c.cross[i][flag].pop_front();
  }
}

void sync_all(bool vector_only, Where where) {
  Core &c = core();
  if (vector_only && c.kind == Kind::AIC) fail(where, "SyncAll of the vector cores, called by a cube core");
  if (c.alone)
    fail(where, "SyncAll in a kernel of KERNEL_TYPE_AIV_ONLY or KERNEL_TYPE_AIC_ONLY; KERNEL_TYPE_MIX_AIV_1_0 is for those that wait");
  if (!machine->launch.together)
    fail(where, "SyncAll in an operator whose tiling function does not call SetScheduleMode(1): another operator may hold some cores");
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
  Clock met = meeting;
  met.time += rates::ASSUMED_SYNC_ALL;
  meet(c, met);
}

static void start() {
  try {
    machine->body(machine->argument);
    Core &c = core();
    if (c.adds) fail(c.last, "SetAtomicAdd holds at the end of the kernel: SetAtomicNone is missing");
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
  for (int p = 0; p < PIPES && !dry; p++) c.clock[p].done.assign(clocks, 0), c.log[p].resize(LOGGED);
  for (int m = 0; m < MEMORIES; m++) {
    if ((static_cast<Memory>(m) == Memory::UB) != (kind == Kind::AIV)) continue;
    c.memory[m].assign(CAPACITY[m], 0xff);  // NaN
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
        if (!from[flag].empty() && machine->message.empty())
          machine->message = c->last.text() + text(": flag %d between the cores is set and was not waited for (", flag) + name(*c) + ")";
}

static void schedule() {
  for (bool moved = true; moved;) {
    moved = false;
    bool waiting = false;
    double earliest = 0;
    for (size_t i = 0; i < machine->cores.size(); i++) {
      Core &c = *machine->cores[i];
      if (c.finished) continue;
      if (machine->timed && c.now > machine->horizon) {
        earliest = waiting && earliest > 0 ? std::min(earliest, c.now) : c.now;
        waiting = true;
        continue;
      }
      const uint64_t before = machine->steps;
      const std::string waited = c.waits;
      machine->current = static_cast<int>(i);
      swapcontext(&machine->scheduler, &machine->contexts[i]);
      if (!machine->message.empty()) return;
      moved |= c.finished || c.waits != waited || machine->steps != before || waited.empty();
      waiting |= !c.finished;
    }
    if (!waiting) return leftovers();
    if (!moved && earliest > 0) machine->horizon = earliest + QUANTUM, moved = true;
  }
  for (auto &c : machine->cores) {
    if (c->finished) continue;
    machine->message += (machine->message.empty() ? "deadlock: " : "; ") + c->last.text() + ": " + name(*c) + " waits in " + c->waits;
  }
}

// What a timed run took, as JSON.
static std::string report(const Machine &m) {
  double total = 0;
  for (const auto &c : m.cores) {
    total = std::max(total, c->now);
    for (const Pipe &p : c->pipe) total = std::max(total, p.complete);
  }
  const auto hbm = static_cast<double>(m.hbm.bytes), l2 = static_cast<double>(m.l2.bytes), products = static_cast<double>(m.products);
  std::string out = text("{\"cycles\": %.0f, \"seconds\": %.9g, \"blocks\": %d", total, total / rates::CYCLES_A_SECOND, m.launch.blocks);
  out += text(", \"hbm_bytes\": %.0f, \"l2_bytes\": %.0f, \"products\": %.0f", hbm, l2, products);
  out += ", \"pipes\": {";
  const char *comma = "";
  for (int kind = 0; kind < 2; kind++)
    for (int p = 0; p < PIPES; p++) {
      double sum = 0, most = 0, cores = 0, bytes = 0;
      for (const auto &c : m.cores) {
        if (static_cast<int>(c->kind) != kind) continue;
        const Pipe &pipe = c->pipe[p];
        sum += pipe.busy, most = std::max(most, pipe.busy), bytes += static_cast<double>(pipe.bytes), cores++;
      }
      if (most == 0) continue;
      out += text("%s\"%s %s\": {\"mean\": %.4f, \"most\": %.4f, \"bytes\": %.0f}", comma, kind ? "vector core" : "cube core",
                  PIPE_NAMES[p], sum / cores / total, most / total, bytes);
      comma = ", ";
    }
  // Back from the event that ended last: each was held up by its cause.
  std::map<std::string, double> path, lines;
  int at = -1;
  if (m.events.size() < MOST_EVENTS)
    for (size_t i = 0; i < m.events.size(); i++)
      if (at < 0 || m.events[i].end > m.events[at].end) at = static_cast<int>(i);
  for (double time = at < 0 ? 0 : m.events[at].end; at >= 0;) {
    const Event &e = m.events[at];
    const std::string pipe = std::string(m.cores[e.core]->kind == Kind::AIC ? "cube core " : "vector core ") + PIPE_NAMES[e.pipe];
    path[pipe] += std::max(0.0, time - e.begin), lines[e.where.text() + " " + e.name] += std::max(0.0, time - e.begin);
    time = std::min(time, e.begin);
    const double before = e.cause >= 0 ? m.events[e.cause].end : 0;
    const double gap = std::max(0.0, time - before);
    path[e.waited == 's' ? "scalar" : "flags"] += gap;
    time -= gap;
    at = e.cause;
  }
  out += "}, \"path\": {";
  comma = "";
  for (const auto &[name, cycles] : path) out += text("%s\"%s\": %.4f", comma, name.c_str(), cycles / total), comma = ", ";
  out += "}, \"lines\": {";
  comma = "";
  for (const auto &[name, cycles] : lines)
    if (cycles > 0.02 * total) out += text("%s\"%s\": %.4f", comma, name.c_str(), cycles / total), comma = ", ";
  return out + "}}";
}

std::string run(const Launch &launch, Body body, void *argument) {
  std::lock_guard<std::mutex> lock(one_launch);
  Machine m;
  machine = &m;
  std::fill_n(syncs, static_cast<int>(SYNCS), 0);
  m.launch = launch, m.body = body, m.argument = argument, m.start = std::chrono::steady_clock::now();
  m.timed = clock_mode > 0;
  const int each = (launch.cube ? 1 : 0) + (launch.vector ? (launch.cube ? 2 : 1) : 0), n = launch.blocks * each;
  m.cores.resize(n), m.contexts.resize(n), m.stacks.resize(n);
  for (auto &meeting : m.meeting) meeting.done.assign(dry ? 0 : n * PIPES, 0);
  for (const Array &array : launch.arrays) {
    m.shadows.emplace_back(dry ? 0 : (array.bytes + array.granule - 1) / array.granule);
    m.lines.emplace_back(m.timed ? array.bytes / rates::ASSUMED_LINE + 1 : 0);
  }
  for (int b = 0, i = 0; b < launch.blocks; b++) {
    if (launch.cube) make_core(i++, b, Kind::AIC, 0, n * PIPES);
    for (int s = 0; launch.vector && s < (launch.cube ? 2 : 1); s++) make_core(i++, b, Kind::AIV, s, n * PIPES);
  }
  schedule();
  if (m.timed && m.message.empty()) {
    last_clock = report(m);
    last_events = std::move(m.events);
    last_names.clear();
    for (const auto &c : m.cores) last_names.push_back(name(*c));
  }
  machine = nullptr;
  return m.message;
}

}  // namespace emulator

extern "C" void emulator_set_cores(int cores) { emulator::chip_cores = cores; }
extern "C" void emulator_set_seconds(double limit) { emulator::seconds = limit; }
extern "C" void emulator_drop(int kind, int64_t n) { emulator::drop_kind = kind, emulator::drop_at = n; }
extern "C" int64_t emulator_syncs(int kind) { return emulator::syncs[kind]; }
extern "C" void emulator_set_clock(int mode) { emulator::clock_mode = mode, emulator::dry = mode == 2; }
extern "C" const char *emulator_clock() { return emulator::last_clock.c_str(); }
extern "C" int emulator_trace(const char *path) {
  using namespace emulator;
  std::FILE *file = std::fopen(path, "w");
  if (!file) return 1;
  std::fprintf(file, "{\"displayTimeUnit\": \"ns\", \"traceEvents\": [");
  for (size_t c = 0; c < last_names.size(); c++) {
    std::fprintf(file, "%s\n{\"ph\": \"M\", \"pid\": %zu, \"name\": \"process_name\", \"args\": {\"name\": \"%s\"}}", c ? "," : "",
                 c, last_names[c].c_str());
    for (int p = 0; p < PIPES; p++)
      std::fprintf(file, ",\n{\"ph\": \"M\", \"pid\": %zu, \"tid\": %d, \"name\": \"thread_name\", \"args\": {\"name\": \"%s\"}}", c,
                   p, PIPE_NAMES[p]);
  }
  const double us = 1e6 / rates::CYCLES_A_SECOND;
  for (const Event &e : last_events) {
    const char *waited = e.waited == 'p' ? "its pipe" : e.waited == 'f' ? "a flag" : "the scalar unit";
    std::string cause = "the beginning";
    if (e.cause >= 0) {
      const Event &c = last_events[e.cause];
      cause = last_names[c.core] + ", " + PIPE_NAMES[c.pipe] + ", " + c.where.text();
    }
    std::fprintf(file, ",\n{\"ph\": \"X\", \"pid\": %d, \"tid\": %d, \"name\": \"%s %s\", ", e.core, e.pipe, e.name,
                 e.where.text().c_str());
    std::fprintf(file, "\"ts\": %.4f, \"dur\": %.4f, ", e.begin * us, (e.end - e.begin) * us);
    std::fprintf(file, "\"args\": {\"waited for\": \"%s\", \"after\": \"%s\"}}", waited, cause.c_str());
  }
  std::fprintf(file, "\n]}\n");
  return std::fclose(file);
}
extern "C" const char *emulator_message() { return emulator::last_message.c_str(); }
extern "C" int emulator_report(const char *message) {
  emulator::last_message = message;
  if (*message) std::fprintf(stderr, "emulator: %s\n", message);
  return *message ? 3 : 0;
}
