// parallel_for for the CPU launchers: threads live for one call, or for as long as a crew is kept,
// so nothing survives a fork and nothing competes with torch's own pool between calls.
#pragma once

#include <cstdint>

namespace dsd {

// Calls task(context, i) once for every i in [0, n_tasks), on at most n_threads threads (the
// calling one included). Tasks are handed out one at a time, in any order: they must write to
// disjoint memory, which also makes results independent of n_threads. Tasks must not throw.
void run_tasks(int64_t n_tasks, int n_threads, void (*task)(void*, int64_t), void* context);

// Threads that wait for the calls of the calling thread, n_threads with that one, until it lets
// them go: for a row of calls so short that starting threads for each would be a good part of them.
// Nothing happens where it has a crew already; keep_crew tells whether it made one.
bool keep_crew(int n_threads);
void release_crew();

// The same for a callable. Templates over a local lambda stay inside the caller's translation unit.
template <class F>
static inline void parallel_for(int64_t n_tasks, int n_threads, const F& f) {
    run_tasks(
        n_tasks, n_threads, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

// Cuts [0, n) into chunks of `chunk` items and calls f(begin, end) for each.
template <class F>
static inline void parallel_chunks(int64_t n, int64_t chunk, int n_threads, const F& f) {
    parallel_for((n + chunk - 1) / chunk, n_threads, [&](int64_t i) {
        const int64_t begin = i * chunk;
        f(begin, begin + chunk < n ? begin + chunk : n);
    });
}

}  // namespace dsd
