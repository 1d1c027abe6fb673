// Runs one launch of a kernel: threads as fibers, in a shuffled order, that stop at every
// SIMD-group function and barrier, and memory in which every access is checked.
#include "fibers.h"
#include "memory.h"
#include "simd.h"
#include "undefined.h"

enum State : u8 { READY, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };
enum { MAX_THREADS = 1024, STACK = 1 << 17, GUARD = PAGE };

struct Thread {
  Fiber fiber;
  State state;
  u32 site;
  u64 path;
  u32 op, flags;
  int type;
  u32 count;
  void* data;
  void* fill;
  int param;
};

static Thread threads[MAX_THREADS];
static Fiber scheduler;
static u8* stacks;
static Launch* launch;
static u32 active, groups;
static u64 random_state;

// What a kernel may ask about the running thread; see execute.py for the names.
extern "C" ThreadInfo emu_thread_info[MAX_THREADS];
ThreadInfo emu_thread_info[MAX_THREADS];

static u32 random_below(u32 n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (u32)((random_state >> 32) * n >> 32);
}
static void shuffle(u32* order, u32 n) {
  for (u32 i = 0; i < n; i++) order[i] = i;
  for (u32 i = n; i > 1; i--) {
    u32 j = random_below(i), t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

// The calls that lead to where the running thread is, as a number; instrument.py keeps it.
extern "C" u64 emu_path;
u64 emu_path;

static void leave(State state) {
  Thread* t = &threads[now.thread];
  t->state = state;
  t->path = emu_path;
  fiber_switch(&t->fiber, &scheduler);
  emu_path = t->path;
}
void stop_thread() {
  leave(DONE);
  __builtin_trap();
}
static void body() {
  emu_path = 0;
  launch->entry(launch->args, &emu_thread_info[now.thread]);
  leave(DONE);
  __builtin_trap();
}

extern "C" void emu_barrier(u32 scope, u32 flags, u32 site) {
  Thread* t = &threads[now.thread];
  t->site = site;
  t->flags = flags;
  leave(scope ? AT_SIMD_BARRIER : AT_BARRIER);
}
extern "C" void emu_simd(u32 op, int type, u32 count, void* data, void* fill, int param,
                         u32 site) {
  Thread* t = &threads[now.thread];
  t->site = site;
  t->op = op;
  t->type = type;
  t->count = count;
  t->data = data;
  t->fill = fill;
  t->param = param;
  leave(AT_SIMD);
}

static const char* state_name(State s) {
  const char* names[] = {"runs", "waits at a SIMD-group function", "waits at simdgroup_barrier",
                         "waits at threadgroup_barrier", "has returned"};
  return names[s];
}
static bool together(const Thread* a, const Thread* b) {
  return a->site == b->site && a->path == b->path;
}
static void diverged(u32 a, u32 b) {
  Thread *x = &threads[a], *y = &threads[b];
  // Report the thread that waits; the other one is the reason.
  if (x->state == DONE) {
    Thread* t = x;
    x = y;
    y = t;
    u32 i = a;
    a = b;
    b = i;
  }
  now.thread = a;
  const char* kind =
      x->state == AT_BARRIER ? "divergence at barrier" : "divergence at SIMD operation";
  if (y->state == DONE)
    fail(kind, x->site, "thread %u %s, thread %u has returned", a, state_name(x->state), b);
  else if (x->site == y->site && x->state == y->state)
    fail(kind, x->site, "threads %u and %u are in different calls of the function that waits here",
         a, b);
  else
    fail(kind, x->site, "thread %u %s, thread %u %s at line %u", a, state_name(x->state), b,
         state_name(y->state), y->site >> 10);
}

static void run_simd_function(u32 first, u32 n) {
  Thread* t = &threads[first];
  Lanes lanes;
  lanes.n = n;
  for (u32 i = 0; i < n; i++) {
    lanes.data[i] = t[i].data;
    lanes.fill[i] = t[i].fill;
    lanes.param[i] = t[i].param;
  }
  now.thread = first;
  const char* wrong = simd_function(t->op, t->type, t->count, &lanes);
  if (wrong) fail("SIMD operation", t->site, "%s", wrong);
  launch->counters.simd[t->op] += 1;
  launch->counters.simd_lanes[t->op] += n;
}

// Runs one SIMD group until all its threads wait at the threadgroup's barrier or have returned.
static void run_simd_group(u32 g) {
  u32 first = g * 32, n = active - first < 32 ? active - first : 32;
  u32 order[32];
  for (;;) {
    shuffle(order, n);
    for (u32 i = 0; i < n; i++) {
      u32 t = first + order[i];
      if (threads[t].state != READY) continue;
      now.thread = t;
      fiber_switch(&scheduler, &threads[t].fiber);
      if (now.failed) return;
    }
    Thread* lead = &threads[first];
    for (u32 i = 1; i < n; i++) {
      Thread* t = lead + i;
      if (t->state != lead->state) return diverged(first, first + i);
      if (t->state != DONE && !together(t, lead)) return diverged(first, first + i);
    }
    if (lead->state == DONE || lead->state == AT_BARRIER) return;
    if (lead->state == AT_SIMD) {
      run_simd_function(first, n);
    } else {
      launch->counters.simd_barriers += 1;
      simd_group_barrier(g, lead->flags);
    }
    if (now.failed) return;
    for (u32 i = 0; i < n; i++) lead[i].state = READY;
  }
}

static void run_threadgroup() {
  groups = (active + 31) / 32;
  begin_threadgroup(launch, groups);
  for (u32 t = 0; t < active; t++) {
    threads[t].state = READY;
    u8* base = stacks + (u64)t * (STACK + GUARD);
    fiber_start(&threads[t].fiber, base + GUARD, STACK, body);
  }
  u32 order[MAX_THREADS / 32];
  for (;;) {
    shuffle(order, groups);
    for (u32 i = 0; i < groups; i++) {
      run_simd_group(order[i]);
      if (now.failed) return;
    }
    for (u32 t = 32; t < active; t += 32)
      if (threads[t].state != threads[0].state ||
          (threads[t].state != DONE && !together(&threads[t], &threads[0])))
        return diverged(0, t);
    if (threads[0].state == DONE) return;
    launch->counters.barriers += 1;
    threadgroup_barrier(groups, threads[0].flags);
    for (u32 t = 0; t < active; t++) threads[t].state = READY;
  }
}

static u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

static void describe(u32 x, u32 y, u32 z) {
  const u32 *grid = launch->grid, *tg = launch->threadgroup;
  u32 at[3] = {x, y, z}, size[3], count[3];
  for (int i = 0; i < 3; i++) {
    count[i] = (grid[i] + tg[i] - 1) / tg[i];
    size[i] = smaller(tg[i], grid[i] - at[i] * tg[i]);
  }
  active = size[0] * size[1] * size[2];
  for (u32 t = 0; t < active; t++) {
    ThreadInfo* i = &emu_thread_info[t];
    u32 in[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      i->thread_position_in_threadgroup[d] = in[d];
      i->threadgroup_position_in_grid[d] = at[d];
      i->thread_position_in_grid[d] = at[d] * tg[d] + in[d];
      i->threads_per_threadgroup[d] = size[d];
      i->dispatch_threads_per_threadgroup[d] = tg[d];
      i->threadgroups_per_grid[d] = count[d];
      i->threads_per_grid[d] = grid[d];
    }
    i->thread_index_in_threadgroup = t;
    i->thread_index_in_simdgroup = t % 32;
    i->simdgroup_index_in_threadgroup = t / 32;
    i->simdgroups_per_threadgroup = (active + 31) / 32;
    i->dispatch_simdgroups_per_threadgroup = (tg[0] * tg[1] * tg[2] + 31) / 32;
  }
}

extern "C" int emu_run(Launch* l) {
  launch = l;
  if (!stacks) {
    u64 size = (u64)MAX_THREADS * (STACK + GUARD);
    stacks = (u8*)mmap(nullptr, size, READ_WRITE, MAP_FLAGS, -1, 0);
    if (stacks == (u8*)-1) return 2;
    for (u64 i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * (STACK + GUARD), GUARD, 0);
  }
  random_state = l->seed * 0x9E3779B97F4A7C15ul + 0x1234567890abcdeful;
  for (int i = 0; i < 4; i++) random_below(2);
  begin_launch(l);
  u32 count[3];
  for (int d = 0; d < 3; d++) count[d] = (l->grid[d] + l->threadgroup[d] - 1) / l->threadgroup[d];
  u32 total = count[0] * count[1] * count[2];
  u32* order = (u32*)calloc(total + 1, sizeof(u32));
  shuffle(order, total);
  for (u32 i = 0; i < total && !now.failed; i++) {
    u32 g = order[i];
    now.threadgroup = g;
    describe(g % count[0], g / count[0] % count[1], g / count[0] / count[1]);
    run_threadgroup();
    l->counters.threadgroups += 1;
    l->counters.threads += active;
  }
  free(order);
  end_launch(l);
  return now.failed;
}
