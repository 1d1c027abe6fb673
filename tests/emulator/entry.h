// What the runtime tells a thread about itself (memory.h's ThreadInfo), and where it enters.
struct ThreadInfo {
  uint thread_position_in_grid[3];
  uint threadgroup_position_in_grid[3];
  uint thread_position_in_threadgroup[3];
  uint threads_per_threadgroup[3];
  uint dispatch_threads_per_threadgroup[3];
  uint threadgroups_per_grid[3];
  uint threads_per_grid[3];
  uint thread_index_in_threadgroup;
  uint thread_index_in_simdgroup;
  uint simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
  uint dispatch_simdgroups_per_threadgroup;
};
#define EMU_ENTRY extern "C" void emu_entry(void* const* args, const ThreadInfo* info)
