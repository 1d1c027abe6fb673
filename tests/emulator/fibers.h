// Switching between lanes: one stack each, a handful of registers saved by hand.
// EMU_UCONTEXT selects the portable version, several times slower.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

extern "C" {
void* mmap(void*, u64, int, int, int, long);
int mprotect(void*, u64, int);
void* memset(void*, int, u64);
void* memcpy(void*, const void*, u64);
int memcmp(const void*, const void*, u64);
int snprintf(char*, u64, const char*, ...);
int vsnprintf(char*, u64, const char*, __builtin_va_list);
void* calloc(u64, u64);
void free(void*);
}
#ifdef __APPLE__
enum { MAP_FLAGS = 0x1000 | 0x2 | 0x40 };
#else
enum { MAP_FLAGS = 0x20 | 0x2 | 0x4000 };
#endif
enum { READ_WRITE = 3, PAGE = 16384 };

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
struct Fiber {
  void* sp;
};
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void fiber_start(Fiber* f, u8* stack, u64 size, void (*body)()) {
  u64* sp = (u64*)(stack + size);
  *--sp = 0;  // the return address of body, which never returns
  *--sp = (u64)body;
  for (int i = 0; i < 6; i++) *--sp = 0;
  f->sp = sp;
}
static inline void fiber_switch(Fiber* from, Fiber* to) { emu_switch(&from->sp, to->sp); }
#else
// ucontext_t begins alike on Linux for x86-64 and arm64: flags, link, stack.
struct Fiber {
  alignas(16) u64 context[640];
};
extern "C" {
int getcontext(void*);
int swapcontext(void*, const void*);
void makecontext(void*, void (*)(), int, ...);
}
static void fiber_start(Fiber* f, u8* stack, u64 size, void (*body)()) {
  getcontext(f->context);
#ifdef __APPLE__
  f->context[1] = (u64)stack;
  f->context[2] = size;
  f->context[4] = 0;
#else
  f->context[1] = 0;
  f->context[2] = (u64)stack;
  f->context[3] = 0;
  f->context[4] = size;
#endif
  makecontext(f->context, body, 0);
}
static inline void fiber_switch(Fiber* from, Fiber* to) { swapcontext(from->context, to->context); }
#endif
