// Work in pieces that any thread may take, so that a thread which the system has put aside holds up one piece at most.
#pragma once

#include <omp.h>
#include <unistd.h>

#include "products.h"

namespace tokengame::INSTRUCTIONS {

// Calls body(task) for tasks 0 .. tasks - 1, in any order, on up to `threads` threads.
// Throws std::bad_alloc if a body did. In a process that was forked from one which had used threads, the calling thread does
// everything: the others do not exist there, and OpenMP would wait for them.
template <class Body>
inline void in_parallel(long threads, long tasks, Body body) {
    static pid_t process = 0;  // that has used threads
    threads = least(threads, tasks);
    const pid_t now = threads > 1 ? getpid() : 0;
    if (threads <= 1 || (process && process != now)) {
        Tiles tiles;
        for (long task = 0; task < tasks; task++) body(task);
        return;
    }
    process = now;
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) try {
                body(task);
            } catch (...) {
#pragma omp atomic write
                failed = true;
            }
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace tokengame::INSTRUCTIONS
