// Work in pieces that any thread may take, so that a thread which the system has put aside holds up one piece at most.
#pragma once

#include <omp.h>

#include <type_traits>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "products.h"

namespace tokengame::INSTRUCTIONS {

// Calls body(task) or body(task, worker) for tasks 0 .. tasks - 1, in any order, on up to `threads` threads; worker is the
// number of the thread, from 0. Throws std::bad_alloc or Violated if a body did. In a process that was forked from one that
// had used threads, the calling thread does everything: the others do not exist there, and OpenMP would wait for them.
template <class Body>
inline void in_parallel(long threads, long tasks, Body body) {
    const auto run = [&](long task, [[maybe_unused]] long worker) {
        if constexpr (std::is_invocable_v<Body&, long, long>) body(task, worker);
        else body(task);
    };
    threads = least(threads, tasks);
    if (threads <= 1 || is_forked()) {
        Tiles tiles;
        for (long task = 0; task < tasks; task++) run(task, 0);
        return;
    }
    bool failed = false, violated = false;
    const auto attempt = [&](long task, long worker) {
        try {
            run(task, worker);
        } catch (const Violated&) {
#pragma omp atomic write
            violated = true;
        } catch (...) {
#pragma omp atomic write
            failed = true;
        }
    };
#if defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not see how OpenMP's threads wait for each other
    long next = 0;
    const auto work = [&](long worker) {
        Tiles tiles;
        for (long task;;) {
#pragma omp atomic capture
            task = next++;
            if (task >= tasks) return;
            attempt(task, worker);
        }
    };
    std::vector<std::thread> others;
    for (long worker = 1; worker < threads; worker++) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) attempt(task, omp_get_thread_num());
    }
#endif
    if (violated) throw Violated();
    if (failed) throw std::bad_alloc();
}

}  // namespace tokengame::INSTRUCTIONS
