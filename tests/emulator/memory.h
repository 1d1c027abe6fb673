// Every access to device, constant and threadgroup memory comes here first.
//
// Each buffer has a slot of address space of its own, so an address says which buffer it was
// computed from, however far out of bounds it is. In checked mode every byte also has a cell
// that tells who wrote it last and who read it since, and when.
#pragma once
#include "fibers.h"
#include "simd.h"

enum { MAX_BUFFERS = 31, MAX_VARIABLES = 64 };
static const u64 SLOT = 32ul << 30;
static const u64 MAX_ACCESSES = 1ul << 27;  // a second or so

struct ThreadInfo {
  u32 thread_position_in_grid[3];
  u32 threadgroup_position_in_grid[3];
  u32 thread_position_in_threadgroup[3];
  u32 threads_per_threadgroup[3];
  u32 dispatch_threads_per_threadgroup[3];
  u32 threadgroups_per_grid[3];
  u32 threads_per_grid[3];
  u32 thread_index_in_threadgroup;
  u32 thread_index_in_simdgroup;
  u32 simdgroup_index_in_threadgroup;
  u32 simdgroups_per_threadgroup;
  u32 dispatch_simdgroups_per_threadgroup;
};

struct BufferCounters {
  u64 bytes_read, bytes_written, loads, stores, unwritten;
};
struct Counters {
  BufferCounters buffer[MAX_BUFFERS];
  BufferCounters threadgroup_memory, tables;
  u64 simd[32], simd_lanes[32];
  u64 barriers, simd_barriers, threads, threadgroups;
};
struct Buffer {
  const char* name;
  u64 base, size;
  u32 output;    // 1: its bytes are unwritten until the kernel writes them
  u32 filled;    // 1: an output that starts with init_value
  // Checked mode, for each byte: how often it was read by threads, by how many SIMD groups,
  // and by how many threadgroups.
  u16 *reads, *simd_groups, *groups;
};
struct Launch {
  void (*entry)(void* const*, const ThreadInfo*);
  void** args;
  u32 grid[3], threadgroup[3];
  u64 seed;
  u32 checked, buffers;
  Buffer buffer[MAX_BUFFERS];
  const struct Variable* variables;  // of the kernel's module
  u32 variable_count;
  Counters counters;
  u32 error_site, error_thread, error_threadgroup;
  char error_kind[64], error[512];
};
// A threadgroup variable or a constant table; space is 3 or 2.
struct Variable {
  u8* data;
  u64 size;
  u64 space;
  const char* name;
};

static struct {
  u32 thread, threadgroup;
  u32 failed;
  u64 accesses;
} now;
static Launch* memory_launch;
static u64 arena;

void stop_thread();

// Records the first fault; inside a kernel's thread it must be followed by stop_thread.
__attribute__((format(printf, 3, 4))) static void fail(const char* kind, u32 site,
                                                       const char* format, ...) {
  if (now.failed) return;
  Launch* l = memory_launch;
  now.failed = 1;
  l->error_site = site;
  l->error_thread = now.thread;
  l->error_threadgroup = now.threadgroup;
  snprintf(l->error_kind, sizeof l->error_kind, "%s", kind);
  __builtin_va_list list;
  __builtin_va_start(list, format);
  vsnprintf(l->error, sizeof l->error, format, list);
  __builtin_va_end(list);
}

// ---- time -------------------------------------------------------------------------------
// A stretch is the time between two barriers that order one kind of memory: of the whole
// threadgroup, or of one SIMD group. Numbers are never used twice within a launch.
struct Clock {
  u32 stretch;
  u32 simd_stretch[32];
  u32 first;  // the running threadgroup's first stretch
};
static Clock device_clock, threadgroup_clock;
static u32 ticks;

static void new_stretch(Clock* c, u32 groups) {
  c->stretch = ++ticks;
  for (u32 g = 0; g < groups; g++) c->simd_stretch[g] = c->stretch;
}
static void threadgroup_barrier(u32 groups, u32 flags) {
  if (flags & 1) new_stretch(&device_clock, groups);
  if (flags & 2) new_stretch(&threadgroup_clock, groups);
}
static void simd_group_barrier(u32 group, u32 flags) {
  if (flags & 1) device_clock.simd_stretch[group] = ++ticks;
  if (flags & 2) threadgroup_clock.simd_stretch[group] = ++ticks;
}

// ---- who touched a byte -----------------------------------------------------------------
struct Touch {
  u32 stretch, simd_stretch, site;
  u16 thread, any;
};
struct Cell {
  u32 threadgroup;  // of the last write, plus 1; 0: never written
  Touch write;
  Touch read[2];  // by two different threads, if possible of two SIMD groups
};
static Cell* cells[MAX_BUFFERS];
static Cell* variable_cells[MAX_VARIABLES];

// The threadgroup (plus 1) that read a byte last, and its SIMD groups that have.
struct Readers {
  u32 threadgroup, simd_groups;
};
static Readers* readers[MAX_BUFFERS];

static bool races(const Touch* t, const Clock* c) {
  if (!t->any || t->stretch != c->stretch || t->thread == now.thread) return false;
  if (t->thread / 32 != now.thread / 32) return true;
  return t->simd_stretch == c->simd_stretch[now.thread / 32];
}
static void touch(Touch* t, const Clock* c, u32 site) {
  t->stretch = c->stretch;
  t->simd_stretch = c->simd_stretch[now.thread / 32];
  t->site = site;
  t->thread = (u16)now.thread;
  t->any = 1;
}

struct Place {
  const char* where;
  const char* name;
  u64 offset;
};
static void fail_race(const char* verb, const char* other, const Touch* t, Place p, u32 site) {
  fail("data race", site, "thread %u %s byte %lu of %s %s that thread %u %s at line %u, with no "
       "barrier for %s memory in between",
       now.thread, verb, p.offset, p.where, p.name, t->thread, other, t->site >> 10, p.where);
}

static void check_write(Cell* cell, u32 size, const Clock* c, bool across, Place p, u32 site) {
  for (u32 i = 0; i < size; i++, cell++, p.offset++) {
    if (across && cell->threadgroup && cell->threadgroup != now.threadgroup + 1)
      return fail("race between threadgroups", site,
                  "threadgroup %u writes byte %lu of %s, which threadgroup %u wrote at line %u",
                  now.threadgroup, p.offset, p.name, cell->threadgroup - 1,
                  cell->write.site >> 10);
    if (cell->threadgroup == now.threadgroup + 1) {
      if (races(&cell->write, c)) return fail_race("writes", "wrote", &cell->write, p, site);
    }
    for (int r = 0; r < 2; r++) {
      if (races(&cell->read[r], c)) return fail_race("writes", "reads", &cell->read[r], p, site);
      if (across && cell->read[r].any && cell->read[r].stretch < c->first)
        return fail("race between threadgroups", site,
                    "threadgroup %u writes byte %lu of %s, which another one read at line %u",
                    now.threadgroup, p.offset, p.name, cell->read[r].site >> 10);
    }
    cell->threadgroup = now.threadgroup + 1;
    touch(&cell->write, c, site);
  }
}

// `filled` memory holds something from the start.
static void check_read(Cell* cell, u32 size, const Clock* c, bool across, bool filled, Place p,
                       u32 site) {
  for (u32 i = 0; i < size; i++, cell++, p.offset++) {
    bool written = across ? cell->threadgroup : cell->threadgroup == now.threadgroup + 1;
    if (!written && !filled)
      return fail("read of unwritten memory", site, "reads byte %lu of %s %s, which %s",
                  p.offset, p.where, p.name,
                  across ? "nothing has written" : "no thread of this threadgroup has written");
    if (written && cell->threadgroup != now.threadgroup + 1)
      return fail("race between threadgroups", site,
                  "threadgroup %u reads byte %lu of %s, which threadgroup %u wrote at line %u",
                  now.threadgroup, p.offset, p.name, cell->threadgroup - 1,
                  cell->write.site >> 10);
    if (races(&cell->write, c)) return fail_race("reads", "wrote", &cell->write, p, site);
    Touch* r = cell->read;
    if (!r[0].any || r[0].stretch != c->stretch || r[0].thread == now.thread) {
      if (r[0].stretch != c->stretch) r[1].any = 0;
      touch(&r[0], c, site);
    } else if (!r[1].any || r[1].thread / 32 == r[0].thread / 32) {
      touch(&r[1], c, site);
    }
  }
}

// ---- one access -------------------------------------------------------------------------
static void count(BufferCounters* b, u32 size, bool write) {
  (write ? b->bytes_written : b->bytes_read) += size;
  (write ? b->stores : b->loads) += 1;
}

static void out_of_bounds(bool write, const char* name, i64 offset, u32 size, u64 bytes,
                          u32 site) {
  fail("out of bounds", site, "%s %u bytes at byte %ld of %s, which has %lu bytes",
       write ? "writes" : "reads", size, offset, name, bytes);
  stop_thread();
}

static void device_access(u64 address, u32 size, bool write, u32 site) {
  Launch* l = memory_launch;
  u64 slot = (address - arena) / SLOT;
  Buffer* b = &l->buffer[slot];
  if (slot >= l->buffers) {
    fail("out of bounds", site, "%s an address that belongs to no buffer",
         write ? "writes" : "reads");
    stop_thread();
  }
  u64 offset = address - b->base;
  if (offset > b->size || b->size - offset < size)
    out_of_bounds(write, b->name, (i64)offset, size, b->size, site);
  if (write && !b->output) {
    fail("write to input", site, "writes byte %lu of input %s", offset, b->name);
    stop_thread();
  }
  count(&l->counters.buffer[slot], size, write);
  if (!l->checked) return;
  if (!write) {
    Readers* r = readers[slot] + offset;
    u32 bit = 1u << now.thread / 32;
    for (u64 i = offset; i < offset + size; i++, r++) {
      b->reads[i] += b->reads[i] != 65535;
      if (r->threadgroup != now.threadgroup + 1) {
        *r = {now.threadgroup + 1, 0};
        b->groups[i] += b->groups[i] != 65535;
      }
      if (!(r->simd_groups & bit)) b->simd_groups[i] += b->simd_groups[i] != 65535;
      r->simd_groups |= bit;
    }
  }
  if (!b->output) return;
  Place p = {"device", b->name, offset};
  Cell* cell = cells[slot] + offset;
  if (write) {
    check_write(cell, size, &device_clock, true, p, site);
  } else {
    check_read(cell, size, &device_clock, true, b->filled, p, site);
  }
  if (now.failed) stop_thread();
}

static void variable_access(u64 address, u32 size, bool write, u32 space, u32 site) {
  Launch* l = memory_launch;
  for (u32 v = 0; v < l->variable_count; v++) {
    const Variable* x = &l->variables[v];
    u64 offset = address - (u64)x->data;
    // The red zone on both sides makes a near miss tell whose it is.
    if (x->space != space || offset + 64 > x->size + 128) continue;
    if (offset > x->size || x->size - offset < size)
      out_of_bounds(write, x->name, (i64)offset, size, x->size, site);
    count(space == 3 ? &l->counters.threadgroup_memory : &l->counters.tables, size, write);
    if (!l->checked || space != 3) return;
    Place p = {"threadgroup", x->name, offset};
    Cell* cell = variable_cells[v] + offset;
    if (write) {
      check_write(cell, size, &threadgroup_clock, false, p, site);
    } else {
      check_read(cell, size, &threadgroup_clock, false, false, p, site);
    }
    if (now.failed) stop_thread();
    return;
  }
  fail("out of bounds", site, "%s %s memory outside every variable", write ? "writes" : "reads",
       space == 3 ? "threadgroup" : "constant");
  stop_thread();
}

// what: bytes | alignment << 8 | write << 16 | address space << 20.
extern "C" void emu_access(u64 address, u32 what, u32 site) {
  u32 size = what & 255, align = what >> 8 & 255, space = what >> 20;
  bool write = what >> 16 & 1;
  if (++now.accesses > MAX_ACCESSES) {
    fail("endless loop", site, "more than %lu accesses of memory in one launch", MAX_ACCESSES);
    stop_thread();
  }
  if (address & (align - 1)) {
    fail("misaligned access", site, "%s %u bytes at an address that is not a multiple of %u",
         write ? "writes" : "reads", size, align);
    stop_thread();
  }
  if (space == 1 || (space == 2 && address - arena < SLOT * MAX_BUFFERS)) {
    device_access(address, size, write, site);
  } else {
    variable_access(address, size, write, space, site);
  }
}

// ---- a launch and its threadgroups ------------------------------------------------------
extern "C" u64 emu_arena() {
  if (!arena) {
    void* p = mmap(nullptr, SLOT * MAX_BUFFERS, 0, MAP_FLAGS, -1, 0);
    arena = p == (void*)-1 ? 0 : (u64)p;
  }
  return arena;
}
// Makes room for a buffer of `size` bytes in the middle of its slot.
extern "C" u64 emu_place(u32 slot, u64 size) {
  static u64 room[MAX_BUFFERS];
  u64 base = emu_arena() + slot * SLOT + SLOT / 2;
  u64 pages = (size + 64 + PAGE - 1) / PAGE * PAGE;
  if (pages > room[slot]) {
    if (mprotect((void*)base, pages, READ_WRITE)) return 0;
    room[slot] = pages;
  }
  return base;
}

static void begin_launch(Launch* l) {
  memory_launch = l;
  now.failed = 0;
  now.accesses = 0;
  ticks = 0;
  if (!l->checked) return;
  for (u32 i = 0; i < l->buffers; i++) {
    readers[i] = (Readers*)calloc(l->buffer[i].size + 1, sizeof(Readers));
    if (l->buffer[i].output) cells[i] = (Cell*)calloc(l->buffer[i].size + 1, sizeof(Cell));
  }
  for (u32 v = 0; v < l->variable_count; v++)
    variable_cells[v] = (Cell*)calloc(l->variables[v].size, sizeof(Cell));
}
static void end_launch(Launch* l) {
  if (!l->checked) return;
  for (u32 i = 0; i < l->buffers; i++) {
    Buffer* b = &l->buffer[i];
    if (b->output && !b->filled)
      for (u64 j = 0; j < b->size; j++)
        l->counters.buffer[i].unwritten += !cells[i][j].threadgroup;
    free(readers[i]);
    free(cells[i]);
    cells[i] = nullptr;
  }
  for (u32 v = 0; v < l->variable_count; v++) free(variable_cells[v]);
}
static void begin_threadgroup(Launch* l, u32 groups) {
  new_stretch(&device_clock, groups);
  new_stretch(&threadgroup_clock, groups);
  device_clock.first = device_clock.stretch;
  threadgroup_clock.first = threadgroup_clock.stretch;
  // All ones: NaN in every floating-point type, and no sensible index.
  for (u32 v = 0; v < l->variable_count; v++)
    if (l->variables[v].space == 3) memset(l->variables[v].data, 255, l->variables[v].size);
}
